"""What a benchmark does on a GPU, over the emulated one: no speed of it means anything."""

from __future__ import annotations

from pathlib import Path

from support.emulated_cuda import EmulatedCuda
from support.emulated_engines import build_emulated, default_options, open_emulated

from vlmport.api.bench_contenders import BundleContender, TellsWaiting
from vlmport.api.bench_device import DeviceMemory, GpuBandwidth
from vlmport.api.bench_prompts import PromptMaker
from vlmport.manifest import load_manifest
from vlmport.runtime.device.cuda import Cuda
from vlmport.runtime.device.memory import DeviceBuffer


def test_a_copy_on_the_gpu_is_timed_and_counts_twice() -> None:
    probe = GpuBandwidth(1 << 20, Cuda(EmulatedCuda(1 << 24)))
    assert probe.measure() == 2 * (1 << 20) / 0.0005  # all events are 0.5 ms apart there
    assert "1 MiB on the GPU" in probe.method


def test_what_others_take_meanwhile_is_not_counted() -> None:
    cuda = Cuda(EmulatedCuda(1 << 24))
    memory = DeviceMemory(cuda)
    own = DeviceBuffer(cuda, 1 << 20, "own")
    memory.note()
    others = DeviceBuffer(cuda, 1 << 22, "of another process")
    memory.begin()
    more = DeviceBuffer(cuda, 1 << 19, "own")
    memory.note()
    assert memory.most == (1 << 20) + (1 << 19)
    memory.begin()
    more.close()
    own.close()
    memory.note()
    assert memory.most == (1 << 20) + (1 << 19)
    others.close()


def test_host_time_of_an_engine_is_less_than_its_step(trained_bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(trained_bundle)
    build_emulated(trained_bundle, tmp_path / "engines", default_options(manifest))
    opened = open_emulated(trained_bundle, tmp_path / "engines")
    assert isinstance(opened.backend, TellsWaiting)
    contender = BundleContender(opened.model)
    prompt = PromptMaker(trained_bundle, manifest).make(0, 48, 5)
    timing = contender.decode(prompt, batch=2, steps=4)
    assert timing.host_seconds is not None
    pairs = list(zip(timing.host_seconds, timing.step_seconds, strict=True))
    # The emulated GPU works while the host waits for it.
    assert all(0 < host < step for host, step in pairs)
