"""Which shapes an engine takes: the optimization profiles of each graph of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vlmport.contract import NativeSizeImages, PatchImages
from vlmport.contract_engines import EngineProfile, PortRange
from vlmport.errors import EngineError, close_matches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vlmport.contract import Manifest
    from vlmport.contract_engines import BuildOptions, EnginePort, EngineSource

__all__ = ["check_options", "graph_profiles", "tiles_of_an_image"]

DECODER = "decoder"
_SPLIT_TILES = 5  # four quarters and the whole
_MOST_MASKS = 64  # of one answer; each costs no more than a few kilobytes

Bounds = tuple[int, int, int]  # smallest, usual, largest


def check_options(manifest: Manifest, options: BuildOptions) -> None:
    """Refuses options that no engine of the bundle can have.

    Raises:
        EngineError: lists everything that is wrong with them.
    """
    if faults := list(_faults(manifest, options)):
        msg = f"build options: {'; '.join(faults)}"
        raise EngineError(msg)


def _faults(manifest: Manifest, options: BuildOptions) -> Iterator[str]:
    most = manifest.dimensions.max_length
    tiles = tiles_of_an_image(manifest)
    if options.max_batch < 1:
        yield f"max_batch: found {options.max_batch}; expected 1 or more"
    if not 1 <= options.max_length <= most:
        yield (
            f"max_length: found {options.max_length}; expected 1 to {most}, the most tokens that "
            "the bundle's sequences may have"
        )
    elif not 1 <= options.prefill_chunk <= options.max_length:
        yield (
            f"prefill_chunk: found {options.prefill_chunk}; expected 1 to max_length, "
            f"{options.max_length}"
        )
    elif manifest.attention.prompt == "bidirectional" and (
        options.prefill_chunk < options.max_length
    ):
        yield (
            f"prefill_chunk: found {options.prefill_chunk}; expected max_length, "
            f"{options.max_length}, since all tokens of this model's prompts see each other, so "
            "that a prompt must run in one piece; use a smaller max_length, or leave "
            "prefill_chunk out"
        )
    if options.max_images < tiles:
        what = "tiles, of which one picture has that many" if tiles > 1 else "or more"
        yield f"max_images: found {options.max_images}; expected {tiles} {what}"


def tiles_of_an_image(manifest: Manifest) -> int:
    """How many tiles one picture becomes, which run in one call."""
    image = manifest.image
    return _SPLIT_TILES if isinstance(image, NativeSizeImages) and image.splits else 1


def graph_profiles(
    manifest: Manifest, source: EngineSource, options: BuildOptions
) -> tuple[EngineProfile, ...]:
    """The profiles of one graph, in the order of their indices.

    Axes of the same name have the same range in all ports, so that ports that must agree do.

    Args:
        manifest: of the bundle.
        source: the graph, whose axes the profiles are for.
        options: checked by `check_options`.

    Raises:
        EngineError: if the graph has an axis of which nothing is known.
    """
    chunk = options.prefill_chunk
    axes = {**_image_axes(manifest, options), "batch": (1, 1, options.max_batch)}
    names: dict[Literal["default", "prefill", "decode"], Bounds]
    if source.graph == DECODER:
        names = {"prefill": (1, chunk, chunk), "decode": (1, 1, 1)}
    else:
        names = {"default": (1, chunk, options.max_length)}
    return tuple(
        EngineProfile(
            name, tuple(_ranges(source, axes | {"sequence_length": tokens})), activation_bytes=None
        )
        for name, tokens in names.items()
    )


def _image_axes(manifest: Manifest, options: BuildOptions) -> dict[str, Bounds]:
    """Ranges of the axes that pictures have, by the kind of their preprocessing."""
    image, images = manifest.image, options.max_images
    axes: dict[str, Bounds] = {"num_images": (1, 1, images), "num_masks": (1, 1, _MOST_MASKS)}
    if isinstance(image, NativeSizeImages):
        least, most, patch = image.shortest_edge, image.longest_edge, image.patch_size
        tiles = tiles_of_an_image(manifest)
        axes |= {
            # A picture whose edges are longer than the longest one is shrunk to it.
            "height": (least, most, most),
            "width": (least, most, most),
            "num_tiles": (1, tiles, images),
            "num_patches": ((least // patch) ** 2, (most // patch) ** 2, (most // patch) ** 2),
        }
    elif isinstance(image, PatchImages):
        rows = image.max_height // image.patch_height
        columns = image.max_width // image.patch_width
        axes["num_patches"] = (1, rows * columns, rows * columns * images)
    return axes


def _ranges(source: EngineSource, axes: Mapping[str, Bounds]) -> Iterator[PortRange]:
    for port in source.inputs:
        if all(isinstance(axis, int) for axis in port.shape):
            continue
        bounds = [_bounds(source, port, axis, axes) for axis in port.shape]
        smallest, usual, largest = (tuple(one[which] for one in bounds) for which in range(3))
        yield PortRange(port.name, smallest, usual, largest)


def _bounds(
    source: EngineSource, port: EnginePort, axis: int | str, axes: Mapping[str, Bounds]
) -> Bounds:
    if isinstance(axis, int):
        return axis, axis, axis
    if axis not in axes:
        msg = (
            f"{source.graph}: {port.name} has an axis {axis!r}, of which no range is known; "
            f"{close_matches(axis, axes)}; give the graph's axes these names"
        )
        raise EngineError(msg)
    return axes[axis]
