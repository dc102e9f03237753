"""Which extra of vlmport brings which optional module, and the pip line that installs it."""

from __future__ import annotations

from types import MappingProxyType

__all__ = ["EXTRA_OF_MODULE", "missing_module_message", "pip_line"]

EXTRA_OF_MODULE = MappingProxyType(
    {
        "onnxruntime": "cpu",
        "cuda": "gpu",
        "tensorrt": "tensorrt",
        "tensorrt_rtx": "gpu",
        "onnxruntime_ep_nv_tensorrt_rtx": "gpu",
        "torch": "export",
        "transformers": "export",
        "onnx": "export",
        "onnxscript": "export",
        "onnx_ir": "export",
        "ml_dtypes": "export",
        "safetensors": "export",
        "tritonclient": "triton",
        "grpc": "triton",
        "aiohttp": "triton",
    }
)


def pip_line(extra: str) -> str:
    """The command that installs vlmport with an extra, as one types it."""
    return f"pip install 'vlmport[{extra}]'"


def missing_module_message(module: str | None) -> str | None:
    """What to tell a user whose command needs a module that is not installed.

    Args:
        module: dotted name, as ModuleNotFoundError.name has it.

    Returns:
        None if no extra brings the module, so that the missing import is a fault of ours.
    """
    top = (module or "").partition(".")[0]
    extra = EXTRA_OF_MODULE.get(top)
    if extra is None:
        return None
    wanted = " or 'vlmport[gpu]' on a machine with a CUDA GPU" if extra == "cpu" else ""
    return f"{top}: not installed; expected for this command; {pip_line(extra)}{wanted}"
