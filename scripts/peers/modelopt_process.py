"""Quantizes one graph with nvidia-modelopt; run by the interpreter of its own environment.

    PYTHON modelopt_process.py '{"graph": .., "inputs": .., "target": .., "mode": .., "method": ..}'

It imports nothing of vlmport, and nothing that modelopt does not bring.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from modelopt.onnx.quantization import quantize  # type: ignore[import-not-found]  # not ours
from onnxruntime.quantization import CalibrationDataReader

_BLOCK = 32


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Hands out the recorded runs of a graph, as modelopt's own reader does."""

    def __init__(self, runs: list[dict[str, Any]]) -> None:
        self._runs = runs
        self.rewind()

    def rewind(self) -> None:
        """Starts again."""
        self._waiting = list(self._runs)

    def get_first(self) -> dict[str, Any]:
        """The first run's inputs by name."""
        return self._runs[0]

    def get_next(self) -> Any:  # None at the end, which the base's types leave out
        """The next run's inputs by name; None after the last."""
        return self._waiting.pop(0) if self._waiting else None


def _read(folder: Path) -> list[dict[str, Any]]:
    runs = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            runs.append(dict(arrays))
    return runs


def _of_one_length(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompts without their ends, and no decode steps, as AWQ needs runs of one shape.

    It concatenates activations [batch, sequence_length, channels] along the batch.
    """
    if "inputs_embeds" not in runs[0]:
        return runs
    prompts = [run for run in runs if run["inputs_embeds"].shape[1] > 1]
    length = min(run["inputs_embeds"].shape[1] for run in prompts)
    for run in prompts:
        run["inputs_embeds"] = run["inputs_embeds"][:, :length]
        run["position_ids"] = run["position_ids"][:, :length]
        run["valid_lengths"] = np.full_like(run["valid_lengths"], length)
    return prompts


def main() -> None:
    """Reads the job from the command line."""
    job = json.loads(sys.argv[1])
    options: dict[str, Any] = {}
    runs = _read(Path(job["inputs"]))
    if job["method"].startswith("awq"):
        runs = _of_one_length(runs)
    if job["mode"] == "int8":
        # What `vlmport quantize` quantizes; without it "GEMV" layers, such as the head, stay float.
        options["op_types_to_quantize"] = ["MatMul", "Gemm", "Conv"]
        options["enable_gemv_detection_for_trt"] = False
    else:
        options["block_size"] = _BLOCK
    quantize(
        job["graph"],
        quantize_mode=job["mode"],
        calibration_method=job["method"],
        calibration_data_reader=_Reader(runs),
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=job["target"],
        log_level="WARNING",
        **options,
    )


if __name__ == "__main__":
    main()
