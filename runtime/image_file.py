"""Opens pictures from files and bytes, and refuses what is none."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageOps, UnidentifiedImageError

from vlmport.errors import InputError

__all__ = ["MAX_PIXELS", "ImageContent", "ImageSource", "image_content", "load_image"]

# Pillow warns above 89 million pixels and raises above twice that; one limit, always an error.
MAX_PIXELS = 89_478_485

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image


def load_image(source: ImageSource) -> Image.Image:
    """Opens a picture, applies its EXIF orientation and converts it to RGB.

    Args:
        source: a path, the bytes of an encoded picture, or an open Pillow image.

    Returns:
        An RGB image without transparency: what `transformers.image_utils.load_image` and the first
        step of its image processors give together.

    Raises:
        InputError: if there is no readable picture, or it has more than `MAX_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        return _decoded(source, "image")
    if isinstance(source, bytes):
        return _opened(io.BytesIO(source), "image")
    path = _checked_path(source)
    return _opened(path, str(path))


@dataclass(frozen=True, slots=True, eq=False)
class ImageContent:
    """A picture whose content is known, but which may not be decoded yet.

    Attributes:
        digest: SHA-256 of the encoded picture; of the pixels, where there is no encoded one.
        load: gives what `load_image` gives, and raises what that raises.
    """

    digest: bytes
    load: Callable[[], Image.Image]


def image_content(source: ImageSource) -> ImageContent:
    """Reads a picture without decoding it, unless it is a Pillow image.

    Raises:
        InputError: if a file cannot be read, or a Pillow image cannot be used.
    """
    if isinstance(source, Image.Image):
        # As the model will see it: orientation, palette and transparency are in the pixels then.
        image = _decoded(source, "image")
        head = f"{image.mode} {image.size} ".encode()
        return ImageContent(hashlib.sha256(head + image.tobytes()).digest(), lambda: image)
    if isinstance(source, bytes):
        encoded, name = source, "image"
    else:
        path = _checked_path(source)
        encoded, name = _read(path), str(path)
    digest = hashlib.sha256(encoded).digest()
    return ImageContent(digest, lambda: _opened(io.BytesIO(encoded), name))


def _checked_path(source: str | os.PathLike[str]) -> Path:
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
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise InputError(_no_permission(str(path))) from error
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); copy the file again"
        raise InputError(msg) from error


def _opened(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return _decoded(image, name)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        msg = f"{name}: not a picture that Pillow can read; expected PNG, JPEG, WebP or the like"
        raise InputError(msg) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        msg = f"{name}: {error}; at most {MAX_PIXELS} pixels are read; make the picture smaller"
        raise InputError(msg) from error
    except PermissionError as error:
        raise InputError(_no_permission(name)) from error
    except Exception as error:  # a damaged header raises ValueError (PPM) and more, see _decoded
        msg = f"{name}: cannot be read ({error}); the file is damaged"
        raise InputError(msg) from error


def _no_permission(name: str) -> str:
    return f"{name}: no permission to read it; change the file's permissions"


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
