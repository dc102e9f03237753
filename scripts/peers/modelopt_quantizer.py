"""nvidia-modelopt's quantizers of ONNX graphs, each run in a process of modelopt's environment."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ModeloptPeer", "modelopt_versions"]

_SCRIPT = Path(__file__).with_name("modelopt_process.py")
_PACKAGES = ("nvidia-modelopt", "onnxruntime", "onnxruntime-gpu", "onnx", "torch")
_ASK_VERSIONS = """
import importlib.metadata, sys
for name in sys.argv[1:]:
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        pass
"""


@dataclass(frozen=True, slots=True)
class ModeloptPeer:
    """`modelopt.onnx.quantization.quantize`.

    Attributes:
        python: interpreter of an environment with modelopt; None if there is none.
        mode: "int8" or "int4".
        method: its `calibration_method`.
    """

    python: Path | None
    mode: str
    method: str

    @property
    def gemm_as_matmul(self) -> bool:
        """INT4 is for MatMul with the weight's input channels first."""
        return self.mode == "int4"

    def quantize(self, graph: Path, inputs: Path, target: Path) -> None:
        """Writes the quantized graph; arguments as in `StaticPeer.quantize`.

        Raises:
            RuntimeError: if no environment was given, or modelopt failed.
        """
        if self.python is None:
            raise RuntimeError("not run: --modelopt-python was not given")
        job = {
            "graph": str(graph.resolve()),
            "inputs": str(inputs.resolve()),
            "target": str(target.resolve()),
            "mode": self.mode,
            "method": self.method,
        }
        command = [str(self.python), str(_SCRIPT), json.dumps(job)]
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode or not target.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")


def modelopt_versions(python: Path | None) -> str:
    """What the environment has, in words."""
    if python is None:
        return "no environment with nvidia-modelopt was given"
    command = [str(python), "-c", _ASK_VERSIONS, *_PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return ", ".join(done.stdout.splitlines())
