from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.graph_cases import build, operators, run

from vlmport.graphs.passes.decompose_softcap_attention import DecomposeSoftcapAttentionPass

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

BATCH, HEADS, KV_HEADS, SEQUENCE, KEYS = 2, 4, 2, 5, 9
SOFTCAP = 2.0

# Inputs of Attention behind q, k and v -> the ports that they need.
INPUTS = {
    "": "",
    ", mask": "bool[B, 1, S, T] mask",
    ', "", "", "", lengths': "int64[B] lengths",
    ', mask, "", "", lengths': "bool[B, 1, S, T] mask, int64[B] lengths",
}


def text(
    extra: str = ', mask, "", "", lengths',
    dtype: str = "float",
    kv_heads: int = KV_HEADS,
    attributes: str = "scale = 0.3",
) -> str:
    ports = INPUTS[extra]
    return f"""
g ({dtype}[B, {HEADS}, S, 16] q, {dtype}[B, {kv_heads}, T, 16] k,
   {dtype}[B, {kv_heads}, T, 8] v{", " if ports else ""}{ports}) => ({dtype}[B, {HEADS}, S, 8] y)
{{
    y = Attention<softcap = {SOFTCAP}, {attributes}>(q, k, v{extra})
}}
"""


def arrays(dtype: type = np.float32, kv_heads: int = KV_HEADS) -> dict[str, NDArray[Any]]:
    """One query of the first row sees no key by its mask."""
    generator = np.random.default_rng(0)
    shapes = {
        "q": (BATCH, HEADS, SEQUENCE, 16),
        "k": (BATCH, kv_heads, KEYS, 16),
        "v": (BATCH, kv_heads, KEYS, 8),
    }
    made: dict[str, NDArray[Any]] = {
        n: generator.normal(0, 2, s).astype(dtype) for n, s in shapes.items()
    }
    mask = generator.random((BATCH, 1, SEQUENCE, KEYS)) < 0.5
    mask[..., 0] = True
    mask[0, 0, 2] = False
    return {**made, "mask": mask, "lengths": np.array([9, 6])}


def both(source: str, inputs: dict[str, NDArray[Any]], folder: Path) -> list[NDArray[Any]]:
    """Output of the node, then of what takes its place."""
    model = build(source)
    fed = {str(port.name): inputs[str(port.name)] for port in model.graph.inputs}
    (before,) = run(model, fed, folder)
    assert DecomposeSoftcapAttentionPass()(model).modified
    assert operators(model)["Attention"] == 0
    assert operators(model)["Expand"] + operators(model)["Tile"] == 0  # no copy for a head
    assert not DecomposeSoftcapAttentionPass()(model).modified
    (after,) = run(model, fed, folder)
    return [before, after]


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("extra", INPUTS)
def test_equals_onnx_runtimes_attention(extra: str, causal: int, tmp_path: Path) -> None:
    source = text(extra, attributes=f"scale = 0.3, is_causal = {causal}")
    before, after = both(source, arrays(), tmp_path)
    np.testing.assert_allclose(after, before, atol=2e-6)
    # A node that forgot the cap would be told apart.
    (uncapped,) = run(build(source.replace("softcap = 2.0, ", "")), fed(extra), tmp_path)
    assert np.abs(uncapped - before).max() > 0.1


def fed(extra: str) -> dict[str, NDArray[Any]]:
    names = {"q", "k", "v", *INPUTS[extra].replace(",", " ").split()}
    return {name: array for name, array in arrays().items() if name in names}


@pytest.mark.parametrize("kv_heads", [1, HEADS])
def test_any_number_of_heads_shares_keys(kv_heads: int, tmp_path: Path) -> None:
    before, after = both(text(kv_heads=kv_heads), arrays(kv_heads=kv_heads), tmp_path)
    np.testing.assert_allclose(after, before, atol=2e-6)


def test_scale_is_that_of_the_head_if_none_is_given(tmp_path: Path) -> None:
    before, after = both(text(attributes="is_causal = 0"), arrays(), tmp_path)
    np.testing.assert_allclose(after, before, atol=2e-6)


def test_a_query_without_a_key_gets_zeros(tmp_path: Path) -> None:
    before, after = both(text(), arrays(), tmp_path)
    assert not before[0, :, 2].any()
    assert not after[0, :, 2].any()
    assert after[0, :, 3].any()


def test_half_precision_is_at_least_as_exact(tmp_path: Path) -> None:
    inputs = arrays(np.float16)
    before, after = both(text(dtype="float16"), inputs, tmp_path)
    wide = {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in inputs.items()}
    (exact,) = run(build(text()), wide, tmp_path)
    assert after.dtype == np.float16
    assert np.abs(after - exact).max() <= np.abs(before - exact).max()


def test_large_half_precision_scores_do_not_overflow(tmp_path: Path) -> None:
    inputs = arrays(np.float16)
    inputs["q"], inputs["k"] = inputs["q"] * np.float16(40), inputs["k"] * np.float16(40)
    products = inputs["q"].astype(np.float32) @ inputs["k"][:, :1].astype(np.float32).mT
    assert np.abs(products).max() > np.finfo(np.float16).max
    source = text(dtype="float16", attributes="scale = 0.05")
    _, after = both(source, inputs, tmp_path)
    wide = {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in inputs.items()}
    (exact,) = run(build(text(attributes="scale = 0.05")), wide, tmp_path)
    np.testing.assert_allclose(after, exact, atol=5e-3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Case 1: no soft cap.
        (f"softcap = {SOFTCAP}, ", ""),
        (f"softcap = {SOFTCAP}", "softcap = 0.0"),
        # Case 2: heads that are not fixed, three axes, another element type.
        (f"float[B, {HEADS}, S, 16] q", "float[B, H, S, 16] q"),
        ("float[B, 2, T, 16] k", "float[B, T, 32] k"),
        ("float", "double"),
        # Case 3: a past, or a second output.
        ('mask, "", "", lengths', "mask, k, v"),
        ("    y = Att", "    y, present = Att"),
        # Case 4: numbers that are added, a mask that all rows share, fewer keys.
        ("bool[B, 1, S, T] mask", "float[B, 1, S, T] mask"),
        ("bool[B, 1, S, T] mask", "bool[S, T] mask"),
        ("bool[B, 1, S, T] mask", "bool[B, 1, S, R] mask"),
        # Case 5.
        ("scale = 0.3", "scale = 0.3, softmax_precision = 10"),
    ],
)
def test_refuses_other_forms(old: str, new: str) -> None:
    source = text().replace(old, new)
    assert source != text()
    model = build(source)
    assert not DecomposeSoftcapAttentionPass()(model).modified
    assert operators(model) == {"Attention": 1}
