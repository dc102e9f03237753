"""The TensorRT backend on a real GPU: what tests/runtime/test_tensorrt_loop.py does on an emulated.

Nothing here has run on a GPU yet unless docs/measurements says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.device_scenarios import endless, without_end
from support.loop_scenarios import (
    check_answers,
    check_cancellation,
    check_full_context,
    check_interleaved,
    check_logits_path,
    check_many_generations,
    check_parity,
    check_sampling,
    check_stop_string,
    loop_requests,
)
from support.trained import EXAMPLES, exported, quantized
from tiny.recipes import RECIPES

from vlmport.api.build import build
from vlmport.api.build_options import build_options
from vlmport.api.parity_bundle import open_bundle
from vlmport.api.progress import SilentProgress
from vlmport.machine.requirements import requirements
from vlmport.manifest import load_manifest
from vlmport.runtime import VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlmport.contract_engines import TensorRTName

pytestmark = pytest.mark.gpu

FAMILIES = sorted(RECIPES)
BACKENDS: tuple[TensorRTName, ...] = ("tensorrt-rtx", "tensorrt")
# Precision -> the steps of `vlmport quantize` that make it of the float32 bundle.
QUANTIZED: dict[str, tuple[Any, ...]] = {
    "bf16": ("bf16",),
    "int8": ("int8",),
    "int8-weight-only": ("int8-weight-only",),
    "int4": ("int4",),
    "fp16-int4": ("fp16", "int4"),
}
MAX_LENGTH = 512
# A context compiles kernels for shapes that are new to it, and drivers give memory back in pieces.
SLACK = 64 << 20


def bundle_of(family: str, precision: str = "fp32") -> Path:
    """As others in this process ask for it, so that no bundle is exported twice."""
    return exported(family) if precision == "fp32" else exported(family, precision)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> TensorRTName:
    found: TensorRTName = request.param
    return found


def need(backend: TensorRTName, what: str) -> None:
    """Skips where a GPU or a module is missing, and says what would have run."""
    missing = [f"{one.name}: {one.found}" for one in requirements(backend) if not one.is_met]
    if missing:
        pytest.skip(f"{'; '.join(missing)}; would have compared {what} on {backend}")


@pytest.fixture
def on_gpu(backend: TensorRTName, tmp_path: Path) -> Callable[..., VisionLanguageModel]:
    """Builds the engines of a bundle and opens them; answers end at max_new_tokens alone."""

    def open_(bundle: Path, max_length: int = MAX_LENGTH) -> VisionLanguageModel:
        manifest = load_manifest(bundle)
        options = build_options(manifest, backend, max_batch=8, max_length=max_length)
        folder = tmp_path / f"engines-{bundle.name}-{max_length}"
        build(bundle, options, SilentProgress(), folder)
        return VisionLanguageModel.load(bundle, backend=backend, engines=folder)

    return open_


def used() -> int:
    from vlmport.runtime.device.cuda import load_cuda

    free, total = load_cuda().memory()
    return total - free


OnGpu = Any  # Callable[..., VisionLanguageModel]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_pytorch(
    family: str, precision: str, backend: TensorRTName, on_gpu: OnGpu
) -> None:
    need(backend, f"graphs, logits and tokens of {family} in {precision} with PyTorch's")
    bundle = bundle_of(family, precision)
    check_parity(on_gpu(bundle), EXAMPLES / family)


@pytest.mark.parametrize("precision", list(QUANTIZED))
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_tokens_equal_onnxruntime(
    family: str, precision: str, backend: TensorRTName, on_gpu: OnGpu, tmp_path: Path
) -> None:
    need(backend, f"tokens of {family} in {precision}, batch 1 and 8, with the CPU's")
    bundle = bundle_of(family)
    for step in QUANTIZED[precision]:
        bundle = quantized(family, bundle, step, tmp_path / str(step))
    found, expected = without_end(on_gpu(bundle)), without_end(open_bundle(bundle).model)
    for batch in (1, 8):
        check_answers(found, expected, loop_requests(batch))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scenarios(family: str, precision: str, backend: TensorRTName, on_gpu: OnGpu) -> None:
    need(
        backend,
        f"answers of {family} in {precision} with the CPU's: batch 1, 3 and 8, mixed lengths, "
        "stop strings, answers broken off and read in turns, seeds (float32)",
    )
    bundle = bundle_of(family, precision)
    found, expected = without_end(on_gpu(bundle)), endless(bundle)
    for batch in (1, 3, 8):
        check_answers(found, expected, loop_requests(batch))
    check_logits_path(found, loop_requests(3))
    check_cancellation(found, expected, used, SLACK)
    if precision == "fp32":  # in half precision near ties end an answer elsewhere
        check_interleaved(found, expected)
        check_stop_string(found, expected)
        check_sampling(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_fills_to_max_length(family: str, backend: TensorRTName, on_gpu: OnGpu) -> None:
    need(backend, f"an answer of {family} that fills the cache to its last row with the CPU's")
    bundle = bundle_of(family)
    check_full_context(without_end(on_gpu(bundle)), endless(bundle), MAX_LENGTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_thousand_generations_take_no_more_memory(
    family: str, backend: TensorRTName, on_gpu: OnGpu
) -> None:
    need(backend, f"the GPU's memory in use over 1000 generations of {family}")
    check_many_generations(without_end(on_gpu(bundle_of(family))), used, 1000, SLACK)


def test_decode_steps_are_captured(
    backend: TensorRTName, on_gpu: OnGpu, caplog: pytest.LogCaptureFixture
) -> None:
    need(backend, "whether decode steps can be captured into CUDA graphs")
    model = without_end(on_gpu(bundle_of("tinyllava")))
    model.generate_batch(loop_requests(2))
    assert "cannot be captured" not in caplog.text
