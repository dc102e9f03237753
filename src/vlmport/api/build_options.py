"""What engines are built for where the user says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.contract_engines import BuildOptions
from vlmport.runtime.engines.profiles import tiles_of_an_image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from vlmport.contract import Manifest
    from vlmport.contract_engines import TensorRTName

__all__ = ["build_options"]

_BATCH = 4
# The cache of each row is this long from the start, however short its sequence.
_LENGTH = 4096
# Long enough to be bound by arithmetic; a longer one needs more memory and gains nothing.
_CHUNK = 512
_IMAGES = 4


def build_options(
    manifest: Manifest,
    backend: TensorRTName,
    *,
    max_batch: int | None = None,
    max_length: int | None = None,
    prefill_chunk: int | None = None,
    max_images: int | None = None,
    compute_capabilities: Sequence[str] = (),
    masking: Literal["lengths", "mask"] = "lengths",
    refit: bool = False,
    strip_weights: bool = False,
) -> BuildOptions:
    """Options for a bundle; None takes what suits it.

    Args:
        manifest: of the bundle.
        backend: which TensorRT.
        max_batch: as in `BuildOptions`, like all that follow.
        max_length: None for the bundle's, at most 4096.
        prefill_chunk: None for 512, or a whole prompt where its tokens all see each other.
        max_images: None for 4 pictures, or the tiles of one.
        compute_capabilities: empty for what TensorRT builds when it is not told.
        masking: how attention layers learn which keys are valid.
        refit: whether weights can be replaced.
        strip_weights: whether engines are written without weights.
    """
    if max_length is None:
        max_length = min(manifest.dimensions.max_length, _LENGTH)
    if prefill_chunk is None:
        is_causal = manifest.attention.prompt == "causal"
        prefill_chunk = min(max_length, _CHUNK) if is_causal else max_length
    return BuildOptions(
        backend=backend,
        max_batch=_BATCH if max_batch is None else max_batch,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
        max_images=max(_IMAGES, tiles_of_an_image(manifest)) if max_images is None else max_images,
        compute_capabilities=tuple(compute_capabilities),
        masking=masking,
        refit=refit,
        strip_weights=strip_weights,
    )
