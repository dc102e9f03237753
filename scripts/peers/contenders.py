"""Who takes part: vlmport's recipes and the peers, with their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from peers.modelopt_quantizer import ModeloptPeer
from peers.onnxruntime_quantizers import NBitsPeer, StaticPeer
from vlmport.api.quantize_recipe import RecipeOptions
from vlmport.calibration.recipe import ActivationMethod, WeightMethod

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["GROUPS", "Contender", "PeerQuantizer", "contenders"]

GROUPS = ("int8 weights and activations", "int8 weights", "int4 weights")
_W8A8, _W8, _W4 = GROUPS
_STATIC = "onnxruntime quantize_static, "
_NBITS = "onnxruntime matmul_nbits, "
_MODELOPT = "nvidia-modelopt, "


class PeerQuantizer(Protocol):
    """Writes one quantized graph from one float graph.

    Attributes:
        gemm_as_matmul: whether it is handed graphs whose Gemm is a MatMul.
    """

    @property
    def gemm_as_matmul(self) -> bool: ...  # noqa: D102  # see the class

    def quantize(self, graph: Path, inputs: Path, target: Path) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Contender:
    """One row for each checkpoint.

    Attributes:
        name: shown.
        group: one of `GROUPS`.
        how: vlmport's recipe, or a peer.
        is_ours: whether it is the row of vlmport that the group's others are held against.
    """

    name: str
    group: str
    how: RecipeOptions | PeerQuantizer
    is_ours: bool = False


def contenders(modelopt: Path | None) -> tuple[Contender, ...]:
    """All of them, by group, vlmport's default recipe first.

    Args:
        modelopt: interpreter of an environment with nvidia-modelopt.
    """
    plain = ActivationMethod("min_max", smoothing=None)
    unsmoothed = RecipeOptions("int8", activations=plain)
    nearest = WeightMethod("nearest")
    return (
        Contender("**vlmport**, default", _W8A8, RecipeOptions("int8"), is_ours=True),
        Contender("vlmport, min-max, not smoothed", _W8A8, unsmoothed),
        Contender(_STATIC + "MinMax", _W8A8, StaticPeer("MinMax")),
        Contender(_STATIC + "Entropy", _W8A8, StaticPeer("Entropy")),
        Contender(_STATIC + "Percentile", _W8A8, StaticPeer("Percentile")),
        Contender(_STATIC + "SmoothQuant", _W8A8, StaticPeer("MinMax", smooth=True)),
        Contender(_STATIC + "its defaults", _W8A8, StaticPeer("MinMax", defaults=True)),
        Contender(_MODELOPT + "max", _W8A8, ModeloptPeer(modelopt, "int8", "max")),
        Contender(_MODELOPT + "entropy", _W8A8, ModeloptPeer(modelopt, "int8", "entropy")),
        Contender("**vlmport**, default", _W8, RecipeOptions("int8-weight-only"), is_ours=True),
        Contender(_NBITS + "DEFAULT", _W8, NBitsPeer("DEFAULT", True, bits=8)),
        Contender(
            _NBITS + "DEFAULT, block 128", _W8, NBitsPeer("DEFAULT", True, bits=8, block_size=128)
        ),
        Contender(
            _NBITS + "DEFAULT, block 128, activations in float",
            _W8,
            NBitsPeer("DEFAULT", True, bits=8, block_size=128, accuracy_level=0),
        ),
        Contender("**vlmport**, default", _W4, RecipeOptions("int4"), is_ours=True),
        Contender("vlmport, nearest", _W4, RecipeOptions("int4", weights=nearest)),
        Contender(_NBITS + "DEFAULT, QDQ", _W4, NBitsPeer("DEFAULT", True, standard=True)),
        Contender(
            _NBITS + "DEFAULT, QDQ, zero points", _W4, NBitsPeer("DEFAULT", False, standard=True)
        ),
        Contender(_NBITS + "RTN", _W4, NBitsPeer("RTN", True)),
        Contender(_NBITS + "k_quant, zero points", _W4, NBitsPeer("k_quant", False)),
        Contender(_NBITS + "HQQ, zero points", _W4, NBitsPeer("HQQ", False)),
        Contender(_NBITS + "GPTQ", _W4, NBitsPeer("GPTQ", True)),
        Contender(_NBITS + "GPTQ, mse", _W4, NBitsPeer("GPTQ", True, tuning={"mse": True})),
        Contender(
            _NBITS + "GPTQ, actorder", _W4, NBitsPeer("GPTQ", True, tuning={"actorder": True})
        ),
        Contender(_NBITS + "GPTQ, zero points", _W4, NBitsPeer("GPTQ", False)),
        Contender(_MODELOPT + "rtn_dq", _W4, ModeloptPeer(modelopt, "int4", "rtn_dq")),
        Contender(_MODELOPT + "awq_lite", _W4, ModeloptPeer(modelopt, "int4", "awq_lite")),
        Contender(_MODELOPT + "awq_clip", _W4, ModeloptPeer(modelopt, "int4", "awq_clip")),
        Contender(_MODELOPT + "awq_full", _W4, ModeloptPeer(modelopt, "int4", "awq_full")),
    )
