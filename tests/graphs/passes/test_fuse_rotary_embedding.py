from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.graph_cases import build, operators, run

from vlmport.graphs.passes.fuse_rotary_embedding import FuseRotaryEmbeddingPass

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

WHOLE = """
g (float[B, 2, S, 8] x, float[B, S, 4] angles) => (float[B, 2, S, 8] y)
<int64[1] zero = {{0}}, int64[1] half = {{{half}}}, int64[1] end = {{9223372036854775807}},
 int64[1] last = {{3}}, int64[1] one = {{1}}, float scaling = {{{scaling}}}>
{{
    twice = Concat<axis = -1>(angles, {second})
    cosine = Cos(twice)
    sine = Sin(twice)
    {scale}
    c = Unsqueeze({cosine}, one)
    s = Unsqueeze({sine}, one)
    low = Slice(x, zero, half, last, one)
    high = Slice(x, half, end, last, one)
    minus = Neg(high)
    rotated = Concat<axis = -1>(minus, low)
    kept = Mul(x, c)
    turned = Mul(rotated, s)
    y = Add(kept, turned)
}}
"""
PLAIN = {"half": 4, "scaling": 1.0, "second": "angles", "scale": ""}
PLAIN |= {"cosine": "cosine", "sine": "sine"}
SCALED = PLAIN | {
    "scaling": 1.5,
    "scale": "cs = Mul(cosine, scaling)\n    ss = Mul(sine, scaling)",
    "cosine": "cs",
    "sine": "ss",
}
PARTIAL = """
g (float[B, 2, S, 12] x, float[B, S, 4] angles) => (float[B, 2, S, 12] y)
<int64[1] zero = {{0}}, int64[1] half = {{4}}, int64[1] part = {{8}}, int64[1] rest = {{{rest}}},
 int64[1] end = {{9223372036854775807}}, int64[1] last = {{3}}, int64[1] one = {{1}}>
{{
    twice = Concat<axis = -1>(angles, angles)
    cosine = Cos(twice)
    sine = Sin(twice)
    c = Unsqueeze(cosine, one)
    s = Unsqueeze(sine, one)
    first = Slice(x, zero, part, last, one)
    low = Slice(first, zero, half, last, one)
    high = Slice(first, half, end, last, one)
    minus = Neg(high)
    rotated = Concat<axis = -1>(minus, low)
    kept = Mul(first, c)
    turned = Mul(rotated, s)
    new = Add(kept, turned)
    remaining = Slice(x, rest, end, last, one)
    y = Concat<axis = -1>(new, remaining)
}}
"""


def inputs(width: int) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    return {
        "x": generator.normal(size=(2, 2, 5, width)).astype(np.float32),
        "angles": generator.normal(size=(2, 5, 4)).astype(np.float32),
    }


@pytest.mark.parametrize(("fields", "left"), [(PLAIN, 3), (SCALED, 5)])
def test_fuses_and_keeps_the_output_when_the_whole_head_turns(
    fields: dict[str, object], left: int, tmp_path: Path
) -> None:
    model = build(WHOLE.format(**fields))
    before = run(model, inputs(8), tmp_path)
    assert FuseRotaryEmbeddingPass()(model).modified
    assert operators(model)["RotaryEmbedding"] == 1
    assert sum(operators(model).values()) == left
    np.testing.assert_allclose(run(model, inputs(8), tmp_path)[0], before[0], atol=1e-6)


def test_fuses_and_keeps_the_output_when_a_part_of_the_head_turns(tmp_path: Path) -> None:
    model = build(PARTIAL.format(rest=8))
    before = run(model, inputs(12), tmp_path)
    assert FuseRotaryEmbeddingPass()(model).modified
    assert operators(model) == {"RotaryEmbedding": 1, "Cos": 1, "Sin": 1}
    np.testing.assert_allclose(run(model, inputs(12), tmp_path)[0], before[0], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"half": 3}, "x is not cut into two halves"),
        ({"second": "other"}, "cosine or sine is not of twice the same angles"),
    ],
)
def test_refuses_with_a_reason(change: dict[str, object], reason: str) -> None:
    text = WHOLE.format(**(PLAIN | change)).replace(
        "float[B, S, 4] angles)", "float[B, S, 4] angles, float[B, S, 4] other)"
    )
    model = build(text)
    assert reason in [refusal.reason for refusal in FuseRotaryEmbeddingPass().explain(model)]
    assert not FuseRotaryEmbeddingPass()(model).modified


def test_keeps_the_concatenation_when_the_parts_overlap() -> None:
    text = PARTIAL.format(rest=6).replace("float[B, 2, S, 12] y", "float[B, 2, S, 14] y")
    model = build(text)
    FuseRotaryEmbeddingPass()(model)
    assert operators(model)["Concat"] == 1
    reasons = [refusal.reason for refusal in FuseRotaryEmbeddingPass().explain(model)]
    assert "the parts are not the first and the rest of x" in reasons


def as_half(text: str, kind: str, number: int) -> str:
    """x and the result in half precision, cosine and sine cast to it as transformers does."""
    text = text.replace("float[B, 2, S,", f"{kind}[B, 2, S,")
    text = text.replace(
        "c = Unsqueeze(cosine", f"ch = Cast<to = {number}>(cosine)\n c = Unsqueeze(ch"
    )
    return text.replace("s = Unsqueeze(sine", f"sh = Cast<to = {number}>(sine)\n s = Unsqueeze(sh")


def test_keeps_angles_cosine_and_sine_in_float32_when_x_is_half(tmp_path: Path) -> None:
    model = build(as_half(WHOLE.format(**PLAIN), "float16", 10))
    fed = inputs(8) | {"x": inputs(8)["x"].astype(np.float16)}
    before = run(model, fed, tmp_path)
    assert FuseRotaryEmbeddingPass()(model).modified
    assert operators(model) == {"RotaryEmbedding": 1, "Cos": 1, "Sin": 1, "Cast": 2}
    for node in model.graph:
        source = node.inputs[0]
        assert source is not None
        if node.op_type == "Cast":
            assert node.attributes["to"].as_int() == 10
            assert source.producer() is not None
        elif node.op_type in ("Cos", "Sin"):
            assert str(source.dtype) == "FLOAT"
    # Three roundings to half precision on both sides, in another order: two units.
    np.testing.assert_allclose(run(model, fed, tmp_path)[0], before[0], atol=2**-9)


def test_fuses_the_part_of_a_head_in_bfloat16() -> None:
    model = build(as_half(PARTIAL.format(rest=8), "bfloat16", 16))
    assert FuseRotaryEmbeddingPass()(model).modified
    assert operators(model) == {"RotaryEmbedding": 1, "Cos": 1, "Sin": 1, "Cast": 2}


def test_refuses_when_the_tables_are_of_another_type_than_x() -> None:
    model = build(WHOLE.format(**PLAIN).replace("float[B, 2, S, 8] x", "float16[B, 2, S, 8] x"))
    reasons = [refusal.reason for refusal in FuseRotaryEmbeddingPass().explain(model)]
    assert "cosine and sine are of another type than x" in reasons
    assert not FuseRotaryEmbeddingPass()(model).modified
