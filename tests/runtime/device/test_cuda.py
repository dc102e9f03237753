"""The layer over cuda-python: on an emulated GPU, and on this machine whatever it has."""

from __future__ import annotations

import gc
import importlib
import sys
from typing import TYPE_CHECKING, Any

import cuda.bindings.runtime as cuda_runtime
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.emulated_cuda import EmulatedCuda

from vlmport.errors import EngineError
from vlmport.runtime.device.capture import capture
from vlmport.runtime.device.cuda import FUNCTIONS, Cuda, CudaError, Event, Stream, load_cuda
from vlmport.runtime.device.memory import DeviceBlock, DeviceBuffer, PinnedBlock, Workspace
from vlmport.runtime.device.sizes import in_words
from vlmport.runtime.device.transfer import Transfer, from_device_form, to_device_form

if TYPE_CHECKING:
    from numpy.typing import NDArray

CUDA_ERRORS = cuda_runtime.cudaError_t


def opened(**options: Any) -> tuple[EmulatedCuda, Cuda, Stream]:
    emulated = EmulatedCuda(**options)
    cuda = Cuda(emulated)
    return emulated, cuda, Stream(cuda)


def test_every_function_that_is_used_exists() -> None:
    assert [name for name in FUNCTIONS if not hasattr(cuda_runtime, name)] == []
    assert [name for name in FUNCTIONS if not hasattr(EmulatedCuda, name)] == []


