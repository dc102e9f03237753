"""Quantizes the same float32 graphs with the same data by vlmport and by its peers, and compares.

    python scripts/compare_quantizers.py --modelopt-python ENVIRONMENT/bin/python
    python scripts/compare_quantizers.py --checkpoint tinyllava --dry-run   # print the table

Peers: onnxruntime's `quantize_static` and `MatMulNBitsQuantizer`, and nvidia-modelopt's ONNX path,
which wants an environment of its own (docs/measurements/precision.md says which). Every quantized
graph is put into a copy of the float bundle and run by the same runtime. Findings are kept below
--folder; the table is made of all checkpoints that are there.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from marked_table import write_between
from peers.contenders import Contender, PeerQuantizer, contenders
from peers.graph_inputs import record_inputs
from peers.modelopt_quantizer import modelopt_versions
from peers.peer_graph import write_peer_bundle, write_plain_graph
from peers.peer_scores import Referee, Score
from peers.peer_table import table
from tiny.recipes import EXAMPLES, RECIPES
from write_questions import DATA_NAME, HELDOUT_SEED, write_questions

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.api.quantize import QuantizeOptions, quantize
from vlmport.api.quantize_recipe import RecipeOptions
from vlmport.api.versions import library_versions
from vlmport.manifest import load_manifest

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "measurements" / "precision.md"
MARKS = "<!-- peers: begin -->", "<!-- peers: end -->"
CALIBRATION_SEED = 11  # not one of any measurement
RESULTS = "results.json"


def main() -> None:
    """Measures the chosen checkpoints and writes the table of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/compare-quantizers"))
    parser.add_argument("--count", type=int, default=1200, help="held-out questions")
    parser.add_argument("--samples", type=int, default=64, help="calibration questions")
    parser.add_argument("--led", type=int, default=300, help="questions to compare next tokens on")
    parser.add_argument("--checkpoint", action="append", choices=sorted(RECIPES))
    parser.add_argument("--modelopt-python", type=Path, help="interpreter with nvidia-modelopt")
    parser.add_argument("--dry-run", action="store_true", help="print the table only")
    parser.add_argument("--only-vlmport", action="store_true", help="keep what peers were found")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what was found")
    options = parser.parse_args()
    environment = _environment(options.modelopt_python)
    for name in [] if options.draw else options.checkpoint or sorted(RECIPES):
        folder: Path = options.folder / name
        kept = _read(folder / RESULTS) if options.only_vlmport else ()
        if not options.only_vlmport:
            _prepare(name, folder, options.count, options.samples)
        scores = _scores(name, folder, options.led, contenders(options.modelopt_python), kept)
        found = {"environment": environment, "scores": [asdict(score) for score in scores]}
        (folder / RESULTS).write_text(json.dumps(found, indent=1), encoding="utf-8")
    text = table(_found(options.folder))
    print(text)
    if not options.dry_run:
        write_between(DOCUMENT, MARKS, text)


def _environment(modelopt: Path | None) -> str:
    found = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    machine = f"{platform.system()} {platform.machine()}, CPU"
    return f"{machine}, {found}. Environment of nvidia-modelopt: {modelopt_versions(modelopt)}."


def _prepare(name: str, folder: Path, count: int, samples: int) -> None:
    """Exports a checkpoint, writes questions, and records what each graph is given."""
    shutil.rmtree(folder, ignore_errors=True)
    lessons = RECIPES[name].lessons()
    write_questions(list(lessons.heldout(count, HELDOUT_SEED)), folder / "questions")
    write_questions(list(lessons.heldout(samples, CALIBRATION_SEED)), folder / "calibration")
    base = folder / "fp32"
    export(ExportOptions(EXAMPLES / name, base), SilentProgress())
    record_inputs(base, folder / "calibration" / DATA_NAME, folder / "inputs")
    for graph in _graphs(base):
        for form in (False, True):
            plain = folder / _form(form) / f"{graph}.onnx"
            write_plain_graph(base / f"{graph}.onnx", plain, gemm_as_matmul=form)


def _graphs(base: Path) -> list[str]:
    """Those that the default recipe quantizes."""
    return [*load_manifest(base).image_graphs, "decoder"]


def _form(gemm_as_matmul: bool) -> str:
    return "plain-matmul" if gemm_as_matmul else "plain"


def _scores(
    name: str,
    folder: Path,
    led: int,
    all_of_them: tuple[Contender, ...],
    kept: Sequence[Score],
) -> list[Score]:
    """Scores of all; a peer's is taken from `kept` if it is there."""
    referee = Referee(folder, folder / "questions" / DATA_NAME, led)
    known = {(score.group, score.contender): score for score in kept}
    scores = [referee.score_float(name)]
    for contender in all_of_them:
        before = known.get((contender.group, contender.name))
        if before and not isinstance(contender.how, RecipeOptions):
            scores.append(before)
            continue
        print(f"{name}: {contender.group}: {contender.name}", file=sys.stderr)
        bundle = folder / "quantized"
        try:
            _quantize(contender, folder, bundle)
        except Exception as error:  # a peer may fail in any way, and its row says so
            if isinstance(contender.how, RecipeOptions):
                raise
            scores.append(referee.failed(name, contender, error))
            continue
        scores.append(referee.score(name, contender, bundle))
    return scores


def _quantize(contender: Contender, folder: Path, bundle: Path) -> None:
    base, how = folder / "fp32", contender.how
    if isinstance(how, RecipeOptions):
        data = folder / "calibration" / DATA_NAME
        options = QuantizeOptions(base, bundle, how, calibration=data, overwrite=True)
        quantize(options, SilentProgress())
        return
    graphs = {graph: _quantize_graph(how, graph, folder) for graph in _graphs(base)}
    write_peer_bundle(base, graphs, bundle)


def _quantize_graph(peer: PeerQuantizer, graph: str, folder: Path) -> Path:
    target = folder / "peer" / f"{graph}.onnx"
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    source = folder / _form(peer.gemm_as_matmul) / f"{graph}.onnx"
    try:
        peer.quantize(source, folder / "inputs" / graph, target)
    except Exception as error:
        raise RuntimeError(f"{graph}: {type(error).__name__}: {error}") from error
    return target


def _found(folder: Path) -> dict[str, list[Score]]:
    """Environment -> scores measured in it."""
    found: dict[str, list[Score]] = {}
    for path in sorted(folder.glob(f"*/{RESULTS}")):
        environment = json.loads(path.read_text(encoding="utf-8"))["environment"]
        found.setdefault(environment, []).extend(_read(path))
    return found


def _read(path: Path) -> list[Score]:
    kept = json.loads(path.read_text(encoding="utf-8"))
    return [Score(**score) for score in kept["scores"]]


if __name__ == "__main__":
    main()
