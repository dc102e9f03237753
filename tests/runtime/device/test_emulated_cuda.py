"""The emulated GPU finds the misuse that it is there for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.device_scenarios import without_end
from support.emulated_cuda import EmulatedCuda, MisuseError
from support.emulated_engines import build_emulated, default_options, open_emulated
from support.loop_scenarios import loop_requests

from vlmport.manifest import load_manifest
from vlmport.runtime.device.capture import capture
from vlmport.runtime.device.cuda import Cuda, Event, Stream
from vlmport.runtime.device.memory import DeviceBuffer, PinnedBlock

if TYPE_CHECKING:
    from pathlib import Path

    from support.emulated_engines import EmulatedModel


def opened() -> tuple[EmulatedCuda, Cuda, Stream]:
    emulated = EmulatedCuda()
    cuda = Cuda(emulated)
    return emulated, cuda, Stream(cuda)


def test_memory_is_freed_once() -> None:
    _, cuda, _ = opened()
    address = cuda.allocate(100, "a test")
    cuda.call("cudaFree", address)
    with pytest.raises(MisuseError, match="freed twice"):
        cuda.call("cudaFree", address)


def test_copies_stay_in_one_live_allocation_of_their_kind() -> None:
    _, cuda, stream = opened()
    pinned = PinnedBlock(cuda, {"x": ("uint8", (300,))})
    buffer = DeviceBuffer(cuda, 300, "a test")
    with pytest.raises(MisuseError, match=r"301 bytes .* in no live device"):
        stream.copy_in(buffer.address, pinned.address, 301)
    with pytest.raises(MisuseError, match="are device memory, expected pinned"):
        stream.copy_in(buffer.address, buffer.address, 10)
    with pytest.raises(MisuseError, match="no live"):
        stream.clear(buffer.address + 10, 300)
    buffer.close()
    with pytest.raises(MisuseError, match="no live device"):
        stream.copy_in(buffer.address, pinned.address, 10)


def test_captured_work_does_not_outlive_its_memory() -> None:
    _, cuda, stream = opened()
    buffer = DeviceBuffer(cuda, 300, "a test")
    graph = capture(cuda, stream, lambda: stream.clear(buffer.address, 300))
    buffer.close()
    graph.launch(stream)
    with pytest.raises(MisuseError, match="no live device"):
        stream.synchronize()


def test_nothing_is_allocated_or_waited_for_while_a_stream_is_captured() -> None:
    _, cuda, stream = opened()
    event = Event(cuda)
    for queue in (
        DeviceBuffer(cuda, 10, "a test").close,
        lambda: DeviceBuffer(cuda, 10, "a test").close(),
        stream.synchronize,
        lambda: event.record(stream),
    ):
        with pytest.raises(MisuseError, match="captured"):
            capture(cuda, stream, queue)


@pytest.fixture
def model(trained_bundle: Path, tmp_path: Path) -> EmulatedModel:
    build_emulated(
        trained_bundle, tmp_path / "engines", default_options(load_manifest(trained_bundle))
    )
    found = open_emulated(trained_bundle, tmp_path / "engines")
    without_end(found.model)
    return found


def test_a_captured_run_keeps_its_shapes_and_addresses(model: EmulatedModel) -> None:
    model.model.generate_batch(loop_requests(1))
    assert model.cuda.captured == 1
    embed = model.backend._contexts.embed
    # Behind the back of the class that would have begun anew.
    embed._context.set_input_shape("input_ids", (2, 1))
    with pytest.raises(MisuseError, match="whose context has changed"):
        model.model.generate_batch(loop_requests(1))


def test_a_step_that_does_not_wait_is_seen(
    model: EmulatedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    [right] = model.model.generate_batch(loop_requests(1))
    monkeypatch.setattr(Event, "synchronize", lambda self: None)
    [wrong] = model.model.generate_batch(loop_requests(1))
    assert wrong.token_ids != right.token_ids


def test_outputs_in_place_share_their_address(model: EmulatedModel) -> None:
    model.model.generate_batch(loop_requests(1))
    context: Any = model.backend._contexts.decode._context
    elsewhere = DeviceBuffer(Cuda(model.cuda), 1 << 20, "a test")
    context.set_tensor_address("present_key_values.0.key", elsewhere.address)
    with pytest.raises(MisuseError, match=r"present_key_values\.0\.key .*overlap is False"):
        context.execute_async_v3(int(model.backend._running.stream))


def test_shapes_stay_in_the_profile_and_addresses_are_aligned(model: EmulatedModel) -> None:
    context: Any = model.backend._contexts.decode._context
    assert not context.set_input_shape("position_ids", (9, 1))
    with pytest.raises(MisuseError, match="aligned"):
        context.set_tensor_address("logits", 12345)
    with pytest.raises(MisuseError, match="no shape or no address"):
        context.execute_async_v3(int(model.backend._running.stream))
