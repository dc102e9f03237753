"""Pictures in requests: the bytes of a file, or text of them for clients that send JSON."""

from __future__ import annotations

import base64
import binascii
import re

from vlmport.errors import InputError

__all__ = ["encoded_picture"]

# No file of a picture consists of these alone: even a plain-text PPM ("P3 1 1 255") has spaces.
_BASE64 = re.compile(rb"[A-Za-z0-9+/\r\n]+={0,2}[\r\n]*")
_DATA_URL = re.compile(rb"data:(?P<type>[^,;]*)(?P<options>(;[^,;]*)*),")


def encoded_picture(value: bytes, name: str) -> bytes:
    """The bytes of a picture's file.

    Args:
        value: these bytes themselves, base64 of them, or a data URL
            (data:image/png;base64,iVBORw0...).
        name: of the picture, for messages.

    Raises:
        InputError: if a text is neither base64 nor a data URL.
    """
    if not value:
        msg = f"{name}: found nothing; expected the bytes of a picture's file, or base64 of them"
        raise InputError(msg)
    if url := _DATA_URL.match(value):
        if not url["options"].endswith(b";base64"):
            msg = f"{name}: found a data URL without base64; expected data:image/png;base64,..."
            raise InputError(msg)
        return _decoded(value[url.end() :], name)
    # A fullmatch over megabytes of a file ends at its first byte that is not of base64.
    if _BASE64.fullmatch(value):
        return _decoded(value, name)
    if value.startswith((b"http://", b"https://", b"file://")):
        msg = f"{name}: found an address; a server opens none; send the picture itself, or base64"
        raise InputError(msg)
    return value


def _decoded(text: bytes, name: str) -> bytes:
    try:
        return base64.b64decode(text.translate(None, b"\r\n"), validate=True)
    except binascii.Error as error:
        msg = f"{name}: not base64 ({error}); expected the bytes of a picture's file as base64"
        raise InputError(msg) from error
