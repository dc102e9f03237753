"""Finds the engines of a bundle that this TensorRT and this GPU can run, and loads them."""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.contract_engines import ENGINES_FOLDER, ENGINES_NAME, SELECT_GREEDY, SELECT_SAMPLED
from vlmport.engine_manifest import load_engine_set
from vlmport.errors import EngineError
from vlmport.manifest import graphs_digest
from vlmport.runtime.device.sizes import in_words
from vlmport.runtime.engines.log import engine_logger, listening
from vlmport.runtime.engines.ports import check_engine_ports

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    import tensorrt as trt

    from vlmport.contract import Manifest
    from vlmport.contract_engines import Engine, EngineSet, TensorRTName
    from vlmport.runtime.device.cuda import Cuda, Device
    from vlmport.runtime.engines.bindings import Bindings

__all__ = ["LoadedEngines", "find_engines", "load_engine", "load_engines"]

_AGAIN = "build the engines again with `vlmport build`"
_PORTABLE = "portable"
_PORTABLE_FROM = (8, 0)  # compute capability that portable engines need at least


@dataclass(frozen=True, slots=True, eq=False)
class LoadedEngines:
    """Engines whose weights are on the GPU.

    Attributes:
        folder: where they came from.
        engines: what engine.json says of them.
        loaded: graph -> engine.
        runtime: must outlive the engines.
    """

    folder: Path
    engines: EngineSet
    loaded: Mapping[str, trt.ICudaEngine]
    runtime: trt.Runtime


def find_engines(
    bundle: Path,
    backend: TensorRTName,
    version: str,
    device: Device,
    folder: Path | None = None,
    elsewhere: Collection[str] = (),
) -> tuple[Path, EngineSet]:
    """Finds the folder of engines for a version of TensorRT and a GPU.

    Args:
        bundle: folder of the bundle.
        backend: the module that runs them.
        version: of the module that is installed.
        device: the GPU.
        folder: of engines that must be taken; None for the best of the bundle's.
        elsewhere: graphs that something else computes; their engines may be missing.

    Returns:
        The folder and what its engine.json says. Engines for this GPU alone come before those that
        run on others as well.

    Raises:
        EngineError: if there are none; it names those that there are.
    """
    wanted = f"{backend} {version} on {device.name} ({device.tag})"
    if folder is not None:
        engines = load_engine_set(folder, elsewhere)
        if _fits(engines, backend, version, device):
            return folder, engines
        msg = f"{folder}: found engines for {_purpose(engines)}; expected {wanted}; {_AGAIN}"
        raise EngineError(msg)
    top = bundle / ENGINES_FOLDER
    fitting, others = [], []
    for path in sorted(top.glob(f"*/{ENGINES_NAME}")):
        try:
            engines = load_engine_set(path.parent, elsewhere)
        except EngineError as error:  # another folder may serve
            others.append(str(error))
            continue
        if _fits(engines, backend, version, device):
            fitting.append((path.parent, engines))
        else:
            others.append(f"{path.parent.name} (for {_purpose(engines)})")
    if not fitting:
        msg = (
            f"{top}: found {'; '.join(others) or 'no engines'}; expected engines for {wanted}; "
            f"`vlmport build {bundle} --backend {backend}` makes them"
        )
        raise EngineError(msg)
    return min(fitting, key=lambda entry: _breadth(entry[1].capability))


def load_engines(
    folder: Path,
    engines: EngineSet,
    manifest: Manifest,
    bindings: Bindings,
    cuda: Cuda,
    *,
    verify: bool = True,
    elsewhere: Collection[str] = (),
) -> LoadedEngines:
    """Loads the engines of a folder onto the GPU.

    Args:
        folder: of engine.json and the engines.
        engines: what engine.json says.
        manifest: of the bundle that they were built from.
        bindings: the TensorRT module.
        cuda: the GPU.
        verify: whether the digest of every file is checked.
        elsewhere: graphs that something else computes; their engines may be missing.

    Raises:
        EngineError: if a file is damaged, does not load, is not what engine.json says, or has no
            weights.
    """
    _check_set(folder, engines, manifest, elsewhere)
    wanted = [one for one in engines.engines if one.graph not in elsewhere]
    if verify:
        _check_digests(folder, wanted)
    runtime = bindings.Runtime(engine_logger(bindings))
    loaded = {one.graph: load_engine(folder / one.file, one, runtime, cuda) for one in wanted}
    return LoadedEngines(folder, engines, loaded, runtime)


