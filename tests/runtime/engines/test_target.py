from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vlmport.contract_engines import BuildOptions
from vlmport.errors import EngineError
from vlmport.runtime.device.cuda import Device, find_device
from vlmport.runtime.engines import target as module
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.target import choose_target

IMAGINED = Device("Imagined 9000", (8, 9), 24 << 30, (13, 0), (13, 0))
NOT_ASKED: Any = SimpleNamespace()  # the full TensorRT is not asked what it can build for


def options(backend: Any, *capabilities: str) -> BuildOptions:
    return BuildOptions(backend, 1, 64, 64, 1, tuple(capabilities))


def rtx(*capabilities: str) -> str:
    wanted = options("tensorrt-rtx", *capabilities)
    return choose_target(load_bindings("tensorrt-rtx"), wanted).capability


def test_rtx_is_portable_unless_it_is_told() -> None:
    assert rtx() == "portable"
    assert rtx("8.9") == "sm89"
    assert rtx("12.0", "8.6") == "sm86+sm120"


@pytest.mark.parametrize(
    ("wanted", "found"),
    [(("9.0",), "found 9.0"), (("sm89",), "found sm89"), (("8.9",) * 2, "twice")],
)
def test_an_unknown_capability_is_refused(wanted: tuple[str, ...], found: str) -> None:
    with pytest.raises(EngineError, match=rf"{found}.*available are 7\.5, 8\.0, 8\.6, 8\.9, 12\.0"):
        rtx(*wanted)


def test_full_tensorrt_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_device", lambda: None)
    with pytest.raises(EngineError, match=r"tensorrt: found no GPU.*--backend tensorrt-rtx"):
        choose_target(NOT_ASKED, options("tensorrt"))


def test_full_tensorrt_builds_for_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_device", lambda: IMAGINED)
    found = choose_target(NOT_ASKED, options("tensorrt", "8.9"))
    assert (found.capability, found.names, found.device) == ("sm89", (), "Imagined 9000")
    with pytest.raises(EngineError, match=r"12\.0: TensorRT builds for the GPU at hand alone"):
        choose_target(NOT_ASKED, options("tensorrt", "12.0"))


@pytest.mark.gpu
@pytest.mark.skipif(find_device() is None, reason="would have compared the GPU's name")
def test_the_gpu_at_hand_has_a_name() -> None:
    device = find_device()
    assert device is not None
    assert device.name
    assert device.capability >= (7, 5)
