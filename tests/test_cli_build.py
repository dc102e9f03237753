from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import RunCli

SMALL = ("--max-length", "64", "--max-batch", "2")


@pytest.fixture(scope="module")
def bundle(trained_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(trained_bundle, tmp_path_factory.mktemp("cli") / "bundle"))


def test_builds_and_says_what_it_built(bundle: Path, run_cli: RunCli) -> None:
    code, out, err = run_cli("build", bundle, *SMALL)
    assert code == 0
    assert "tensorrt-rtx" in out.splitlines()[0]
    assert "portable" in out.splitlines()[0]
    decoder = next(line for line in out.splitlines() if line.startswith("  decoder"))
    assert "attention: 0 fused, 4 decomposed; mask: lower_right, valid lengths" in decoder
    assert "decomposed: Attention operation was not supported by a dedicated kernel" in out
    assert "building decoder" in err
    assert "building" not in out

    code, out, err = run_cli("build", bundle, *SMALL)
    assert code == 0
    assert out.count("unchanged") == 6
    assert "building" not in err


def test_prints_one_json_object(bundle: Path, run_cli: RunCli, tmp_path: Path) -> None:
    run_cli("build", bundle, *SMALL)
    place = tmp_path / "cache"
    code, out, err = run_cli("build", bundle, *SMALL, "--json", "--timing-cache", place)
    content = json.loads(out)
    assert code == 0
    assert content["capability"] == "portable"
    assert {engine["graph"] for engine in content["engines"]} == set(content["reused"])
    assert Path(content["folder"]).is_dir()
    assert "note: " in err
    assert "uses no timing cache" in err


@pytest.mark.usefixtures("without_tensorrt")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-batch", "0"), "max_batch: found 0; expected 1 or more"),
        (("--max-length", "999999"), "max_length: found 999999; expected 1 to 2048"),
        (("--compute-capability", "1.0"), "found 1.0; available are 7.5"),
        (("--backend", "tensorrt"), "pip install 'vlmport[tensorrt]'"),
        (("--jobs", "0"), "jobs: found 0"),
    ],
)
def test_what_cannot_be_built_is_said(
    bundle: Path, run_cli: RunCli, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run_cli("build", bundle, *arguments)
    assert (code, out) == (1, "")
    assert message in " ".join(err.split())


def test_an_unknown_backend_is_wrong_usage(bundle: Path, run_cli: RunCli) -> None:
    assert run_cli("build", bundle, "--backend", "onnxruntime")[0] == 2


def test_ctrl_c_leaves_nothing(trained_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(trained_bundle, tmp_path / "bundle"))
    before = sorted(bundle.rglob("*"))
    command = [sys.executable, "-m", "vlmport", "build", str(bundle), *SMALL]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "building" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert sorted(bundle.rglob("*")) == before
