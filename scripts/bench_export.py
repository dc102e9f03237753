"""Measures how long an export takes, and how long transformers' own exporter takes for its parts.

The model is the synthetic LLaVA of bench_decode.py: Llama of 12 layers x 768 and a CLIP-like tower
of 12 layers x 768 at 336 pixels, random float32 weights. Every measurement runs in a process of its
own, both sides in turn, by the clock and by processor seconds, which a busy machine disturbs less.
Compared are, each with its weights written to the disk:

  vision_encoder  ours, cut above the selected layer, against OnnxExporter.export of the whole
                  tower with its hidden states (the exporter does not cut)
  projector       ours against OnnxExporter.export of it
  language        ours (embed_tokens and one decoder) against OnnxExporter.export_for_generation,
                  which gives language_model and lm_head for the prompt, and decode for one token;
                  of this version (5.23) it gives neither tower nor projector

Reading the checkpoint, tokenizer, manifest and hashes count for `vlmport export` alone, and in
`whole` only; building the PyTorch model is not counted for transformers.

    python scripts/bench_export.py --folder build/bench-export
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from synthetic import LLAMA_12X768, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PARTS = ("vision_encoder", "projector", "language")
_IMAGE_TOKEN, _IMAGE_TOKENS = 3, 576
_WHOLE_ALLOWED, _DECODER_ALLOWED, _RATIO_WANTED = 60.0, 30.0, 2.0


class Cost(NamedTuple):
    """Seconds by the clock, and of the processor over all threads."""

    wall: float
    cpu: float

    def __add__(self, other: Any) -> Cost:
        """Both added."""
        return Cost(self.wall + other[0], self.cpu + other[1])


Costs = dict[str, Cost]
Seconds = dict[str, float]


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/bench-export"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the object there as well")
    parser.add_argument("--measure", choices=sorted(_SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        costs = _SIDES[options.measure](options.folder)
        _result_file(options.folder, options.measure).write_text(json.dumps(costs), "utf-8")
        return
    if not (options.folder / "checkpoint").exists():
        write_checkpoint(options.folder / "checkpoint", LLAMA_12X768, "float32")
    rounds: dict[str, list[Costs]] = defaultdict(list)
    loads = []
    for _ in range(options.rounds):
        for side in _SIDES:
            rounds[side].append(_in_own_process(options.folder, side))
            loads.append(round(os.getloadavg()[0], 2))
    environment = {**_environment(), "load_average_after_each": loads}
    text = json.dumps({"environment": environment, **_report(rounds)}, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", "utf-8")


def _report(rounds: dict[str, list[Costs]]) -> dict[str, object]:
    report: dict[str, object] = {
        "rounds": len(rounds["command"]),
        "whole_s_allowed": _WHOLE_ALLOWED,
        "decoder_s_allowed": _DECODER_ALLOWED,
        "ratio_wanted": _RATIO_WANTED,
    }
    for clock in ("wall", "cpu"):
        chosen = {side: [_chosen(costs, clock) for costs in rounds[side]] for side in _SIDES}
        report[clock] = _section(chosen["command"], chosen["vlmport"], chosen["transformers"])
    return report


def _chosen(costs: Costs, clock: str) -> Seconds:
    return {name: round(getattr(cost, clock), 2) for name, cost in costs.items()}


def _section(whole: list[Seconds], ours: list[Seconds], theirs: list[Seconds]) -> dict[str, object]:
    # Our one decoder serves the prompt and single tokens. The strictest reading holds it, with the
    # embedding and all weights written, against the bare export of their graph for single tokens.
    alone = [{"language": one["decode, not saved"]} for one in theirs]
    return {
        "whole_s": _median(whole, "whole"),
        "whole_s_each": [one["whole"] for one in whole],
        "decoder_s": _median(ours, "decoder"),
        "decoder_s_each": [one["decoder"] for one in ours],
        "vlmport_s": {name: _median(ours, name) for name in ours[0]},
        "transformers_s": {name: _median(theirs, name) for name in theirs[0]},
        "ratio": {part: _ratio(ours, theirs, [part]) for part in _PARTS},
        "ratio_all_parts": _ratio(ours, theirs, _PARTS),
        "ratio_to_decode_graph_alone": _ratio(ours, alone, ["language"]),
    }


def _ratio(ours: list[Seconds], theirs: list[Seconds], parts: Sequence[str]) -> float:
    """Median over the rounds of theirs / ours, each the sum of some parts."""
    pairs = zip(ours, theirs, strict=True)
    return round(
        statistics.median(sum(b[p] for p in parts) / sum(a[p] for p in parts) for a, b in pairs), 2
    )


def _median(rounds: list[Seconds], name: str) -> float:
    return round(statistics.median(one[name] for one in rounds), 2)


def _in_own_process(folder: Path, side: str) -> Costs:
    command = [sys.executable, __file__, "--folder", str(folder), "--measure", side]
    subprocess.run(command, check=True, stdout=sys.stderr)
    content: dict[str, list[float]] = json.loads(_result_file(folder, side).read_text("utf-8"))
    return {name: Cost(*cost) for name, cost in content.items()}


def _result_file(folder: Path, side: str) -> Path:
    return folder / f"costs-{side}.json"


def _measure_command(folder: Path) -> Costs:
    """`vlmport export` as a user runs it: a fresh process, with its imports."""
    arguments = ["export", str(folder / "checkpoint"), str(folder / "bundle"), "--overwrite"]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "vlmport", *arguments], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("vlmport export failed")
    wall = time.perf_counter() - started
    shutil.rmtree(folder / "bundle")
    return {"whole": Cost(wall, usage.ru_utime + usage.ru_stime)}


def _measure_vlmport(folder: Path) -> Costs:
    """Each graph of a bundle: trace, passes, and writing it with its weights."""
    from vlmport.api.export import traced_graph
    from vlmport.export.family import plan_checkpoint
    from vlmport.export.stream import save_graph

    target = folder / "ours"
    target.mkdir(exist_ok=True)
    reading, (_, plan) = _timed(lambda: plan_checkpoint(folder / "checkpoint"))
    costs = {"reading the checkpoint": reading}
    for graph in plan.graphs:
        tracing, model = _timed(functools.partial(traced_graph, graph))
        path = target / f"{graph.name}.onnx"
        save = functools.partial(save_graph, model, path, plan.store, lambda _: None)
        costs[graph.name] = tracing + _timed(save)[0]
        costs[f"{graph.name}, not saved"] = tracing
    costs["language"] = costs["embed_tokens"] + costs["decoder"]
    shutil.rmtree(target)
    return costs


def _measure_transformers(folder: Path) -> Costs:
    """Each part as transformers.exporters exports and saves it."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    components: list[Cost] = []

    class TimedExporter(OnnxExporter):
        def export_program(self, *arguments: Any, **options: Any) -> Any:
            cost, result = _timed(lambda: OnnxExporter.export_program(self, *arguments, **options))
            components.append(cost)
            return result

    model, config = _pytorch_model(), OnnxConfig(dynamic=True)
    exporter = cast("Any", TimedExporter)()
    pixels = torch.randn(2, 3, 336, 336)
    features = {"image_features": torch.randn(2, _IMAGE_TOKENS, 768)}
    ids = torch.tensor([[1, *([_IMAGE_TOKEN] * _IMAGE_TOKENS), 5, 6, 7]] * 2)
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    whole_tower = {"pixel_values": pixels, "output_hidden_states": True}
    exports: dict[str, Callable[[], Any]] = {
        "vision_encoder": lambda: exporter.export(tower, whole_tower, config),
        "projector": lambda: exporter.export(projector, features, config),
        "language": lambda: exporter.export_for_generation(model, asked, config),
    }
    costs: Costs = {}
    for part, run in exports.items():
        components.clear()
        exporting, exported = _timed(run)
        writing, _ = _timed(functools.partial(exported.save_pretrained, folder / "theirs"))
        costs[part] = exporting + writing
        costs[f"{part}, not saved"] = exporting
        shutil.rmtree(folder / "theirs")
        if len(components) > 1:
            named = zip(exported.components, components, strict=True)
            costs |= {f"{name}, not saved": cost for name, cost in named}
    return costs


def _pytorch_model() -> Any:
    """The same model in transformers' own class; weights are drawn by its initialisation."""
    import transformers

    config = transformers.LlavaConfig(
        text_config=transformers.AutoConfig.for_model(**LLAMA_12X768.text),
        vision_config=transformers.AutoConfig.for_model(**LLAMA_12X768.vision),
        image_token_index=_IMAGE_TOKEN,
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def _timed(run: Callable[[], Any]) -> tuple[Cost, Any]:
    started, started_cpu = time.perf_counter(), time.process_time()
    result = run()
    return Cost(time.perf_counter() - started, time.process_time() - started_cpu), result


def _environment() -> dict[str, object]:
    import onnxscript
    import transformers

    return {
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxscript": onnxscript.__version__,
    }


_SIDES = {
    "command": _measure_command,
    "vlmport": _measure_vlmport,
    "transformers": _measure_transformers,
}

if __name__ == "__main__":
    main()
