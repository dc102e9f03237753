"""Rows of a cache by their addresses, beside numpy: on the host and on an emulated GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from support.emulated_cuda import EmulatedCuda

from vlmport.contract import KVLayout
from vlmport.errors import EngineError
from vlmport.runtime.device.cuda import Cuda, Stream, Strided
from vlmport.runtime.device.memory import DeviceBuffer
from vlmport.runtime.device.row_memory import GpuRowMemory, HostRowMemory
from vlmport.runtime.device.slot_rows import SlotRows
from vlmport.runtime.device.transfer import Transfer

LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, head_dim=4, dtype="float16")
SLOTS, CAPACITY = 3, 10


@dataclass
class Placed:
    """Caches of known content; `read` gives [4, slots, heads, capacity, head_dim]."""

    rows: SlotRows
    content: NDArray[np.float16]
    read: Callable[[], NDArray[np.floating]]

    def check(self) -> None:
        np.testing.assert_array_equal(self.read(), self.content)


@pytest.fixture(params=["host", "gpu", "gpu in another stream"])
def placed(request: pytest.FixtureRequest) -> Iterator[Placed]:
    shape = (2 * LAYOUT.num_layers, SLOTS, LAYOUT.num_kv_heads, CAPACITY, LAYOUT.head_dim)
    content = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    size = content[0].nbytes
    if request.param == "host":
        array = content.copy()
        addresses = [cache.ctypes.data for cache in array]
        yield Placed(SlotRows(HostRowMemory(), addresses, LAYOUT, CAPACITY), content, array.copy)
        return
    emulated = EmulatedCuda()
    cuda = Cuda(emulated)
    with ExitStack() as held:
        stream = Stream(cuda)
        held.callback(stream.close)
        transfer = Transfer(cuda, stream)
        held.callback(transfer.close)
        buffer = held.enter_context(DeviceBuffer(cuda, content.nbytes, "the caches"))
        transfer.upload(content, "float16", buffer.address)
        stream.synchronize()
        other = Stream(cuda)
        held.callback(other.close)
        waits = request.param != "gpu"
        memory = GpuRowMemory(cuda, other if waits else stream, waits=waits)
        addresses = [buffer.address + index * size for index in range(len(content))]
        rows = SlotRows(memory, addresses, LAYOUT, CAPACITY)
        yield Placed(rows, content, lambda: transfer.download(buffer.address, "float16", shape))
    del rows, memory
    gc.collect()
    assert emulated.leaks() == []


def test_first_tokens_are_copied_between_slots(placed: Placed) -> None:
    placed.rows.copy(2, 0, 7)
    placed.content[:, 0, :, :7] = placed.content[:, 2, :, :7]
    placed.check()


def test_tokens_are_stored_and_loaded_in_part(placed: Placed) -> None:
    stored = placed.rows.save(1, 6)
    saved = placed.content[:, 1, :, :6].copy()
    assert (len(stored), stored.num_bytes) == (6, saved.nbytes)
    placed.rows.clear(1)
    placed.content[:, 1] = 0
    placed.check()
    placed.rows.load(2, stored, 4)
    placed.content[:, 2, :, :4] = saved[:, :, :4]
    placed.check()


def test_pieces_that_overlap_are_refused() -> None:
    emulated = EmulatedCuda()
    cuda = Cuda(emulated)
    stream = Stream(cuda)
    with (
        DeviceBuffer(cuda, 64, "a test") as buffer,
        pytest.raises(EngineError, match="cudaMemcpy2DAsync answered cudaErrorInvalidPitchValue"),
    ):
        stream.copy_strided(Strided(buffer.address, 4), Strided(buffer.address + 32, 4), 8, 2)
    stream.close()
