"""Names that the loop uses of TensorRT, and shapes that an engine does not take."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import tensorrt_rtx
from support.emulated_cuda import EmulatedCuda
from support.emulated_engines import build_emulated, default_options, open_emulated

from vlmport.engine_manifest import load_engine_set
from vlmport.errors import EngineError
from vlmport.manifest import load_manifest
from vlmport.runtime.device.cuda import Cuda
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.limits import check_shapes, largest_length, profile_of
from vlmport.runtime.engines.opening import load_engines

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.contract_engines import Engine

# What is called on objects. mypy compares the same code with the stubs of full TensorRT.
USED = {
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "create_execution_context",
        "create_runtime_config",
        "device_memory_size_v2",
        "get_aliased_input_tensor",
        "get_tensor_dtype",
        "get_tensor_location",
        "get_tensor_name",
        "num_io_tensors",
        "num_optimization_profiles",
    ),
    "IRuntimeConfig": (
        "dynamic_shapes_kernel_specialization_strategy",
        "set_execution_context_allocation_strategy",
    ),
    "IExecutionContext": (
        "execute_async_v3",
        "get_tensor_shape",
        "infer_shapes",
        "is_stream_capturable",
        "set_device_memory",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    ),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
}


def test_tensorrt_rtx_has_every_name() -> None:
    module: Any = tensorrt_rtx
    missing = [
        f"{kind}.{name}"
        for kind, names in USED.items()
        for name in names
        if not hasattr(getattr(module, kind), name)
    ]
    assert missing == []


@pytest.fixture(scope="module")
def folder(trained_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("engines") / "engines"
    build_emulated(trained_bundle, target, default_options(load_manifest(trained_bundle)))
    return target


@pytest.fixture
def decoder(folder: Path) -> Engine:
    return load_engine_set(folder).engine("decoder")


def test_the_real_tensorrt_says_why_it_does_not_load_a_file(
    trained_bundle: Path, folder: Path
) -> None:
    bindings = load_bindings("tensorrt-rtx")
    manifest = load_manifest(trained_bundle)
    with pytest.raises(
        EngineError, match=r"TensorRT does not load it \(.+\); the file is a plan of version"
    ):
        load_engines(folder, load_engine_set(folder), manifest, bindings, Cuda(EmulatedCuda()))


def shapes_of(engine: Engine, batch: int = 2, tokens: int = 3) -> dict[str, tuple[int, ...]]:
    lengths = {"batch": batch, "sequence_length": tokens}
    return {
        port.name: tuple(axis if isinstance(axis, int) else lengths[axis] for axis in port.shape)
        for port in engine.inputs
    }


def test_shapes_inside_of_the_profile_pass(decoder: Engine) -> None:
    index, prefill = profile_of(decoder, "prefill")
    check_shapes(decoder, prefill, shapes_of(decoder))
    assert (index, largest_length(decoder, prefill, "inputs_embeds", 1)) == (0, 32)
    assert largest_length(decoder, prefill, "inputs_embeds", 2) == 128
    assert profile_of(decoder, "decode")[0] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 5}, r"decoder: found batch 5 .*profile prefill takes 1 to 4; .*--max-batch 5`"),
        (
            {"tokens": 33},
            r"decoder: found sequence_length 33 \(axis 1 of inputs_embeds\); .*--prefill-chunk 33`",
        ),
    ],
)
def test_shapes_outside_of_the_profile(
    changes: dict[str, int], message: str, decoder: Engine
) -> None:
    _, prefill = profile_of(decoder, "prefill")
    with pytest.raises(EngineError, match=message):
        check_shapes(decoder, prefill, shapes_of(decoder, **changes))


def test_a_fixed_shape_is_compared(decoder: Engine) -> None:
    ports = tuple(replace(port, shape=(4, 4)) for port in decoder.inputs[:1])
    fixed = replace(decoder, inputs=ports)
    profile = replace(decoder.profiles[0], ranges=())
    with pytest.raises(EngineError, match=r"inputs_embeds has shape \(4, 5\); expected \(4, 4\)"):
        check_shapes(fixed, profile, {"inputs_embeds": (4, 5)})
    assert largest_length(fixed, profile, "inputs_embeds", 1) == 4


def test_a_profile_that_is_missing(decoder: Engine) -> None:
    with pytest.raises(EngineError, match="found the profiles prefill, decode; expected default"):
        profile_of(decoder, "default")


def test_shapes_that_contradict_each_other(trained_bundle: Path, folder: Path) -> None:
    found = open_emulated(trained_bundle, folder)
    context = found.backend._contexts.prefill
    shapes = shapes_of(context.engine) | {"write_indices": (1,)}
    with pytest.raises(EngineError, match=r"decoder: TensorRT refuses the shapes .*batch is 1 and"):
        context.set_shapes(shapes)
    found.backend.close()
