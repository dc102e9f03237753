"""Attention of a parsed network: completed, read back, and refused where it would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from support.engine_graphs import CAPACITY, ParsedGraph, cached_attention, parsed, source

from vlmport.contract_engines import AttentionLayer
from vlmport.errors import EngineError
from vlmport.runtime.engines.attention import complete_attention
from vlmport.runtime.engines.attention_check import check_attention, visible_keys
from vlmport.runtime.engines.attention_layers import attention_layers
from vlmport.runtime.engines.explicit_mask import add_visible_keys
from vlmport.runtime.engines.network import tensors

if TYPE_CHECKING:
    import tensorrt as trt

Spoil = Callable[[ParsedGraph, "trt.IAttention"], None]


def layer_of(masking: Any, **graph: Any) -> AttentionLayer:
    with parsed(cached_attention(**graph)) as found:
        complete_attention(found.bindings, found.network, found.source, masking)
        layers = check_attention(found.bindings, found.network, found.source, {})
        assert len(layers) == 1
        return layers[0]


def first_attention(found: ParsedGraph) -> trt.IAttention:
    return attention_layers(found.bindings, found.network)[0].attention


@pytest.mark.parametrize(("causal", "masking"), [(True, "lower_right"), (False, "none")])
def test_lengths_reach_the_layer(causal: bool, masking: str) -> None:
    layer = layer_of("lengths", causal=causal)
    assert (layer.masking, layer.lengths) == (masking, "lengths_int32")
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (4, 2, 16)
    assert (layer.layer, layer.node, layer.dtype) == ("attend_AttentionInput", "attend", "float16")


@pytest.mark.parametrize("causal", [True, False])
def test_explicit_mask_reaches_the_layer(causal: bool) -> None:
    layer = layer_of("mask", causal=causal)
    assert (layer.masking, layer.lengths) == ("tensor", "")


@pytest.mark.parametrize("masking", ["lengths", "mask"])
def test_mask_of_the_node_is_joined_with_the_lengths(masking: str) -> None:
    layer = layer_of(masking, causal=False, mask="own")
    assert (layer.masking, layer.lengths) == ("tensor", "")


def test_mask_over_keys_that_are_all_valid_stays() -> None:
    layer = layer_of("lengths", causal=False, mask="own", lengths="")
    assert (layer.masking, layer.lengths) == ("tensor", "")


def test_layers_share_what_they_mean_alike() -> None:
    with parsed(cached_attention(names=("first", "second"))) as found:
        complete_attention(found.bindings, found.network, found.source, "mask")
        layers = attention_layers(found.bindings, found.network)
        assert len({layer.attention.mask.name for layer in layers}) == 1
        assert len(check_attention(found.bindings, found.network, found.source, {})) == 2


def spoil_nothing_is_told(found: ParsedGraph, attention: trt.IAttention) -> None:
    attention.key_value_lengths = None  # type: ignore[assignment]  # how they are dropped
    attention.causal_kind = found.bindings.CausalMaskKind.UPPER_LEFT


def spoil_lengths(found: ParsedGraph, attention: trt.IAttention) -> None:
    attention.key_value_lengths = None  # type: ignore[assignment]


def spoil_alignment(found: ParsedGraph, attention: trt.IAttention) -> None:
    attention.causal_kind = found.bindings.CausalMaskKind.UPPER_LEFT


def spoil_no_causality(found: ParsedGraph, attention: trt.IAttention) -> None:
    attention.causal_kind = found.bindings.CausalMaskKind.NONE


def spoil_source_of_lengths(found: ParsedGraph, attention: trt.IAttention) -> None:
    other = tensors(found.network)["written"]
    cast = found.network.add_cast(other, found.bindings.DataType.INT32)
    attention.key_value_lengths = cast.get_output(0)


def spoil_changed_lengths(found: ParsedGraph, attention: trt.IAttention) -> None:
    known = attention.key_value_lengths
    plus = found.bindings.ElementWiseOperation.SUM
    attention.key_value_lengths = found.network.add_elementwise(known, known, plus).get_output(0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_nothing_is_told, "UPPER_LEFT; expected LOWER_RIGHT.*neither lengths nor a mask"),
        (spoil_lengths, "has neither lengths nor a mask"),
        (spoil_alignment, "has a mask of kind UPPER_LEFT"),
        (spoil_no_causality, "has a mask of kind NONE; expected LOWER_RIGHT"),
        (spoil_source_of_lengths, "has the lengths written; expected lengths"),
        (spoil_changed_lengths, r"has the lengths \(Unnamed.*; expected lengths"),
    ],
)
def test_wrong_lengths_are_refused(spoil: Spoil, message: str) -> None:
    with parsed(cached_attention()) as found:
        complete_attention(found.bindings, found.network, found.source, "lengths")
        spoil(found, first_attention(found))
        with pytest.raises(EngineError, match=f"attend_AttentionInput.*{message}"):
            check_attention(found.bindings, found.network, found.source, {})


def test_a_network_as_it_was_parsed_is_refused() -> None:
    with (
        parsed(cached_attention(names=("first", "second"))) as found,
        pytest.raises(EngineError, match=r"first_Att.*UPPER_LEFT.*second_Att.*UPPER_LEFT"),
    ):
        check_attention(found.bindings, found.network, found.source, {})


def test_a_causal_layer_without_lengths_is_refused() -> None:
    with parsed(cached_attention(lengths="")) as found:
        complete_attention(found.bindings, found.network, found.source, "lengths")
        with pytest.raises(EngineError, match="is causal over keys of unknown number"):
            check_attention(found.bindings, found.network, found.source, {})


def replaced_mask(found: ParsedGraph, mask: trt.ITensor) -> None:
    first_attention(found).mask = mask


def wrong_causality(found: ParsedGraph) -> trt.ITensor:
    layer = attention_layers(found.bindings, found.network)[0]
    lengths = tensors(found.network)["lengths"]
    return add_visible_keys(
        found.bindings, found.network, layer.get_input(0), lengths, CAPACITY, causal=False
    )


def one_key_too_many(found: ParsedGraph) -> trt.ITensor:
    network, bindings = found.network, found.bindings
    layer, lengths = attention_layers(bindings, network)[0], tensors(network)["lengths"]
    one = network.add_constant(bindings.Dims([1]), bindings.Weights(np.array([1], np.int64)))
    plus = bindings.ElementWiseOperation.SUM
    more = network.add_elementwise(lengths, one.get_output(0), plus).get_output(0)
    return add_visible_keys(bindings, network, layer.get_input(0), more, CAPACITY, causal=True)


def everything(found: ParsedGraph) -> trt.ITensor:
    """Keys from the first to the last row of the cache, valid or not."""
    network, bindings = found.network, found.bindings
    keys = np.arange(CAPACITY, dtype=np.int32).reshape(1, 1, 1, -1)
    shape = bindings.Dims(list(keys.shape))
    numbers = network.add_constant(shape, bindings.Weights(keys)).get_output(0)
    one = np.full((1, 1, 1, 1), CAPACITY, np.int32)
    most = network.add_constant(bindings.Dims([1, 1, 1, 1]), bindings.Weights(one)).get_output(0)
    less = bindings.ElementWiseOperation.LESS
    return network.add_elementwise(numbers, most, less).get_output(0)


@pytest.mark.parametrize("wrong", [wrong_causality, one_key_too_many, everything])
def test_a_wrong_mask_is_refused(wrong: Callable[[ParsedGraph], trt.ITensor]) -> None:
    with parsed(cached_attention()) as found:
        complete_attention(found.bindings, found.network, found.source, "mask")
        replaced_mask(found, wrong(found))
        with pytest.raises(EngineError, match=r"attend_AttentionInput: its mask .* is wrong"):
            check_attention(found.bindings, found.network, found.source, {})


def test_a_mask_that_depends_on_something_else_is_refused() -> None:
    with parsed(cached_attention()) as found:
        complete_attention(found.bindings, found.network, found.source, "mask")
        layer = attention_layers(found.bindings, found.network)[0]
        written = tensors(found.network)["written"]
        mask = add_visible_keys(
            found.bindings, found.network, layer.get_input(0), written, CAPACITY, causal=True
        )
        replaced_mask(found, mask)
        with pytest.raises(EngineError, match="written: a mask depends on it"):
            check_attention(found.bindings, found.network, found.source, {})


@pytest.mark.parametrize("lengths", ["", "lengths"])
def test_a_lost_mask_is_refused(lengths: str) -> None:
    graph = cached_attention(causal=False, lengths=lengths)
    meant = source(cached_attention(causal=False, mask="own", lengths=lengths))
    with parsed(graph) as found:
        complete_attention(found.bindings, found.network, found.source, "lengths")
        with pytest.raises(EngineError, match="attend_AttentionInput: has no mask; expected"):
            check_attention(found.bindings, found.network, meant, {})


def test_a_mask_of_the_node_that_is_left_out_of_the_explicit_one_is_refused() -> None:
    with parsed(cached_attention(causal=False, mask="own")) as found:
        complete_attention(found.bindings, found.network, found.source, "mask")
        replaced_mask(found, wrong_causality(found))  # right but for the node's own mask
        with pytest.raises(EngineError, match=r"its mask .* is wrong"):
            check_attention(found.bindings, found.network, found.source, {})


def test_a_mask_beside_lengths_is_refused() -> None:
    with parsed(cached_attention(causal=False)) as found:
        complete_attention(found.bindings, found.network, found.source, "lengths")
        replaced_mask(found, wrong_causality(found))
        with pytest.raises(EngineError, match="has a mask and the lengths lengths_int32"):
            check_attention(found.bindings, found.network, found.source, {})


def test_a_node_without_a_layer_is_refused() -> None:
    with parsed(cached_attention(names=("first",))) as found:
        both = parsed(cached_attention(names=("first", "second")))
        with both as other, pytest.raises(EngineError, match="without a layer: second"):
            complete_attention(found.bindings, found.network, other.source, "lengths")


def test_a_layer_without_a_node_is_refused() -> None:
    with (
        parsed(cached_attention(names=("first", "second"))) as found,
        parsed(cached_attention(names=("first",))) as other,
        pytest.raises(EngineError, match="layers without a node: second"),
    ):
        check_attention(found.bindings, found.network, other.source, {})


def test_softcap_is_refused_in_the_parsers_words() -> None:
    with pytest.raises(EngineError, match=r"attend \(Attention\): .*softcap"):  # noqa: SIM117
        with parsed(cached_attention(attributes={"softcap": 50.0})):
            pass


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 3])
def test_what_the_check_expects_is_what_onnx_runtime_computes(causal: bool, length: int) -> None:
    generator = np.random.default_rng(0)
    written = np.array([0, 5, CAPACITY - length], np.int64)
    added = np.full(3, length, np.int64)

    def rows(heads: int, count: int) -> NDArray[np.float32]:
        return generator.normal(size=(3, heads, count, 16)).astype(np.float32)

    inputs: dict[str, NDArray[Any]] = {
        "queries": rows(4, length),
        "keys": rows(2, CAPACITY),
        "values": rows(2, CAPACITY),
        "written": written,
        "added": added,
    }
    by_lengths = answers(cached_attention(causal=causal, dtype=TensorProto.FLOAT), inputs)
    mask = visible_keys(written + added, length, CAPACITY, causal=causal)
    graph = cached_attention(causal=False, lengths="", mask="own", dtype=TensorProto.FLOAT)
    by_mask = answers(graph, inputs | {"own": mask})
    np.testing.assert_allclose(by_lengths, by_mask, atol=1e-6)


def answers(model: onnx.ModelProto, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(["attend_output"], inputs)
    return np.asarray(found)
