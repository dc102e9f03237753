"""Generated weights of the mask decoder, in the published file's form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["mask_weights", "save_mask_weights"]

# vae-oid.npz as google-research/big_vision, transfers/segmentation.py, _get_params reads it:
# PyTorch's names and layouts.
_SHAPES: dict[str, tuple[int, ...]] = {
    "_vq_vae._embedding": (128, 512),
    "decoder.0.weight": (128, 512, 1, 1),
    "decoder.2.net.0.weight": (128, 128, 3, 3),
    "decoder.2.net.2.weight": (128, 128, 3, 3),
    "decoder.2.net.4.weight": (128, 128, 1, 1),
    "decoder.3.net.0.weight": (128, 128, 3, 3),
    "decoder.3.net.2.weight": (128, 128, 3, 3),
    "decoder.3.net.4.weight": (128, 128, 1, 1),
    "decoder.4.weight": (128, 128, 4, 4),
    "decoder.6.weight": (128, 64, 4, 4),
    "decoder.8.weight": (64, 32, 4, 4),
    "decoder.10.weight": (32, 16, 4, 4),
    "decoder.12.weight": (1, 16, 1, 1),
}
_TRANSPOSED = ("decoder.4", "decoder.6", "decoder.8", "decoder.10")


def mask_weights() -> dict[str, NDArray[np.float32]]:
    """Random values at scales that keep the mask's values around 0, of both signs."""
    generator = np.random.default_rng(0)
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, shape in _SHAPES.items():
        module = name.removesuffix(".weight")
        is_transposed = module in _TRANSPOSED
        fan_in = shape[0] * 4 if is_transposed else int(np.prod(shape[1:]))
        scale = 1.0 if name.startswith("_vq_vae") else 1.4 * fan_in**-0.5
        arrays[name] = generator.normal(0, scale, shape).astype(np.float32)
        if name.endswith(".weight"):
            outputs = shape[1] if is_transposed else shape[0]
            arrays[f"{module}.bias"] = generator.normal(0, 0.1, outputs).astype(np.float32)
    arrays["decoder.12.bias"] -= 0.1
    # The published file holds the whole autoencoder.
    arrays["encoder.0.weight"] = generator.normal(0, 1, (64, 1, 4, 4)).astype(np.float32)
    return arrays


def save_mask_weights(path: Path) -> Path:
    """Writes them as .npz."""
    np.savez(path, **mask_weights())  # type: ignore[arg-type]  # numpy's own annotation of **kwds
    return path