def test_a_machine_without_a_gpu_is_told_what_it_lacks() -> None:
    error, count = cuda_runtime.cudaGetDeviceCount()
    if error == CUDA_ERRORS.cudaSuccess and count:
        assert load_cuda().device().memory > 0
        return
    with pytest.raises(EngineError, match=r"(NVIDIA driver|GPU): found .*; expected .*onnxruntime"):
        load_cuda()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            CUDA_ERRORS.cudaErrorInsufficientDriver,
            r"NVIDIA driver: found none \(cudaErrorInsufficientDriver\); expected one for CUDA 13",
        ),
        (CUDA_ERRORS.cudaErrorNoDevice, r"GPU: found none \(cudaErrorNoDevice\); .*nvidia-smi"),
    ],
)
def test_what_is_missing_is_named(error: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Cuda(EmulatedCuda(count_error=error))


def test_an_old_driver_is_named() -> None:
    emulated = EmulatedCuda(count_error=CUDA_ERRORS.cudaErrorInsufficientDriver)
    emulated.driver = 12040
    with pytest.raises(EngineError, match=r"driver: found one for CUDA 12\.4 .* CUDA 13 or"):
        Cuda(emulated)


def test_cuda_python_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(EngineError, match=r"cuda: not installed; .*pip install 'vlmport\[gpu\]'"):
        load_cuda()
    monkeypatch.undo()
    importlib.import_module("cuda.bindings.runtime")


def test_the_gpu_describes_itself() -> None:
    device = opened(capability=(12, 0), memory=1 << 33)[1].device()
    assert (device.name, device.tag, device.memory) == ("Emulated GPU", "sm120", 1 << 33)
    assert (device.driver, device.runtime) == ((13, 2), (13, 2))


def test_failing_calls_name_the_error() -> None:
    _, cuda, stream = opened(captures=False)
    with pytest.raises(CudaError, match=r"cudaStreamBeginCapture answered cudaErrorStreamCapture"):
        capture(cuda, stream, lambda: None)


def test_too_little_memory_says_how_much_and_what_to_do() -> None:
    emulated, cuda, _ = opened(memory=5 << 20)
    kept = DeviceBuffer(cuda, 3 << 20, "something")
    with pytest.raises(
        EngineError,
        match=r"GPU memory: a large thing needs 3\.0 MiB; 2\.0 MiB of 5\.0 MiB are free; .*--max",
    ):
        DeviceBuffer(cuda, 3 << 20, "a large thing")
    kept.close()
    DeviceBuffer(cuda, 3 << 20, "a large thing").close()
    assert emulated.used == 0


def test_memory_goes_with_its_owner() -> None:
    emulated, cuda, _ = opened()
    with DeviceBuffer(cuda, 1000, "a test") as buffer:
        assert buffer.address % 256 == 0
        assert emulated.used == 1000
    buffer.close()  # a second time does nothing
    DeviceBuffer(cuda, 1000, "a test")
    PinnedBlock(cuda, {"x": ("int64", (3,))})
    gc.collect()
    assert emulated.leaks() == ["1 x stream"]


def test_blocks_hold_aligned_tensors() -> None:
    _, cuda, stream = opened()
    tensors = {"a": ("bool", (3,)), "b": ("float32", (2, 65)), "c": ("int64", (1,))}
    pinned, block = PinnedBlock(cuda, tensors), DeviceBlock(cuda, tensors, "a test")
    assert [field.offset for field in block.fields.values()] == [0, 256, 1024]
    pinned["b"][:] = np.arange(130).reshape(2, 65)
    pinned["a"][:] = True
    stream.copy_in(block.address, pinned.address, block.size)
    stream.synchronize()
    pinned["b"][:] = 0
    stream.copy_out(pinned.address_of("b"), block["b"], block.fields["b"].size)
    assert not pinned["b"].any()  # nothing was waited for
    stream.synchronize()
    assert pinned["b"].sum() == sum(range(130))


def test_a_workspace_grows_and_is_kept() -> None:
    emulated, cuda, _ = opened()
    workspace = Workspace(cuda)
    first = workspace.address("x", 100)
    assert workspace.address("x", 50) == first
    workspace.address("x", 200)
    assert emulated.used == 200
    workspace.close()
    assert emulated.used == 0


def test_events_mark_what_was_queued() -> None:
    _, cuda, stream = opened()
    with Event(cuda, timed=True) as start, Event(cuda, timed=True) as end:
        start.record(stream)
        end.record(stream)
        end.synchronize()
        assert end.elapsed_ms(start) >= 0


def test_transfers_wait_before_pinned_memory_is_used_again() -> None:
    _, cuda, stream = opened()
    transfer = Transfer(cuda, stream)
    buffer = DeviceBuffer(cuda, 1 << 12, "a test")
    arrays = [np.arange(length, dtype=np.float32) for length in (10, 40, 700, 3)]
    offsets = (0, 256, 512, 3584)  # the second array is larger, and fits into what is pinned
    for array, offset in zip(arrays, offsets, strict=True):
        transfer.upload(array, "float32", buffer.address + offset)
    for array, offset in zip(arrays, offsets, strict=True):
        found = transfer.download(buffer.address + offset, "float32", array.shape)
        assert (found == array).all()


def test_captured_work_runs_when_it_is_launched() -> None:
    emulated, cuda, stream = opened()
    pinned = PinnedBlock(cuda, {"x": ("int64", (1,))})
    block = DeviceBlock(cuda, {"x": ("int64", (1,)), "y": ("int64", (1,))}, "a test")

    def queue() -> None:
        stream.copy_in(block["x"], pinned.address, 8)
        stream.copy(block["y"], block["x"], 8)
        stream.copy_out(pinned.address, block["y"], 8)

    graph = capture(cuda, stream, queue)
    stream.clear(block.address, block.size)
    for value in (7, 8):
        pinned["x"][:] = value
        graph.launch(stream)
        stream.synchronize()
        assert pinned["x"] == value
    graph.close()
    assert "1 x executable graph" not in emulated.leaks()


def test_a_capture_that_fails_ends() -> None:
    emulated, cuda, stream = opened()

    def queue() -> None:
        raise EngineError("refused")

    with pytest.raises(EngineError, match="refused"):
        capture(cuda, stream, queue)
    stream.synchronize()  # is captured no more
    assert emulated.leaks() == ["1 x stream"]


def test_garbage_is_not_collected_in_the_middle_of_a_capture() -> None:
    emulated, cuda, stream = opened()
    block = DeviceBlock(cuda, {"x": ("int64", (1,))}, "a test")
    held = [DeviceBuffer(cuda, 10, "a test")]

    def queue() -> None:
        ring: list[Any] = [held.pop()]
        ring.append(ring)
        del ring
        kept = [[index] for index in range(50)]  # enough new objects for a collection
        stream.clear(block["x"], 8 * len(kept[0]))

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        graph = capture(cuda, stream, queue)
    finally:
        gc.set_threshold(*thresholds)
    assert gc.isenabled()
    graph.close()
    gc.collect()
    assert emulated.used == block.size  # in a capture it could not have been freed


def bfloat16(bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    values = bits.view(np.float32)
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_bfloat16_rounds_as_ml_dtypes_does(integers: list[int]) -> None:
    bits = np.array(integers, np.uint32)
    ours, theirs = to_device_form(bits.view(np.float32), "bfloat16"), bfloat16(bits)
    is_nan = np.isnan(bits.view(np.float32))
    assert (ours[~is_nan] == theirs[~is_nan]).all()
    back = from_device_form(ours.view(np.uint8), "bfloat16", ours.shape)
    assert np.isnan(back[is_nan]).all()
    assert (back[~is_nan] == theirs.view(ml_dtypes.bfloat16).astype(np.float32)[~is_nan]).all()


def test_bfloat16_of_the_host_passes_as_it_is() -> None:
    array = np.array([[1.5, -2.25]], ml_dtypes.bfloat16)
    assert (to_device_form(array, "bfloat16") == array.view(np.uint16)).all()


def test_sizes_are_told_in_words() -> None:
    assert [in_words(size) for size in (5, 2048, 3 << 20, 5 << 30)] == [
        "5 bytes",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]
