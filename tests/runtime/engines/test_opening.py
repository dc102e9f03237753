"""Which engines are taken, and what is said of those that cannot be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.emulated_cuda import EmulatedCuda
from support.emulated_engines import VERSION, build_emulated, default_options
from support.emulated_tensorrt import EmulatedTensorRT

from vlmport.contract_engines import ENGINES_FOLDER, ENGINES_NAME
from vlmport.engine_manifest import load_engine_set, save_engine_set
from vlmport.errors import EngineError
from vlmport.manifest import graphs_digest, load_manifest
from vlmport.runtime.device.cuda import Cuda, Device
from vlmport.runtime.engines.opening import find_engines, load_engines

if TYPE_CHECKING:
    from vlmport.contract_engines import EngineSet
    from vlmport.runtime.engines.opening import LoadedEngines

DEVICE = Device("Emulated GPU", (8, 9), 1 << 30, (13, 2), (13, 2))


@pytest.fixture(scope="module")
def built(trained_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "engines"
    build_emulated(trained_bundle, folder, default_options(load_manifest(trained_bundle)))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """Engines that a test may damage."""
    copy = tmp_path / "engines"
    shutil.copytree(built, copy)
    return copy


def beside(built: Path, bundle: Path, name: str, **changes: Any) -> Path:
    """Engines in a bundle's folder, for another version, GPU or backend."""
    target = bundle / ENGINES_FOLDER / name
    shutil.copytree(built, target)
    engines = load_engine_set(target)
    backend = changes.pop("backend", engines.options.backend)
    options = replace(engines.options, backend=backend)
    save_engine_set(target, replace(engines, options=options, **changes))
    return target


def find(bundle: Path, folder: Path | None = None) -> tuple[Path, EngineSet]:
    return find_engines(bundle, "tensorrt-rtx", VERSION, DEVICE, folder)


def load(
    bundle: Path, folder: Path, *, memory: int = 1 << 30, verify: bool = True
) -> LoadedEngines:
    cuda = EmulatedCuda(memory)
    bindings: Any = EmulatedTensorRT(cuda, VERSION)
    engines = load_engine_set(folder)
    return load_engines(folder, engines, load_manifest(bundle), bindings, Cuda(cuda), verify=verify)


def test_engines_for_this_gpu_alone_are_preferred(built: Path, tmp_path: Path) -> None:
    beside(built, tmp_path, "a", capability="portable")
    joined = beside(built, tmp_path, "b", capability="sm80+sm89")
    assert find(tmp_path)[0] == joined
    own = beside(built, tmp_path, "c", capability="sm89")
    assert find(tmp_path)[0] == own
    assert find(tmp_path, joined)[0] == joined


def test_engines_for_others_are_named(built: Path, tmp_path: Path) -> None:
    beside(built, tmp_path, "a", capability="sm120")
    beside(built, tmp_path, "b", version="1.2.3")
    other = beside(built, tmp_path, "c", backend="tensorrt")
    with pytest.raises(
        EngineError,
        match=r"engines: found a \(for tensorrt-rtx 9\.8\.7 on sm120\); b \(for tensorrt-rtx "
        r"1\.2\.3 on sm89\); c \(for tensorrt 9\.8\.7 on sm89\); expected engines for tensorrt-rtx "
        r"9\.8\.7 on Emulated GPU \(sm89\); `vlmport build .* --backend tensorrt-rtx` makes them",
    ):
        find(tmp_path)
    with pytest.raises(EngineError, match=r"c: found engines for tensorrt 9.* build .* again"):
        find(tmp_path, other)


def test_portable_engines_need_a_gpu_that_is_new_enough(built: Path, tmp_path: Path) -> None:
    beside(built, tmp_path, "a", capability="portable")
    assert find(tmp_path)[1].capability == "portable"
    old = replace(DEVICE, capability=(7, 5))
    with pytest.raises(EngineError, match=r"portable\); expected .*sm75"):
        find_engines(tmp_path, "tensorrt-rtx", VERSION, old)


def test_a_damaged_folder_does_not_hide_others(built: Path, tmp_path: Path) -> None:
    damaged = beside(built, tmp_path, "a")
    (damaged / "decoder.engine").unlink()
    with pytest.raises(EngineError, match=r"found .*decoder\.engine: missing.*; expected engines"):
        find(tmp_path)
    right = beside(built, tmp_path, "b")
    assert find(tmp_path)[0] == right


def test_no_engines_at_all(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="found no engines; expected"):
        find(tmp_path)


