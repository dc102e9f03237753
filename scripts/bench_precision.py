"""Measures each precision against float32 on the CPU: decode, prefill, vision encoder, sizes.

All bundles are open at once and measured in turn in each round. The model is a synthetic LLaVA of
random float32 weights: Llama of 12 layers x 768 and a CLIP-like tower of 576 image tokens.

    python scripts/bench_precision.py --folder build/bench-precision
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from benching import (
    SETTLE_SECONDS,
    environment,
    median_decode_seconds,
    prefill_seconds,
    seconds,
)
from synthetic import LLAMA_12X768, write_checkpoint

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.api.quantize import QuantizeOptions, quantize
from vlmport.api.quantize_recipe import RecipeOptions
from vlmport.calibration.recipe import WeightMethod
from vlmport.runtime import VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable

_CONTEXT, _STEPS = 512, 32
_BLOCKS: tuple[Literal[32, 128], ...] = (32, 128)


@dataclass(frozen=True, slots=True)
class _Variant:
    """A bundle of the comparison, and the ratios to float32 that issue 4 of the project asks for.

    Attributes:
        name: folder of the bundle.
        recipe: how it is made; None for the float32 one.
        wanted: quantity -> smallest ratio.
        size: largest share of the decoder's matrices in float32.
    """

    name: str
    recipe: RecipeOptions | None
    wanted: dict[str, float]
    size: float


_VARIANTS = (
    _Variant("fp32", None, {}, 1.0),
    _Variant(
        "int8",
        RecipeOptions("int8"),
        {"decode": 2.5, "prefill": 2.0, "vision_encoder": 1.6},
        0.27,
    ),
    _Variant("int8-weight-only", RecipeOptions("int8-weight-only"), {"decode": 2.5}, 0.27),
    *(  # random weights say nothing about accuracy: the quick way of rounding will do
        _Variant(
            f"int4-block{block}",
            RecipeOptions("int4", weights=WeightMethod("nearest", block)),
            {"decode": 4.0},
            0.16,
        )
        for block in _BLOCKS
    ),
)


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/bench-precision"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    models = {variant.name: _open(options.folder, variant) for variant in _VARIANTS}
    quantities: dict[str, Callable[[VisionLanguageModel], float]] = {
        "decode": lambda model: median_decode_seconds(model, _CONTEXT, _STEPS),
        "prefill": lambda model: prefill_seconds(model, _CONTEXT),
        "vision_encoder": _vision_seconds,
    }
    report: dict[str, object] = {"environment": environment(), "context": _CONTEXT}
    for quantity, measure in quantities.items():
        taken = _interleaved(models, measure, options.rounds)
        report[quantity] = {
            variant.name: {
                "ms": round(statistics.median(taken[variant.name]) * 1e3, 2),
                "times_fp32": round(_ratio(taken["fp32"], taken[variant.name]), 2),
                "wanted": variant.wanted.get(quantity),
            }
            for variant in _VARIANTS
        }
    whole = _decoder_bytes(models["fp32"])
    report["decoder_weights"] = {
        variant.name: {
            "share_of_fp32": round(_decoder_bytes(models[variant.name]) / whole, 4),
            "allowed": variant.size,
        }
        for variant in _VARIANTS
    }
    report["load_average_after"] = environment()["load_average"]
    print(json.dumps(report, indent=2))


def _open(folder: Path, variant: _Variant) -> VisionLanguageModel:
    checkpoint, bundle = folder / "checkpoint", folder / variant.name
    if not checkpoint.exists():
        write_checkpoint(checkpoint, LLAMA_12X768, "float32")
    if variant.recipe is None:
        export(ExportOptions(checkpoint, bundle, overwrite=True), SilentProgress())
    else:
        options = QuantizeOptions(
            folder / "fp32", bundle, variant.recipe, max_samples=8, overwrite=True
        )
        quantize(options, SilentProgress())
    return VisionLanguageModel.load(bundle, verify=False)


def _interleaved(
    models: dict[str, VisionLanguageModel],
    measure: Callable[[VisionLanguageModel], float],
    rounds: int,
) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        measure(model)  # the first run allocates
    for _ in range(rounds):
        for name, model in models.items():
            time.sleep(SETTLE_SECONDS)
            taken[name].append(measure(model))
    return taken


def _vision_seconds(model: VisionLanguageModel) -> float:
    shape = [
        1 if isinstance(axis, str) else axis
        for axis in model.manifest.graph("vision_encoder").inputs[0].shape
    ]
    pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    run = functools.partial(model.run, "vision_encoder", {"pixel_values": pixels})
    return min(seconds(run) for _ in range(3))


def _ratio(base: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(base, other, strict=True))


def _decoder_bytes(model: VisionLanguageModel) -> int:
    return model.manifest.graph("decoder").parameter_bytes


if __name__ == "__main__":
    main()
