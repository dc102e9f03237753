from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from vlmport.graphs.half_tensors import HALF_LIMITS, HalfType, magnitudes, narrowed


def test_rounds_to_nearest_ties_to_even() -> None:
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, -(2.0**-25), 2.0**-25 * 1.01], np.float32)
    found = narrowed(ir.tensor(values), ir.DataType.FLOAT16).numpy()
    expected = np.array([1, 1 + 2**-9, -0.0, 2.0**-24], np.float16)
    np.testing.assert_array_equal(found, expected)
    bfloat16 = narrowed(ir.tensor(values), ir.DataType.BFLOAT16)
    np.testing.assert_array_equal(bfloat16.numpy(), values.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("name", "dtype"), [("FLOAT16", np.float16), ("BFLOAT16", ml_dtypes.bfloat16)]
)
def test_limits_are_those_of_the_types(name: HalfType, dtype: Any) -> None:
    limits = HALF_LIMITS[name]
    about: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    assert limits.largest == float(about.max)
    assert limits.smallest_normal == float(about.smallest_normal)
    assert limits.smallest == float(about.smallest_subnormal)


def test_magnitudes_are_of_all_blocks_and_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmport.graphs.half_tensors._BLOCK", 2)
    values = np.array([[0.0, -3.0, np.inf], [0.5, -0.25, 7.0], [0, 0, -9.0]], np.float32)
    assert magnitudes(ir.tensor(values)) == (9.0, 0.25)
    assert magnitudes(ir.tensor(np.zeros(3, np.float32))) == (0.0, np.inf)
