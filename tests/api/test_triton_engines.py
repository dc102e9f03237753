"""A repository builds its engines where it is, and refuses those of another place."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.triton_configs import (
    CHECKPOINTS,
    config_of,
    configs_of,
    dims_of,
    repository,
    type_of,
)

from vlmport.contract_engines import ENGINES_NAME, Engine
from vlmport.engine_manifest import load_engine_set
from vlmport.errors import EngineError
from vlmport.manifest import graphs_digest, load_manifest
from vlmport.runtime.device.cuda import Device
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.opening import find_engines
from vlmport.runtime.triton_build.command import main


def build(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the step without onnx and torch; the full TensorRT is not there."""
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]; "
        "sys.modules.update(dict.fromkeys(('onnx', 'onnx_ir', 'torch', 'tensorrt'))); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    path = str(folder / "build_engines.py")
    command = [sys.executable, "-I", "-B", "-c", program, path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


@pytest.fixture(scope="module", params=CHECKPOINTS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with its engines, built by TensorRT-RTX, which needs no GPU for that."""
    source = repository(request.param, "tensorrt")
    folder = tmp_path_factory.mktemp("triton") / "moved"
    shutil.copytree(source, folder)
    finished = build(folder, "--backend", "tensorrt-rtx")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("building ")
    return folder


def check_engine(folder: Path, graph: str, engine: Engine) -> None:
    """Compares what engine.json says with config.pbtxt, port by port."""
    config = config_of(folder / graph)
    for found, ports in ((config.input, engine.inputs), (config.output, engine.outputs)):
        assert [port.name for port in found] == [port.name for port in ports]
        for port, expected in zip(found, ports, strict=True):
            assert port.data_type == type_of(expected.dtype)
            assert list(port.dims) == dims_of(expected.shape, config.max_batch_size)
    for profile in engine.profiles:
        for ranges in profile.ranges:
            if config.max_batch_size:
                assert ranges.smallest[0] == 1
                assert ranges.largest[0] >= config.max_batch_size
            warmup = config.model_warmup[0].inputs[ranges.port].dims
            shape = [1] * bool(config.max_batch_size) + list(warmup)
            bounds = zip(ranges.smallest, shape, ranges.largest, strict=True)
            assert all(least <= length <= most for least, length, most in bounds)


def test_engines_agree_with_the_configurations(built: Path) -> None:
    configs = configs_of(built)
    graphs = [name for name, config in configs.items() if config.platform == "tensorrt_plan"]
    assert len(graphs) == len(configs) - 3
    for graph in graphs:
        version = built / graph / "1"
        engines = load_engine_set(version)  # also compares the size of model.plan
        assert [engine.graph for engine in engines.engines] == [graph]
        assert (version / "model.plan").read_bytes()[1:4] == b"trt"
        check_engine(built, graph, engines.engines[0])
        assert engines.version == load_bindings("tensorrt-rtx").__version__
    own = load_engine_set(built / "vlm/1/engines")
    names = [engine.graph for engine in own.engines]
    assert names == ["embed_tokens", "decoder", "select_greedy", "select_sampled"]
    assert own.options.max_batch == int(configs["vlm"].parameters["num_slots"].string_value)
    assert configs["vlm"].parameters["engines"].string_value == "engines"
    assert not [*(built / "vlm/1").glob(".engines*")]


def test_the_main_model_takes_its_engines(built: Path) -> None:
    """Those of the image graphs lie with the image models, and are not asked for."""
    home = built / "vlm/1"
    manifest = load_manifest(home / "bundle")
    version = load_bindings("tensorrt-rtx").__version__
    device = Device("a GPU", (8, 9), 1 << 34, (13, 0), (13, 0))
    place = home / "engines"
    folder, found = find_engines(
        home / "bundle", "tensorrt-rtx", version, device, place, manifest.image_graphs
    )
    assert folder == place
    assert found.graphs_sha256 == graphs_digest(manifest)
    wanted = {graph.name for graph in manifest.graphs} - set(manifest.image_graphs)
    assert {engine.graph for engine in found.engines} >= wanted
    with pytest.raises(
        EngineError, match=r"found engines for tensorrt-rtx .*; expected tensorrt-rtx 9\.9"
    ):
        find_engines(home / "bundle", "tensorrt-rtx", "9.9", device, place)


def run_here(home: Path, *arguments: str) -> int:
    """The same command in this process."""
    return main(home, ["--backend", "tensorrt-rtx", *arguments])


def test_building_again_does_nothing(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*.plan")}
    assert run_here(built / "vlm/1") == 0
    assert "are there already" in capsys.readouterr().out
    assert run_here(built / "vlm/1", "--check") == 0
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*.plan")} == before


def test_refuses_engines_that_do_not_fit(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "repository"))

    def refusal() -> str:
        assert run_here(folder / "vlm/1", "--check") == 1
        return capsys.readouterr().err

    place = folder / "projector" / "1" / ENGINES_NAME
    version = load_bindings("tensorrt-rtx").__version__
    text = place.read_text(encoding="utf-8")

    place.write_text(text.replace(f'"version": "{version}"', '"version": "9.9.9"'), "utf-8")
    message = refusal()
    assert "projector/1: found engines for tensorrt-rtx 9.9.9 on portable" in message
    assert f"expected tensorrt-rtx {version} on portable; run build_engines.sh" in message

    place.write_text(text.replace('"capability": "portable"', '"capability": "sm90"'), "utf-8")
    assert f"found engines for tensorrt-rtx {version} on sm90; expected" in refusal()

    place.write_text(text, "utf-8")
    plan = folder / "projector" / "1" / "model.plan"
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    assert "model.plan: its content is not what engine.json says" in refusal()

    place.unlink()
    assert "projector/1: found no engines; run build_engines.sh" in refusal()
    step = folder / "vlm/1/engine_step.json"
    other = json.loads(step.read_text(encoding="utf-8"))
    other["graphs"][-1]["digest"] = "0" * 64
    step.write_text(json.dumps(other), encoding="utf-8")
    assert "select_sampled.engine: found an engine of another graph" in refusal()


def test_says_what_is_missing(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(repository("fuyu", "tensorrt"), tmp_path / "repository"))
    finished = build(folder, "--check", "--backend", "tensorrt-rtx")
    assert finished.returncode == 1
    assert "vlm/1/engines: found no engines" in finished.stderr
    finished = build(folder)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: tensorrt: not installed")
    assert not [*folder.rglob("*.plan")]


def test_refuses_a_damaged_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("{}", "no JSON", None):
        if content is not None:
            (tmp_path / "engine_step.json").write_text(content, encoding="utf-8")
        else:
            (tmp_path / "engine_step.json").unlink()
        assert run_here(tmp_path) == 1
        words = "write the repository again with `vlmport triton --backend tensorrt`"
        assert words in capsys.readouterr().err


def test_an_interrupt_leaves_no_engines(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(repository("fuyu", "tensorrt"), tmp_path / "repository"))
    command = [sys.executable, str(folder / "build_engines.py"), "--backend", "tensorrt-rtx"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "building" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert not [*folder.rglob("*.plan")]
    assert not [*folder.rglob("*.engine")]
    assert not [*(folder / "vlm/1").glob(".engines*")]
