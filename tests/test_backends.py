"""Backends by name: what a machine without a GPU says, and what options do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmport.backend_names import BACKENDS
from vlmport.errors import InputError, VlmportError
from vlmport.machine.gpus import GpuSearch
from vlmport.machine.requirements import Requirement, require_backend
from vlmport.manifest import load_manifest
from vlmport.runtime import VisionLanguageModel
from vlmport.runtime.backends.opening import open_backend

RunCli = Callable[..., tuple[int, str, str]]

CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "tinyllava"
OF_GPUS = BACKENDS[1:]
MODULES = {
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt-rtx": "module onnxruntime_ep_nv_tensorrt_rtx",
    "tensorrt": "module tensorrt:",
    "tensorrt-rtx": "module tensorrt_rtx:",
}
NO_DRIVER = "no CUDA driver is installed (cudaGetDeviceCount answers cudaErrorInsufficientDriver)"


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, and none of the modules for one, whatever is installed here."""
    requirements = "vlmport.machine.requirements"
    monkeypatch.setattr(f"{requirements}.find_gpus", lambda: GpuSearch((), "", NO_DRIVER))
    monkeypatch.setattr(f"{requirements}.onnxruntime_providers", lambda: ["CPUExecutionProvider"])

    def fault(module: str) -> str:
        return "" if module == "onnxruntime" else "not installed"

    monkeypatch.setattr(f"{requirements}.import_fault", fault)


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize("backend", OF_GPUS)
@pytest.mark.parametrize("verb", ["generate", "evaluate", "parity"])
def test_a_machine_without_a_gpu_says_all_that_is_missing(
    run_cli: RunCli, trained_bundle: Path, tmp_path: Path, backend: str, verb: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A red circle. " * 50)
    arguments: dict[str, tuple[str | Path, ...]] = {
        "generate": (trained_bundle, "--prompt", "What is there?"),
        "evaluate": (trained_bundle, "--perplexity", text, "--window", "8"),
        "parity": (CHECKPOINT, trained_bundle),
    }
    code, out, err = run_cli(verb, *arguments[verb], "--backend", backend)
    assert (code, out) == (1, "")
    assert f"error: backend {backend}: missing on this machine: (1) " in err
    assert MODULES[backend] in err
    assert NO_DRIVER in err
    assert "see `vlmport doctor`" in err
    assert "Traceback" not in err
    assert ("engines: none for" in err) == backend.startswith("tensorrt")


@pytest.mark.parametrize("backend", OF_GPUS)
def test_this_machine_says_what_it_lacks(
    run_cli: RunCli, trained_bundle: Path, backend: str
) -> None:
    """The real libraries, not what a test makes of them."""
    from vlmport.machine.gpus import find_gpus

    if not find_gpus().fault:
        pytest.skip("found a GPU; without one, generate would have said that it is missing")
    code, out, err = run_cli("generate", trained_bundle, "--prompt", "Hi", "--backend", backend)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: backend {backend}: missing on this machine: ")
    assert "CUDA GPU: " in err


def test_an_unknown_backend_is_told_with_close_names(run_cli: RunCli, trained_bundle: Path) -> None:
    arguments = ("generate", trained_bundle, "--prompt", "Hi", "--backend", "tensor-rt")
    code, out, err = run_cli(*arguments)
    assert (code, out) == (1, "")
    assert "backend: found 'tensor-rt'; did you mean tensorrt" in err
    assert ", ".join(BACKENDS) in err


def test_the_default_backend_can_be_named(run_cli: RunCli, trained_bundle: Path) -> None:
    arguments = ("generate", trained_bundle, "--prompt", "Hi", "--max-new-tokens", "1", "--json")
    answers = [run_cli(*arguments, *more)[1] for more in ((), ("--backend", "onnxruntime"))]
    first, second = (json.loads(answer) for answer in answers)
    assert first["token_ids"] == second["token_ids"]
    assert first["backend"] == second["backend"] == "onnxruntime"


def test_engines_are_for_the_backends_that_have_some(trained_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="runs the graphs of the bundle; leave it out"):
        VisionLanguageModel.load(trained_bundle, engines=tmp_path)


@pytest.fixture
def full_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but engines seems to be there."""
    found = {backend: (lambda: Requirement("all", True, "yes"),) for backend in BACKENDS}
    monkeypatch.setattr("vlmport.machine.requirements._CHECKS", found)


@pytest.mark.usefixtures("full_machine")
def test_engines_are_looked_for_below_the_bundle_or_where_the_user_says(tmp_path: Path) -> None:
    with pytest.raises(
        VlmportError, match=r"\(1\) engines: none for tensorrt in .*/engines; build"
    ):
        require_backend("tensorrt", tmp_path)
    with pytest.raises(VlmportError, match=r"engines: no engine.json in .*/elsewhere; build them"):
        require_backend("tensorrt", tmp_path, tmp_path / "elsewhere")
    rtx = tmp_path / "engines" / "tensorrt-rtx-1.7-portable"
    rtx.mkdir(parents=True)
    (rtx / "engine.json").touch()
    require_backend("tensorrt-rtx", tmp_path)
    require_backend("tensorrt-rtx", tmp_path / "other", rtx)
    # The engines of tensorrt-rtx are none of tensorrt.
    with pytest.raises(VlmportError, match="engines: none for tensorrt in"):
        require_backend("tensorrt", tmp_path)


@pytest.mark.usefixtures("full_machine")
def test_worker_threads_are_for_onnxruntime_alone(trained_bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(trained_bundle)
    (tmp_path / "engine.json").touch()
    options: dict[str, Any] = {"threads": 2, "engines": tmp_path}
    with pytest.raises(InputError, match="threads: found 2; the backend tensorrt has no worker"):
        open_backend("tensorrt", trained_bundle, manifest, **options)
