"""Opens graphs with one of ONNX Runtime's execution providers, and tells what it left to others.

ONNX Runtime goes on without a provider that does not load, and gives the nodes that a provider has
no kernel for to the CPU. Neither happens in silence here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmport.errors import BundleError, VlmportError
from vlmport.machine.requirements import TENSORRT_RTX_PLUGIN
from vlmport.runtime.backends.onnxruntime import session_options
from vlmport.runtime.backends.onnxruntime_memory import OrtMemory

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CUDA", "TENSORRT_RTX", "OrtProvider", "open_provider_session", "warn_of_other_nodes"]

_log = logging.getLogger(__name__)

# The CUDA provider has kernels of these for every float type and hands them to the CPU only where
# they compute shapes, which the host needs anyway: GetCpuPreferredNodes of
# https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/framework/fallback_cpu_capability.cc
_SHAPE_OPERATORS = frozenset(
    (
        *("Add", "Cast", "Concat", "ConstantOfShape", "Div", "Expand", "Gather", "Mul", "Range"),
        *("ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze"),
    )
)


@dataclass(frozen=True, slots=True)
class OrtProvider:
    """An execution provider, and where its values lie.

    Attributes:
        backend: name of the backend that it makes.
        name: ONNX Runtime's name of the provider.
        memory: of its device.
        options: of the provider, by ONNX Runtime's names.
        plugin: module of the package that brings the provider's library; "" if it is built in.
    """

    backend: str
    name: str
    memory: OrtMemory
    options: tuple[tuple[str, str], ...] = ()
    plugin: str = ""


CUDA = OrtProvider(
    "onnxruntime-cuda",
    "CUDAExecutionProvider",
    OrtMemory("cuda"),
    # TF32 keeps 10 bits of a float32's mantissa; it is on by default and PyTorch's is off.
    (("device_id", "0"), ("use_tf32", "0")),
)
TENSORRT_RTX = OrtProvider(
    "onnxruntime-tensorrt-rtx",
    "NvTensorRTRTXExecutionProvider",
    OrtMemory("cuda"),
    plugin=TENSORRT_RTX_PLUGIN,
)


def open_provider_session(path: Path, provider: OrtProvider, threads: int | None) -> Any:
    """Opens one graph; its nodes that run elsewhere are logged as a warning.

    Args:
        path: the .onnx file.
        provider: what runs it.
        threads: worker threads for what is left to the CPU; None for all cores.

    Raises:
        VlmportError: if the provider does not load, or takes no node.
        BundleError: if the graph cannot be loaded.
    """
    import onnxruntime

    options = session_options(threads)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen: list[tuple[str, dict[str, str]]] | None = None
    if provider.plugin:
        options.add_provider_for_devices([_plugin_device(provider)], dict(provider.options))
    else:
        _preload_libraries(provider)
        chosen = [(provider.name, dict(provider.options))]
    try:
        # Without enable_fallback=0 a provider that fails is replaced by the CPU's.
        session = onnxruntime.InferenceSession(str(path), options, chosen, enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own, untyped exceptions
        msg = (
            f"{path}: {provider.name} cannot load it ({error}); choose another backend, or export "
            "the bundle again"
        )
        raise BundleError(msg) from error
    _check_provider(session, provider)
    warn_of_other_nodes(session, provider, path.name)
    return session


def warn_of_other_nodes(session: Any, provider: OrtProvider, graph: str) -> None:
    """Logs which nodes of a session the provider does not run, unless they compute shapes.

    Args:
        session: opened with "session.record_ep_graph_assignment_info".
        provider: what should run every node.
        graph: its name, for the message.

    Raises:
        VlmportError: if the provider runs none.
    """
    runs_any = False
    elsewhere: list[tuple[str, str, str]] = []
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == provider.name:
            runs_any = True
        else:
            elsewhere += [(node.op_type, node.name, part.ep_name) for node in part.get_nodes()]
    if not runs_any:
        msg = f"{graph}: {provider.name} runs none of its nodes; choose another backend"
        raise VlmportError(msg)
    lost = [node for node in elsewhere if node[0] not in _SHAPE_OPERATORS]
    if not lost:
        return
    counts = Counter(operator for operator, _, _ in lost)
    named = ", ".join(f"{name} ({operator}, {other})" for operator, name, other in lost[:8])
    _log.warning(
        "%s: %d nodes do not run on %s: %s; the first: %s; each costs copies between the devices",
        graph,
        len(lost),
        provider.name,
        ", ".join(f"{operator} x{count}" for operator, count in counts.most_common()),
        named,
    )


def _check_provider(session: Any, provider: OrtProvider) -> None:
    found = list(session.get_providers())
    if found[:1] != [provider.name]:
        msg = (
            f"backend {provider.backend}: found the providers {', '.join(found)}; expected "
            f"{provider.name} first, whose libraries do not load here; ONNX Runtime's message "
            "above names the one that is missing; see `vlmport doctor`"
        )
        raise VlmportError(msg)


def _preload_libraries(provider: OrtProvider) -> None:
    """Loads CUDA's libraries from their Python packages, where ONNX Runtime does not look."""
    import onnxruntime

    if provider.memory.device != "cuda":
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it does not find
        onnxruntime.preload_dlls()
    if said.getvalue():
        _log.debug("onnxruntime.preload_dlls: %s", said.getvalue().strip())


def _plugin_device(provider: OrtProvider) -> Any:
    import onnxruntime

    found = _devices(provider)
    if not found:
        try:
            library: str = importlib.import_module(provider.plugin).get_library_path()
            onnxruntime.register_execution_provider_library(provider.name, library)
        except Exception as error:  # onnxruntime raises its own, untyped exceptions
            reason = str(error).strip().splitlines()[0]
            msg = (
                f"backend {provider.backend}: the library of {provider.plugin} cannot be used "
                f"({reason}); `vlmport doctor` shows what is missing"
            )
            raise VlmportError(msg) from error
        found = _devices(provider)
    if not found:
        msg = (
            f"backend {provider.backend}: {provider.name} finds no device; expected a GPU that "
            "TensorRT-RTX supports (Ampere or newer); choose another backend"
        )
        raise VlmportError(msg)
    return found[0]


def _devices(provider: OrtProvider) -> list[Any]:
    import onnxruntime

    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider.name]
