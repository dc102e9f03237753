from __future__ import annotations

import numpy as np
import onnx_ir as ir
from support.graph_cases import build

from vlmport.export.recipe import RECIPE_KEY
from vlmport.graphs.float32_regions import float32_regions

GRAPH = """
g (int64[1, 4] position_ids, float[1, 4, 4] x)
    => (float[1, 4, 4] turned, float[1, 4, 4] normed, float[1, 4, 4] gemma, float[1, 4] sums)
<float[4] weight, float[4] inverse = {1.0, 0.5, 0.25, 0.125}, float two = {2.0},
 float one = {1.0}, float eps = {0.00001}, int64[1] axis = {-1}, int64[1] last = {-1}>
{
    position = Cast<to = 1>(position_ids)
    column = Unsqueeze(position, last)
    angle = Mul(column, inverse)
    cosine = Cos(angle)
    turned = Mul(x, cosine)
    square = Pow(x, two)
    mean = ReduceMean(square, axis)
    shifted = Add(mean, eps)
    root = Sqrt(shifted)
    inverse_root = Reciprocal(root)
    normal = Mul(x, inverse_root)
    normed = Mul(normal, weight)
    scale = Add(weight, one)
    gemma = RMSNormalization(x, scale)
    sums = ReduceSum<keepdims = 0>(x, axis)
}
"""


def test_each_region_is_found_and_nothing_else() -> None:
    model = build(GRAPH.replace("<float[4] weight,", "<float[4] weight = {1.0, 1.0, 1.0, 1.0},"))
    weight = model.graph.initializers["weight"]
    tensor = ir.tensor(np.ones(4, np.float32), name="weight")
    tensor.metadata_props[RECIPE_KEY] = "norm.weight | cast FLOAT"
    weight.const_value = tensor
    found = {str(node.outputs[0].name): why for node, why in float32_regions(model).items()}
    assert found == {
        "position": "positions",
        "column": "positions",
        "angle": "positions",
        "cosine": "positions",
        "square": "norm",
        "mean": "norm",
        "shifted": "norm",
        "root": "norm",
        "inverse_root": "norm",
        "normal": "norm",
        "scale": "scale of a norm",
        "gemma": "scale of a norm",
        "sums": "sum",
    }
