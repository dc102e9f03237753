"""Opens pictures from files, and refuses what is none."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vlmport.errors import InputError

__all__ = ["MAX_PIXELS", "load_image"]

# Pillow warns above 89 million pixels and raises above twice that; one limit, always an error.
MAX_PIXELS = 89_478_485


def load_image(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """Opens a picture, applies its EXIF orientation and converts it to RGB.

    Args:
        source: a path, or an open Pillow image.

    Returns:
        An RGB image without transparency: what `transformers.image_utils.load_image` and the first
        step of its image processors give together.

    Raises:
        InputError: if there is no readable picture, or it has more than `MAX_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        return _decoded(source, "image")
    path = Path(source)
    try:
        is_there, is_file = path.exists(), path.is_file()
    except OSError as error:  # a folder that may not be entered, a name that is too long
        msg = f"{path}: cannot be reached ({error.strerror}); expected the path of a picture"
        raise InputError(msg) from error
    if not is_there:
        msg = f"{os.fspath(source)}: no such file; expected a picture on this machine"
        raise InputError(msg)
    if not is_file:
        msg = f"{path}: not a file; expected a picture"
        raise InputError(msg)
    return _opened(path)


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _decoded(image, str(path))
    except InputError:
        raise
    except UnidentifiedImageError as error:
        msg = f"{path}: not a picture that Pillow can read; expected PNG, JPEG, WebP or the like"
        raise InputError(msg) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        msg = f"{path}: {error}; at most {MAX_PIXELS} pixels are read; make the picture smaller"
        raise InputError(msg) from error
    except PermissionError as error:
        msg = f"{path}: no permission to read it; change the file's permissions"
        raise InputError(msg) from error
    except Exception as error:  # a damaged header raises ValueError (PPM) and more, see _decoded
        msg = f"{path}: cannot be read ({error}); the file is damaged"
        raise InputError(msg) from error


def _decoded(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        msg = (
            f"{name}: found {width} x {height} pixels; at most {MAX_PIXELS} are read; make the "
            "picture smaller"
        )
        raise InputError(msg)
    if width == 0 or height == 0:
        msg = f"{name}: found {width} x {height} pixels; expected at least one"
        raise InputError(msg)
    try:
        opened = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:
        # Damaged bytes raise what the format's plugin happens to raise. Seen with Pillow 13 beside
        # OSError: SyntaxError (EXIF block of a WebP), ValueError (PPM).
        msg = f"{name}: cannot be read ({error}); the file is damaged"
        raise InputError(msg) from error
    if opened.info.get("transparency") is None:
        return opened
    # A palette's transparent colour survives as a note on the RGB picture, and transformers' image
    # processors (5.23) then put the picture onto white.
    white = Image.new("RGBA", opened.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, opened.convert("RGBA")).convert("RGB")