def test_every_engine_loads(trained_bundle: Path, folder: Path) -> None:
    loaded = load(trained_bundle, folder)
    graphs = {graph.name for graph in load_manifest(trained_bundle).graphs}
    assert set(loaded.loaded) == graphs | {"select_greedy", "select_sampled"}


def overwrite(folder: Path, content: bytes) -> None:
    """Another decoder, of the same size so that only its content tells."""
    path = folder / "decoder.engine"
    path.write_bytes(content.ljust(path.stat().st_size, b"\0")[: path.stat().st_size])


def test_a_changed_engine_is_told_by_its_digest(trained_bundle: Path, folder: Path) -> None:
    overwrite(folder, b"vtrt")
    with pytest.raises(EngineError, match=r"the content of decoder\.engine is not what engine\.js"):
        load(trained_bundle, folder)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"not a plan", r"damaged: it does not begin as a plan does"),
        # The first bytes of a plan of TensorRT-RTX 1.7.1.
        (
            bytes.fromhex("76747274000000000200000000000000940a020000000000010701"),
            r"a plan of version 1\.7\.1",
        ),
    ],
)
def test_a_corrupt_plan(content: bytes, kind: str, trained_bundle: Path, folder: Path) -> None:
    overwrite(folder, content)
    with pytest.raises(
        EngineError,
        match=rf"decoder\.engine: TensorRT does not load it \(.*magicTag.*\); the file is {kind}; "
        r"build the engines again with `vlmport build`",
    ):
        load(trained_bundle, folder, verify=False)


def test_too_little_memory_for_an_engine(trained_bundle: Path, folder: Path) -> None:
    overwrite(folder, b"vtrt")
    with pytest.raises(EngineError, match=r"of the GPU's memory, 100 bytes are free; end other"):
        load(trained_bundle, folder, verify=False, memory=100)


def test_engines_without_weights_are_refused(trained_bundle: Path, folder: Path) -> None:
    engines = load_engine_set(folder)
    save_engine_set(folder, replace(engines, options=replace(engines.options, strip_weights=True)))
    with pytest.raises(EngineError, match=r"found engines without weights \(--strip-weights\)"):
        load(trained_bundle, folder)


def test_engines_of_other_weights(trained_bundle: Path, folder: Path) -> None:
    manifest = load_manifest(trained_bundle)
    changed = [
        replace(one, sha256="0" * 64) if one.path == "decoder.onnx.data" else one
        for one in manifest.files
    ]
    other = graphs_digest(replace(manifest, files=tuple(changed)))
    assert other != graphs_digest(manifest)
    save_engine_set(folder, replace(load_engine_set(folder), graphs_sha256=other))
    with pytest.raises(EngineError, match="found engines of other graphs or weights than the bun"):
        load(trained_bundle, folder)


def test_a_missing_engine(trained_bundle: Path, folder: Path) -> None:
    engines = load_engine_set(folder)
    kept = tuple(one for one in engines.engines if one.graph != "projector")
    save_engine_set(folder, replace(engines, engines=kept))
    with pytest.raises(EngineError, match="found no engines of projector, which the bundle has"):
        load(trained_bundle, folder)


def test_ports_that_are_not_those_of_engine_json(trained_bundle: Path, folder: Path) -> None:
    path = folder / ENGINES_NAME
    content = json.loads(path.read_text())
    decoder = next(one for one in content["engines"] if one["graph"] == "decoder")
    decoder["outputs"][1]["aliases"] = ""
    decoder["inputs"][0]["dtype"] = "float16"
    decoder["profiles"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(
        EngineError,
        match=r"inputs_embeds is float32, expected float16; present_key_values\.0\.key is written "
        r"over past_key_values\.0\.key, expected no input; found 2 optimization profiles, "
        r"expected 1; the file and engine\.json do not belong together",
    ):
        load(trained_bundle, folder)
    decoder["inputs"][0]["name"] = "embeds"
    path.write_text(json.dumps(content))
    with pytest.raises(
        EngineError, match=r"found the ports \[.*'inputs_embeds'.*expected \[.*'emb"
    ):
        load(trained_bundle, folder)


def test_a_port_that_must_lie_on_the_host(trained_bundle: Path, folder: Path) -> None:
    cuda = EmulatedCuda()
    bindings: Any = EmulatedTensorRT(cuda, VERSION)
    bindings.host_ports = frozenset({"write_indices"})
    engines, manifest = load_engine_set(folder), load_manifest(trained_bundle)
    with pytest.raises(EngineError, match="write_indices must lie on the host, expected on the GP"):
        load_engines(folder, engines, manifest, bindings, Cuda(cuda))
