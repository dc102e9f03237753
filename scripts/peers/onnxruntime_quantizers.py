"""ONNX Runtime's own quantizers: quantize_static and matmul_nbits_quantizer."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    RTNWeightOnlyQuantConfig,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


__all__ = ["NBitsPeer", "StaticPeer"]

_LAYERS = ["MatMul", "Gemm", "Conv"]
# A single run is handed over at a time. ONNX Runtime's histogram calibrators make one array of all
# runs (`np.asarray`), which fails for prompts of several lengths. Bins then have the width that the
# first run's range gives, and more are added: no fewer than with one array.
_RUNS_AT_A_TIME = {"CalibStridedMinMax": 1}
# What TensorRT takes, and what `vlmport quantize` writes: zero points of 0, integers in front of a
# layer but not behind it, no product of two activations.
_AS_TENSORRT_NEEDS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "MatMulConstBOnly": True,
    "OpTypesToExcludeOutputQuantization": _LAYERS,
}


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Hands out the recorded runs of a graph, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.npz"))
        self.set_range(0, len(self._files))

    def __len__(self) -> int:
        return len(self._files)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Goes on with these runs."""
        self._waiting = self._files[start_index:end_index]

    def get_next(self) -> Any:  # None at the end, which the base's types leave out
        """The next run's inputs by name; None after the last."""
        if not self._waiting:
            return None
        path, *self._waiting = self._waiting
        with np.load(path) as arrays:
            return dict(arrays)


@dataclass(frozen=True, slots=True)
class StaticPeer:
    """`quantize_static` in QDQ form, int8 activations and weights.

    Attributes:
        method: calibration: "MinMax", "Entropy" or "Percentile".
        defaults: whether all options are the function's own; else those that TensorRT needs.
        smooth: whether its SmoothQuant is asked for.
    """

    method: str
    defaults: bool = False
    smooth: bool = False
    gemm_as_matmul = False

    def quantize(self, graph: Path, inputs: Path, target: Path) -> None:
        """Writes the quantized graph.

        Args:
            graph: the float graph.
            inputs: folder of its recorded inputs.
            target: file to write.
        """
        options = {} if self.defaults else dict(_AS_TENSORRT_NEEDS)
        if self.smooth:
            options["SmoothQuant"] = True
        with redirect_stdout(sys.stderr):  # it prints its progress
            quantize_static(
                graph,
                target,
                _Reader(inputs),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=None if self.defaults else _LAYERS,
                per_channel=not self.defaults,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod[self.method],
                extra_options={**_RUNS_AT_A_TIME, **options},
            )


@dataclass(frozen=True, slots=True)
class NBitsPeer:
    """`MatMulNBitsQuantizer`: weights alone.

    Attributes:
        algorithm: "DEFAULT", "RTN", "GPTQ", "HQQ" or "k_quant".
        symmetric: whether there are no zero points.
        bits: of a weight.
        block_size: weights that share a scale.
        standard: whether the graph keeps to standard operators (QDQ); else MatMulNBits.
        tuning: further options of GPTQ.
        accuracy_level: how the operator MatMulNBits computes: 4 rounds activations to int8 on the
            fly, which is what ONNX Runtime makes of every standard graph; 0 takes them as they are.
    """

    algorithm: str
    symmetric: bool
    bits: int = 4
    block_size: int = 32
    standard: bool = False
    tuning: Mapping[str, Any] = field(default_factory=dict[str, Any])
    accuracy_level: int = 4
    gemm_as_matmul = True

    def quantize(self, graph: Path, inputs: Path, target: Path) -> None:
        """Writes the quantized graph; arguments as in `StaticPeer.quantize`."""
        quantizer = MatMulNBitsQuantizer(
            onnx.load(graph),
            bits=self.bits,
            block_size=self.block_size,
            is_symmetric=self.symmetric,
            algo_config=self._config(inputs),
        )
        with redirect_stdout(sys.stderr):  # it prints its progress
            quantizer.process()
        wrapped: Any = quantizer.model  # an ONNXModel, once it has run
        model = wrapped.model
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                _set_accuracy_level(node, self.accuracy_level)
        onnx.save(model, target)

    def _config(self, inputs: Path) -> Any:  # onnxruntime ships no types
        match self.algorithm:
            case "DEFAULT":
                return DefaultWeightOnlyQuantConfig(
                    block_size=self.block_size,
                    is_symmetric=self.symmetric,
                    quant_format=QuantFormat.QDQ if self.standard else QuantFormat.QOperator,
                    bits=self.bits,
                )
            case "RTN":
                return RTNWeightOnlyQuantConfig()
            case "k_quant":
                return KQuantWeightOnlyQuantConfig()
            case "HQQ":
                return HQQWeightOnlyQuantConfig(block_size=self.block_size, bits=self.bits)
            case "GPTQ":
                # `block_size` is that of the algorithm; the scales' is MatMulNBitsQuantizer's.
                return GPTQWeightOnlyQuantConfig(_Reader(inputs), **self.tuning)
            case _:
                raise ValueError(f"algorithm: found {self.algorithm!r}")


def _set_accuracy_level(node: onnx.NodeProto, level: int) -> None:
    others = [each for each in node.attribute if each.name != "accuracy_level"]
    del node.attribute[:]
    node.attribute.extend([*others, onnx.helper.make_attribute("accuracy_level", level)])
