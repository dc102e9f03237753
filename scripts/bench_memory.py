"""Measures peak memory and time of exporting and running a checkpoint of true 3B shapes.

Writes a synthetic TinyLLaVA-3.1B (SigLIP-so400m + Phi-2, random float16 weights, 6 GB) shard by
shard, copies it for comparison, exports it and generates with the bundle, each in a process of
its own whose peak resident memory the operating system reports.

    python scripts/bench_memory.py --folder build/bench-memory
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from synthetic import TINYLLAVA_3B, write_checkpoint

from vlmport.manifest import load_manifest

_MIB = 1024 * 1024
_PROMPT = "What is in the picture, and what colour is it?"


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/bench-memory"))
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint and the bundle")
    options = parser.parse_args()
    checkpoint, bundle = options.folder / "checkpoint", options.folder / "bundle"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, TINYLLAVA_3B, "float16")
    stored = sum(path.stat().st_size for path in checkpoint.iterdir())
    copy_seconds = _copy(checkpoint, options.folder / "copy")
    export = ["export", str(checkpoint), str(bundle), "--overwrite"]
    export_seconds, export_peak = _vlmport(export)
    manifest = load_manifest(bundle)
    picture = options.folder / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    generate_seconds, generate_peak = _vlmport(
        [
            *("generate", str(bundle), "--image", str(picture), "--prompt", _PROMPT),
            *("--max-new-tokens", str(options.new_tokens), "--json"),
        ]
    )
    weights = sum(graph.parameter_bytes for graph in manifest.graphs)
    tokens = manifest.prompt.image_tokens.count + 100
    cache = manifest.kv_layout.bytes_per_token(4) * tokens
    report = {
        "environment": _environment(),
        "checkpoint_bytes": stored,
        "copy_seconds": round(copy_seconds, 1),
        "export_seconds": round(export_seconds, 1),
        "export_seconds_allowed": round(3 * copy_seconds + 120, 1),
        "export_peak_mib": round(export_peak / _MIB),
        "export_peak_mib_allowed": 2048,
        "graph_weight_bytes": weights,
        "generate_seconds": round(generate_seconds, 1),
        "generate_peak_mib": round(generate_peak / _MIB),
        "generate_peak_mib_allowed": round((1.25 * weights + cache) / _MIB + 300),
    }
    print(json.dumps(report, indent=2))
    if not options.keep:
        shutil.rmtree(options.folder)


def _copy(source: Path, target: Path) -> float:
    """Seconds of copying a folder and flushing it to the disk."""
    started = time.monotonic()
    shutil.copytree(source, target)
    os.sync()
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def _vlmport(arguments: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a vlmport command; its output goes to stderr."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "vlmport", *arguments], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"vlmport {arguments[0]} failed")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def _environment() -> dict[str, object]:
    import onnxruntime
    import torch
    import transformers

    return {
        "platform": platform.platform(),
        "processor": platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


if __name__ == "__main__":
    main()
