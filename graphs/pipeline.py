"""The passes that every traced graph goes through, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_ir.passes import common

from vlmport.graphs.passes.fold_constants import FoldConstantsPass
from vlmport.graphs.passes.fold_reshape_axes import FoldReshapeAxesPass
from vlmport.graphs.passes.fold_weight_transpose import FoldWeightTransposePass
from vlmport.graphs.passes.fuse_parallel_matmul import FuseParallelMatmulPass
from vlmport.graphs.passes.fuse_rms_norm import FuseRmsNormPass
from vlmport.graphs.passes.fuse_rotary_embedding import FuseRotaryEmbeddingPass
from vlmport.graphs.passes.fuse_tanh_gelu import FuseTanhGeluPass
from vlmport.graphs.passes.merge_head_splits import MergeHeadSplitsPass
from vlmport.graphs.passes.split_fused_heads import SplitFusedHeadsPass

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["optimize"]


def optimize(model: ir.Model) -> ir.Model:
    """Brings a traced graph into the form that is written to a bundle.

    Args:
        model: as `vlmport.export.tracing.trace` returns it; changed in place.

    Returns:
        The same model: standard operators of opset 24, weights still planned.
    """
    passes: tuple[ir.passes.InPlacePass, ...] = (
        # First: the fusions read slice bounds and axes as constants.
        FoldConstantsPass(),
        FuseRmsNormPass(),
        FuseRotaryEmbeddingPass(),
        FuseTanhGeluPass(),
        FoldReshapeAxesPass(),
        # Before the parallel products are joined: they are joined along the transposed axis.
        FoldWeightTransposePass(),
        FuseParallelMatmulPass(),
        # After the products are joined, which makes the splits.
        MergeHeadSplitsPass(),
        # After the target of the reshape is constant.
        SplitFusedHeadsPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )
    for graph_pass in passes:
        graph_pass(model)
    return model
