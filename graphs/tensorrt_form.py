"""What TensorRT is given in place of a bundle's graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from vlmport.graphs.passes.decompose_softcap_attention import DecomposeSoftcapAttentionPass

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["rewrite_for_tensorrt_", "tensorrt_form"]


def tensorrt_form(path: Path) -> bytes | None:
    """The graph without what TensorRT's parser refuses, of the same meaning.

    Args:
        path: <graph>.onnx of a bundle; it is left as it is.

    Returns:
        The serialized model, whose weights still lie beside the file; None if the file itself
        serves.
    """
    model = ir.load(path)
    if not rewrite_for_tensorrt_(model):
        return None
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def rewrite_for_tensorrt_(model: ir.Model) -> bool:
    """The same of a graph in memory, which is changed.

    Returns:
        Whether there was anything to rewrite.
    """
    return DecomposeSoftcapAttentionPass()(model).modified
