"""Turns pictures into the arrays that the first image graph takes; one file for each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.contract import NativeSizeImages, PatchImages
from vlmport.runtime.preprocessing.fixed_size import prepare_fixed_size
from vlmport.runtime.preprocessing.native_size import prepare_native_size
from vlmport.runtime.preprocessing.patches import prepare_patches

if TYPE_CHECKING:
    from PIL import Image

    from vlmport.contract import ImagePreprocessing
    from vlmport.runtime.preprocessing.prepared import PreparedImage

__all__ = ["prepare_image"]


def prepare_image(image: Image.Image, steps: ImagePreprocessing) -> PreparedImage:
    """Applies the steps of a manifest to one picture.

    Args:
        image: RGB.
        steps: from the manifest.

    Raises:
        InputError: if the picture cannot be brought to the form that the graphs take.
    """
    if isinstance(steps, PatchImages):
        return prepare_patches(image, steps)
    if isinstance(steps, NativeSizeImages):
        return prepare_native_size(image, steps)
    return prepare_fixed_size(image, steps)
