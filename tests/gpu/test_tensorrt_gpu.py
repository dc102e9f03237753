"""The TensorRT backend on a real GPU: what tests/runtime/test_tensorrt_loop.py does on an emulated.

Nothing here has run on a GPU yet unless docs/measurements says so.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.device_scenarios import endless, without_end
from support.loop_scenarios import (
    SAMPLED,
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
from support.slot_scenarios import check_slots
from support.trained import EXAMPLES, exported, quantized
from tiny.recipes import RECIPES

from vlmport.api.build import build
from vlmport.api.build_options import build_options
from vlmport.api.parity_bundle import open_bundle
from vlmport.api.progress import SilentProgress
from vlmport.api.tolerances import near_tie_margin, tolerance_for
from vlmport.machine.requirements import requirements
from vlmport.manifest import load_manifest
from vlmport.runtime import SamplingOptions, VisionLanguageModel
from vlmport.runtime.backends.tensorrt import TensorRTBackend
from vlmport.runtime.backends.tensorrt_selection import GreedySelection, SampledSelection

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


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, TensorRTName], Path]:
    """Builds the engines of a bundle, once for all tests of a process that ask for them."""
    top = tmp_path_factory.mktemp("engines")
    built: dict[tuple[Path, TensorRTName], Path] = {}

    def build_(bundle: Path, backend: TensorRTName) -> Path:
        key = (bundle, backend)
        if key not in built:
            options = build_options(
                load_manifest(bundle), backend, max_batch=8, max_length=MAX_LENGTH
            )
            folder = top / str(len(built))
            build(bundle, options, SilentProgress(), folder)
            built[key] = folder
        return built[key]

    return build_


@pytest.fixture
def on_gpu(
    backend: TensorRTName, engines: Callable[[Path, TensorRTName], Path]
) -> Iterator[Callable[[Path], VisionLanguageModel]]:
    """Opens the engines of a bundle; at the end their memory is given back."""
    with ExitStack() as opened:

        def open_(bundle: Path) -> VisionLanguageModel:
            folder = engines(bundle, backend)
            found = VisionLanguageModel.load(bundle, backend=backend, engines=folder)
            opened.callback(backend_of(found).close)
            return found

        yield open_
    gc.collect()  # contexts and engines go with the last who holds them


def backend_of(model: VisionLanguageModel) -> TensorRTBackend:
    found = model._backend
    assert isinstance(found, TensorRTBackend)
    return found


def need_the_gpu_alone(what: str) -> None:
    """Skips where other processes of the same run use the GPU: its memory is counted as a whole."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip(f"other tests use the GPU; with -n 0 it would have measured {what}")


def used() -> int:
    """Bytes of the GPU's memory in use, by whomever."""
    from vlmport.runtime.device.cuda import load_cuda

    free, total = load_cuda().memory()
    return total - free


OnGpu = Any  # Callable[[Path], VisionLanguageModel]


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
        "stop strings, answers read in turns, seeds (float32)",
    )
    bundle = bundle_of(family, precision)
    found, expected = without_end(on_gpu(bundle)), endless(bundle)
    for batch in (1, 3, 8):
        check_answers(found, expected, loop_requests(batch))
    check_logits_path(found, loop_requests(3))
    if precision == "fp32":  # in half precision near ties end an answer elsewhere
        check_interleaved(found, expected)
        check_stop_string(found, expected)
        check_sampling(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_answer_as_a_sequence_alone(
    family: str, backend: TensorRTName, on_gpu: OnGpu
) -> None:
    need(backend, f"answers of {family} in slots, joining and leaving, with the CPU's alone")
    bundle = bundle_of(family)
    found, expected = without_end(on_gpu(bundle)), endless(bundle)
    limit = tolerance_for("logits", "float32").max_abs
    check_slots(
        *(found, expected),
        num_slots=8,
        cache_tokens=8 * MAX_LENGTH,
        margin=near_tie_margin(limit),
        count=100,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_fills_to_max_length(family: str, backend: TensorRTName, on_gpu: OnGpu) -> None:
    need(backend, f"an answer of {family} that fills the cache to its last row with the CPU's")
    bundle = bundle_of(family)
    check_full_context(without_end(on_gpu(bundle)), endless(bundle), MAX_LENGTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_are_broken_off_keep_no_memory(
    family: str, backend: TensorRTName, on_gpu: OnGpu
) -> None:
    what = f"the GPU's memory in use after answers of {family} that were broken off"
    need(backend, what)
    need_the_gpu_alone(what)
    bundle = bundle_of(family)
    found, expected = without_end(on_gpu(bundle)), endless(bundle)
    # Kernels are compiled and loaded, and a step is captured, in the first answer.
    check_answers(found, expected, loop_requests(1, max_new_tokens=16))
    check_cancellation(found, expected, used, SLACK)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_thousand_generations_take_no_more_memory(
    family: str, backend: TensorRTName, on_gpu: OnGpu
) -> None:
    what = f"the GPU's memory in use over 1000 generations of {family}"
    need(backend, what)
    need_the_gpu_alone(what)
    check_many_generations(without_end(on_gpu(bundle_of(family))), used, 1000, SLACK)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_steps_are_captured(
    family: str,
    precision: str,
    backend: TensorRTName,
    on_gpu: OnGpu,
    caplog: pytest.LogCaptureFixture,
) -> None:
    need(backend, f"whether decode steps of {family} in {precision} become CUDA graphs")
    model = without_end(on_gpu(bundle_of(family, precision)))
    for sampling in (SamplingOptions(), SAMPLED[3]):
        model.generate_batch([replace(one, sampling=sampling) for one in loop_requests(2)])
    assert "cannot be captured" not in caplog.text
    state = backend_of(model)._idle
    assert state is not None
    assert {kind: step._graph is None for kind, step in state._steps.items()} == {
        GreedySelection: False,
        SampledSelection: False,
    }
