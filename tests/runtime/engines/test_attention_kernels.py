from __future__ import annotations

import onnx
import pytest
from support.engine_graphs import cached_attention, one_profile, parsed
from support.engine_table import KERNEL_ROWS, KernelRow

from vlmport.errors import EngineError
from vlmport.runtime.engines.attention import complete_attention
from vlmport.runtime.engines.attention_kernels import AttentionKind, KernelFinder
from vlmport.runtime.engines.attention_layers import attention_layers
from vlmport.runtime.engines.bindings import load_bindings

# Of the language models that families have; 72 is SigLIP's, 80 Phi-2's, 96 Phi-3's, 256 Gemma's.
HEAD_DIMS = (64, 72, 80, 96, 128, 256)
MASKS: dict[str, tuple[str, bool, tuple[int, ...] | None]] = {
    "lower_right": ("LOWER_RIGHT", True, None),
    "lengths": ("NONE", True, None),
    "none": ("NONE", False, None),
    "mask": ("NONE", False, (-1, 1, -1, 128)),
}
PREFILL, DECODE = (1, 16, 64), (1, 1, 1)


@pytest.fixture(scope="module")
def finder() -> KernelFinder:
    bindings = load_bindings("tensorrt-rtx")
    return KernelFinder(bindings, lambda builder: builder.create_builder_config())


def kind(dtype: str, head_dim: int, mask: str) -> AttentionKind:
    masking, has_lengths, shape = MASKS[mask]
    cache = (-1, 2, 128, head_dim)
    return AttentionKind(
        dtype=dtype,
        queries=(-1, 8, -1, head_dim),
        keys=cache,
        values=cache,
        masking=masking,
        has_lengths=has_lengths,
        mask=shape,
        batch=((1, 1, 4), (1, 1, 4)),
        tokens=(PREFILL, DECODE),
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["HALF", "BF16"])
def test_half_precision_has_kernels(finder: KernelFinder, dtype: str, head_dim: int) -> None:
    reasons = {mask: finder.reason(kind(dtype, head_dim, mask)) for mask in MASKS}
    found = tuple((mask, reason or "fused") for mask, reason in reasons.items())
    KERNEL_ROWS.append(KernelRow(dtype, head_dim, found))
    assert set(reasons.values()) == {""}


def test_float32_is_decomposed_in_tensorrts_words(
    finder: KernelFinder, capfd: pytest.CaptureFixture[str]
) -> None:
    reason = finder.reason(kind("FLOAT", 64, "lower_right"))
    assert reason == "Attention operation was not supported by a dedicated kernel"
    KERNEL_ROWS.append(KernelRow("FLOAT", 64, (("lower_right", reason),)))
    assert "Internal Error" not in capfd.readouterr().err  # which TensorRT writes past its logger


@pytest.mark.parametrize(
    ("dtype", "decomposed"), [(onnx.TensorProto.FLOAT16, False), (onnx.TensorProto.FLOAT, True)]
)
def test_only_layers_without_a_kernel_may_be_decomposed(
    finder: KernelFinder, dtype: int, decomposed: bool
) -> None:
    with parsed(cached_attention(dtype=dtype)) as found:
        complete_attention(found.bindings, found.network, found.source, "lengths")
        reasons = finder.decompose_where_needed(found.network, one_profile(found.source))
        assert bool(reasons) == decomposed
        (layer,) = attention_layers(found.bindings, found.network)
        assert layer.attention.decomposable == decomposed


def test_a_layer_that_builds_neither_way_is_refused() -> None:
    bindings = load_bindings("tensorrt-rtx")

    def for_turing(builder: object) -> object:  # which has no bfloat16
        config = builder.create_builder_config()  # type: ignore[attr-defined]
        config.num_compute_capabilities = 1
        config.set_compute_capability(bindings.ComputeCapability.SM75, 0)  # type: ignore[attr-defined]
        return config

    finder = KernelFinder(bindings, for_turing)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"8 heads of 64 \(BF16\): .*sm75.*choose another"):
        finder.reason(kind("BF16", 64, "lengths"))
