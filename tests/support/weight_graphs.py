"""Graphs with weights of the file, run and looked at as ONNX Runtime rewrites them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from support.graph_cases import build

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["exact_session", "fused_operators", "model_with", "run_file", "save"]


def model_with(body: str, arrays: Mapping[str, NDArray[Any]]) -> ir.Model:
    """A model from ONNX's text form; graph inputs of these names become weights."""
    model = build(body)
    for value in [value for value in model.graph.inputs if value.name in arrays]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(arrays[str(value.name)], name=value.name)
        model.graph.initializers.add(value)
    return model


def save(model: ir.Model, folder: Path) -> Path:
    """Writes the model, weights beside it, and checks it against ONNX's rules."""
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data")
    onnx.checker.check_model(str(path), full_check=True)
    return path


def exact_session(path: Path) -> onnxruntime.InferenceSession:
    """A session with float activations: by itself ONNX Runtime rounds them to INT8 as well."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_file(path: Path, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Outputs with float activations."""
    outputs = exact_session(path).run(None, dict(inputs))
    return [np.asarray(output) for output in outputs]


def fused_operators(path: Path, folder: Path) -> Counter[str]:
    """Counts the operators of the graph that ONNX Runtime makes of it and runs."""
    optimized = folder / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that such a file fits this machine only
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    proto = onnx.load(str(optimized), load_external_data=False)
    return Counter(node.op_type for node in proto.graph.node)
