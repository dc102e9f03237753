"""Tells what a bundle is, from its manifest alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from vlmport.contract import ImagePreprocessing, Manifest, NativeSizeImages, PatchImages
from vlmport.manifest import load_manifest
from vlmport.manifest_rules import DTYPE_BYTES

__all__ = ["Inspection", "image_steps", "inspect", "inspection_json"]


@dataclass(frozen=True, slots=True)
class Inspection:
    """A bundle's manifest and the sizes that follow from it.

    Attributes:
        bundle: the folder.
        parameter_bytes: bytes of the weights that all graphs read.
        file_bytes: bytes of all files, without the manifest.
        kv_bytes_per_token: cache bytes that one token of one sequence takes.
        kv_bytes_at_max_length: cache bytes of one sequence of the greatest length.
        manifest: all that the bundle says of itself.
    """

    bundle: Path
    parameter_bytes: int
    file_bytes: int
    kv_bytes_per_token: int
    kv_bytes_at_max_length: int
    manifest: Manifest


_INSPECTION = TypeAdapter(Inspection)


def inspect(bundle: Path) -> Inspection:
    """Read a bundle's manifest; no graph and no weight is opened.

    Raises:
        BundleError: if the manifest cannot be used.
    """
    manifest = load_manifest(bundle)
    cache = manifest.kv_layout
    per_token = cache.bytes_per_token(DTYPE_BYTES[cache.dtype])
    return Inspection(
        bundle=bundle,
        parameter_bytes=sum(graph.parameter_bytes for graph in manifest.graphs),
        file_bytes=sum(entry.size for entry in manifest.files),
        kv_bytes_per_token=per_token,
        kv_bytes_at_max_length=per_token * manifest.dimensions.max_length,
        manifest=manifest,
    )


def inspection_json(inspection: Inspection) -> str:
    """The inspection as one JSON object, the manifest under the key "manifest"."""
    return _INSPECTION.dump_json(inspection, indent=2).decode()


def image_steps(image: ImagePreprocessing) -> list[str]:
    """The steps that a picture goes through, in their order, in words."""
    steps = ["RGB"]
    if isinstance(image, PatchImages):
        return steps + _patch_steps(image) + _scale_steps(image)
    if isinstance(image, NativeSizeImages):
        return steps + _native_size_steps(image) + _scale_steps(image)
    if image.pad_to_square is not None:
        steps.append(f"pad to a square with colour {image.pad_to_square}")
    if (resize := image.resize) is not None:
        size = f"{resize.height}x{resize.width}"
        target = f"the shorter edge to {resize.height}" if resize.mode != "exact" else f"to {size}"
        steps.append(f"resize {target} ({resize.resample})")
    if image.center_crop is not None:
        steps.append(f"centre crop to {image.center_crop[0]}x{image.center_crop[1]}")
    return steps + _scale_steps(image)


def _patch_steps(image: PatchImages) -> list[str]:
    return [
        f"shrink to fit {image.max_height}x{image.max_width} ({image.resample})",
        f"pad with {image.padding_value} to patches of {image.patch_height}x{image.patch_width}",
    ]


def _native_size_steps(image: NativeSizeImages) -> list[str]:
    edges = f"{image.shortest_edge} to {image.longest_edge}"
    cut = ["cut into four quarters and the whole"] if image.splits else []
    return [*cut, f"resize each edge to {edges} ({image.resample})"]


def _scale_steps(image: ImagePreprocessing) -> list[str]:
    steps = []
    if image.rescale_factor is not None:
        steps.append(f"multiply by {image.rescale_factor:.6g}")
    if image.mean is not None and image.std is not None:
        steps.append(f"subtract {_rounded(image.mean)}, divide by {_rounded(image.std)}")
    return steps


def _rounded(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"
