"""The request that a model gets before it is ready, so that the first user does not wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlmport.contract import NativeSizeImages, PatchImages
from vlmport.runtime.preprocessing import prepare_image
from vlmport.runtime.triton.graph_models import graph_batch, triton_tensor
from vlmport.runtime.triton.model_config import TritonTensor, WarmupInput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from vlmport.contract import ImagePreprocessing, Manifest, TensorSpec

__all__ = ["first_requests"]

_TOKENS = 16  # of a prompt
_GREY = (96, 128, 160)


def first_requests(
    manifest: Manifest, graphs: tuple[str, ...], max_batch: int
) -> dict[str, tuple[WarmupInput, ...]]:
    """Graph -> inputs as the largest picture has them, floating-point ones zero.

    Integers and masks mean something (how many patches a picture has), so that they are those of a
    real picture.

    Args:
        manifest: of the bundle.
        graphs: of `graph_models.served_graphs`.
        max_batch: as in `graph_models.graph_batch`.
    """
    arrays = prepare_image(_largest_picture(manifest.image), manifest.image).tiles()[0]
    axes = _axis_lengths(manifest, arrays)
    return {
        graph: tuple(
            _input(port, axes, arrays, is_batched=graph_batch(manifest, graph, max_batch) > 0)
            for port in manifest.graph(graph).inputs
        )
        for graph in graphs
    }


def _largest_picture(steps: ImagePreprocessing) -> Image.Image:
    """One that preprocessing does not shrink; fixed sizes come of any."""
    if isinstance(steps, PatchImages):
        return Image.new("RGB", (steps.max_width, steps.max_height), _GREY)
    edge = steps.longest_edge if isinstance(steps, NativeSizeImages) else 64
    return Image.new("RGB", (edge, edge), _GREY)


def _axis_lengths(manifest: Manifest, arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    axes = {"batch": 1, "sequence_length": min(_TOKENS, manifest.dimensions.max_length)}
    for graph in manifest.image_graphs:
        for port in manifest.graph(graph).inputs:
            if port.name in arrays:
                lengths = zip(port.shape, arrays[port.name].shape, strict=True)
                axes |= {axis: length for axis, length in lengths if isinstance(axis, str)}
    steps = manifest.image
    if isinstance(steps, NativeSizeImages):
        axes["num_patches"] = (axes["height"] // steps.patch_size) * (
            axes["width"] // steps.patch_size
        )
    return axes


def _input(
    port: TensorSpec,
    axes: Mapping[str, int],
    arrays: Mapping[str, NDArray[Any]],
    *,
    is_batched: bool,
) -> WarmupInput:
    shape = tuple(axis if isinstance(axis, int) else axes[axis] for axis in port.shape)
    dims = shape[1:] if is_batched else shape
    tensor = TritonTensor(port.name, triton_tensor(port).data_type, dims)
    if port.dtype == "bool":
        return WarmupInput(tensor, np.ones(shape, np.bool_).tobytes())
    if port.name in arrays and port.dtype.startswith("int"):
        return WarmupInput(tensor, np.ascontiguousarray(arrays[port.name]).tobytes())
    return WarmupInput(tensor)
