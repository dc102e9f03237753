from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graph_cases import build
from support.quantization_graphs import statistics_of

from vlmport.calibration.layers import Layer, find_layers
from vlmport.calibration.outliers import outlier_layers, outlier_ratio
from vlmport.errors import CalibrationError


def layers() -> tuple[Layer, ...]:
    model = build("""g (float[n, 4] x, float[n, 4] v, float[4, 4] w, float[4, 4] u)
        => (float[n, 4] y, float[n, 4] z) { y = MatMul(x, w) z = MatMul(v, u) }""")
    for name in ("w", "u"):
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(np.eye(4, dtype=np.float32), name=name)
        model.graph.initializers.add(value)
    return find_layers(model)


def test_finds_the_layer_with_one_massive_value() -> None:
    rng = np.random.default_rng(0)
    usual = rng.normal(size=(5000, 4)).astype(np.float32)
    massive = usual.copy()
    massive[0, 2] = 1000.0
    statistics = {"x": statistics_of([usual]), "v": statistics_of([massive])}
    found = layers()
    assert outlier_layers(found, statistics) == ("u",)
    assert outlier_layers(found, statistics, ratio=1e6) == ()
    assert outlier_ratio(found[0], statistics) == pytest.approx(1.4, abs=0.3)
    # 99.9 % of a normal distribution lie within 3.29; the bins are half a unit wide here.
    assert outlier_ratio(found[1], statistics) == pytest.approx(1000 / 3.29, rel=0.1)


def test_activation_that_is_always_zero_is_no_outlier() -> None:
    zeros = np.zeros((10, 4), np.float32)
    statistics = {"x": statistics_of([zeros]), "v": statistics_of([zeros])}
    assert outlier_layers(layers(), statistics) == ()


def test_refuses_statistics_without_histogram() -> None:
    with pytest.raises(CalibrationError, match="w: no histogram of its activation 'x'"):
        outlier_layers(layers(), {})
