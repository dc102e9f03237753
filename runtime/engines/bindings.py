"""The TensorRT module that a user chose by name, and the parts of it that vlmport uses.

`tensorrt` and `tensorrt_rtx` have the same Python API but for a few names, so that one code path
serves both. Type checkers see it as the stubs of `tensorrt`, which `scripts/tensorrt_stubs.py`
makes of the installed bindings; a test compares the names below with both modules.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, Protocol

from vlmport.errors import EngineError

if TYPE_CHECKING:
    import tensorrt as trt
    import tensorrt_rtx as rtx

    from vlmport.contract_engines import TensorRTName

__all__ = ["Bindings", "RtxBindings", "load_bindings"]

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


class Bindings(Protocol):
    """What is used of the module `tensorrt` or `tensorrt_rtx`."""

    __name__: str
    __version__: str
    AttentionIOForm: type[trt.AttentionIOForm]
    AttentionNormalizationOp: type[trt.AttentionNormalizationOp]
    Builder: type[trt.Builder]
    BuilderFlag: type[trt.BuilderFlag]
    CausalMaskKind: type[trt.CausalMaskKind]
    DataType: type[trt.DataType]
    Dims: type[trt.Dims]
    ElementWiseOperation: type[trt.ElementWiseOperation]
    ExecutionContextAllocationStrategy: type[trt.ExecutionContextAllocationStrategy]
    EngineInspector: type[trt.EngineInspector]
    FillOperation: type[trt.FillOperation]
    IAttentionInputLayer: type[trt.IAttentionInputLayer]
    IConstantLayer: type[trt.IConstantLayer]
    IElementWiseLayer: type[trt.IElementWiseLayer]
    IFillLayer: type[trt.IFillLayer]
    ILogger: type[trt.ILogger]
    IProgressMonitor: type[trt.IProgressMonitor]
    IShuffleLayer: type[trt.IShuffleLayer]
    ISliceLayer: type[trt.ISliceLayer]
    IStreamWriter: type[trt.IStreamWriter]
    LayerInformationFormat: type[trt.LayerInformationFormat]
    LayerType: type[trt.LayerType]
    MemoryPoolType: type[trt.MemoryPoolType]
    NetworkDefinitionCreationFlag: type[trt.NetworkDefinitionCreationFlag]
    OnnxParser: type[trt.OnnxParser]
    ProfilingVerbosity: type[trt.ProfilingVerbosity]
    Runtime: type[trt.Runtime]
    Weights: type[trt.Weights]


class RtxBindings(Bindings, Protocol):
    """What `tensorrt_rtx` has beside it."""

    ComputeCapability: type[rtx.ComputeCapability]
    DynamicShapesKernelSpecializationStrategy: type[rtx.DynamicShapesKernelSpecializationStrategy]


@functools.cache
def load_bindings(name: TensorRTName) -> Bindings:
    """Imports the module.

    Raises:
        EngineError: if it is not installed, or its libraries do not load.
    """
    try:
        module: Any = importlib.import_module(_MODULES[name])
    except Exception as error:  # a broken native package raises whatever its loader raises
        missing = isinstance(error, ModuleNotFoundError)
        found = "not installed" if missing else f"installed, but does not load ({error})"
        msg = (
            f"{_MODULES[name]}: {found}; expected for the backend {name}; "
            "pip install 'vlmport[gpu]'; `vlmport doctor` shows what is usable"
        )
        raise EngineError(msg) from error
    bindings: Bindings = module
    return bindings