def _fits(engines: EngineSet, backend: TensorRTName, version: str, device: Device) -> bool:
    if engines.options.backend != backend or engines.version != version:
        return False
    if engines.capability == _PORTABLE:
        return device.capability >= _PORTABLE_FROM
    return device.tag in engines.capability.split("+")


def _breadth(capability: str) -> int:
    """How many kinds of GPU engines are made for; they are slower for it."""
    return 1000 if capability == _PORTABLE else len(capability.split("+"))


def _purpose(engines: EngineSet) -> str:
    return f"{engines.options.backend} {engines.version} on {engines.capability}"


def _check_set(
    folder: Path, engines: EngineSet, manifest: Manifest, elsewhere: Collection[str]
) -> None:
    if engines.options.strip_weights:
        msg = (
            f"{folder}: found engines without weights (--strip-weights); expected engines with "
            "them, as weights are not filled in when engines are opened; build them again without "
            "--strip-weights"
        )
        raise EngineError(msg)
    if engines.graphs_sha256 != graphs_digest(manifest):
        msg = (
            f"{folder}: found engines of other graphs or weights than the bundle's; expected those "
            f"that were built from it as it is; {_AGAIN}"
        )
        raise EngineError(msg)
    graphs = [graph.name for graph in manifest.graphs if graph.name not in elsewhere]
    missing = [
        name for name in (*graphs, SELECT_GREEDY, SELECT_SAMPLED) if not engines.has_engine(name)
    ]
    if missing:
        msg = f"{folder}: found no engines of {', '.join(missing)}, which the bundle has; {_AGAIN}"
        raise EngineError(msg)


def _check_digests(folder: Path, engines: Sequence[Engine]) -> None:
    faults = []
    for engine in engines:
        with (folder / engine.file).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != engine.sha256:
                faults.append(engine.file)
    if faults:
        msg = (
            f"{folder}: the content of {', '.join(faults)} is not what {ENGINES_NAME} says (other "
            f"SHA-256); copy the folder again, or {_AGAIN}"
        )
        raise EngineError(msg)


def load_engine(path: Path, engine: Engine, runtime: trt.Runtime, cuda: Cuda) -> trt.ICudaEngine:
    """Loads one engine onto the GPU.

    Args:
        path: of the file.
        engine: what engine.json says of it.
        runtime: must outlive it.
        cuda: the GPU.

    Raises:
        EngineError: if it does not load, or is not what engine.json says.
    """
    free, _ = cuda.memory()
    # A mapped file: an engine of many GiB does not lie in the host's memory a second time.
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        listening() as log,
    ):
        head = content[:32]
        loaded: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(content)
    if loaded is None:
        raise EngineError(_refusal(path, engine, head, log.errors, free))
    check_engine_ports(path, engine, loaded)
    return loaded


def _refusal(path: Path, engine: Engine, head: bytes, errors: Sequence[str], free: int) -> str:
    said = "; ".join(errors) or "it does not say why"
    if engine.size > free:
        return (
            f"{path}: TensorRT does not load it ({said}); it takes {in_words(engine.size)} of the "
            f"GPU's memory, {in_words(free)} are free; end other programs on the GPU, or take a "
            "bundle of a smaller precision"
        )
    return f"{path}: TensorRT does not load it ({said}); the file is {_kind(head)}; {_AGAIN}"


def _kind(head: bytes) -> str:
    """What the first bytes of a plan say.

    Read off plans of TensorRT-RTX 1.7.1: the magic "vtrt", at 24 the version in three bytes. Full
    TensorRT's plans begin with "ftrt"; that their version is at the same place was not seen.
    """
    if head[1:4] != b"trt" or len(head) < 27:
        return "damaged: it does not begin as a plan does"
    return f"a plan of version {head[24]}.{head[25]}.{head[26]}"
