"""Measures the trained checkpoints in every precision, on questions that no training saw.

    python scripts/precision_table.py             # rewrite docs/measurements/precision.md
    python scripts/precision_table.py --dry-run   # print the table

Each checkpoint below examples/ is exported, quantized with the default recipe of each precision on
other questions, and asked 1200 held-out ones. bfloat16 is emulated: a CPU has no kernels for it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from marked_table import write_between
from tiny.recipes import EXAMPLES, RECIPES
from write_questions import DATA_NAME, HELDOUT_SEED, write_questions

from vlmport.api.evaluate import EvaluateOptions, evaluate
from vlmport.api.evaluation import Evaluation
from vlmport.api.export import ExportOptions, export
from vlmport.api.parity_emulation import emulated_bundle
from vlmport.api.progress import SilentProgress
from vlmport.api.quantize import QuantizeOptions, quantize
from vlmport.api.quantize_recipe import RecipeOptions
from vlmport.calibration.recipe import ActivationMethod, WeightMethod
from vlmport.manifest import load_manifest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENT = REPOSITORY / "docs" / "measurements" / "precision.md"
MARKS = "<!-- answers: begin -->", "<!-- answers: end -->"
CALIBRATION_SEED = 11  # not one of any measurement
HEAD = (
    "| checkpoint | precision | decoder weights | exact | change, points | allowed "
    "| right to wrong, wrong to right | answers equal |"
)


@dataclass(frozen=True, slots=True)
class Precision:
    """One row for each checkpoint.

    Attributes:
        name: shown.
        recipe: how the bundle is made.
        allowed: most points of exact answers that may be lost; None where it is shown beside.
    """

    name: str
    recipe: RecipeOptions
    allowed: float | None


PRECISIONS = (
    Precision("fp16", RecipeOptions("fp16"), 0.0),
    Precision("bf16", RecipeOptions("bf16"), 0.0),
    Precision("int8", RecipeOptions("int8"), 1.0),
    Precision(
        "int8, min-max, not smoothed",
        RecipeOptions(
            "int8", activations=ActivationMethod("min_max", smoothing=None, outlier_ratio=None)
        ),
        None,
    ),
    Precision("int8-weight-only", RecipeOptions("int8-weight-only"), 1.0),
    Precision("int4", RecipeOptions("int4"), 2.0),
    Precision("int4, nearest", RecipeOptions("int4", weights=WeightMethod("nearest")), None),
)


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/precision-table"))
    parser.add_argument("--count", type=int, default=1200, help="held-out questions")
    parser.add_argument("--checkpoint", action="append", choices=sorted(RECIPES))
    parser.add_argument("--dry-run", action="store_true", help="print the table, change nothing")
    options = parser.parse_args()
    rows = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for name in options.checkpoint or sorted(RECIPES):
        rows += _rows(name, options.folder / name, options.count)
    table = "\n".join(rows)
    print(table)
    if not options.dry_run:
        write_between(DOCUMENT, MARKS, table)


def _rows(name: str, folder: Path, count: int) -> Iterator[str]:
    shutil.rmtree(folder, ignore_errors=True)
    lessons = RECIPES[name].lessons()
    write_questions(list(lessons.heldout(count, HELDOUT_SEED)), folder / "questions")
    write_questions(list(lessons.heldout(64, CALIBRATION_SEED)), folder / "calibration")
    base = folder / "fp32"
    export(ExportOptions(EXAMPLES / name, base), SilentProgress())
    state = folder / "fp32.answers.jsonl"
    alone = EvaluateOptions(base, folder / "questions" / DATA_NAME, state_file=state)
    exact = evaluate(alone, SilentProgress()).bundle.overall.score
    yield f"| {name} | fp32 | 100 % | {exact:.1%} | | | | |"
    for precision in PRECISIONS:
        print(f"{name}: {precision.name}", file=sys.stderr)
        bundle = folder / "quantized"
        made = QuantizeOptions(
            base,
            bundle,
            precision.recipe,
            calibration=folder / "calibration" / DATA_NAME,
            overwrite=True,
        )
        quantize(made, SilentProgress())
        share = _decoder_bytes(bundle) / _decoder_bytes(base)
        yield _row(name, precision, share, _evaluate(bundle, base, folder, state))


def _evaluate(bundle: Path, base: Path, folder: Path, state: Path) -> Evaluation:
    asked = bundle
    if load_manifest(bundle).precision == "bfloat16":
        asked = folder / "emulated"
        shutil.rmtree(asked, ignore_errors=True)
        asked.mkdir()
        emulated_bundle(bundle, asked)
    options = EvaluateOptions(
        asked, folder / "questions" / DATA_NAME, against=base, against_state_file=state
    )
    return evaluate(options, SilentProgress())


def _row(name: str, precision: Precision, share: float, found: Evaluation) -> str:
    comparison = found.comparison
    assert comparison is not None
    overall = comparison.overall
    allowed = "" if precision.allowed is None else f"-{precision.allowed:g}"
    cells = (
        name,
        precision.name,
        f"{share:.1%}",
        f"{found.bundle.overall.score:.1%}",
        f"{overall.points:+.2f}",
        allowed,
        f"{overall.lost}, {overall.gained}",
        f"{comparison.same_answers / found.bundle.overall.count:.1%}",
    )
    return f"| {' | '.join(cells)} |"


def _decoder_bytes(bundle: Path) -> int:
    return load_manifest(bundle).graph("decoder").parameter_bytes


if __name__ == "__main__":
    main()
