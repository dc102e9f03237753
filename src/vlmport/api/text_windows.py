"""A text as windows of tokens, and how many of them fit into memory together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlmport.runtime import VisionLanguageModel

__all__ = ["TextIds", "choose_batch", "cut_windows", "read_text", "text_ids"]

_MOST_BYTES = 512 * 1024 * 1024
_MOST_ROWS = 32


@dataclass(frozen=True, slots=True)
class TextIds:
    """A tokenized text.

    Attributes:
        ids: token ids without the beginning-of-sequence token.
        bos: that token's id, to begin each window with; None if windows begin with text.
    """

    ids: tuple[int, ...]
    bos: int | None


def read_text(path: Path) -> str:
    """Reads a file as UTF-8.

    Raises:
        InputError: if it cannot be.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); expected a text file"
        raise InputError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        raise InputError(msg) from error


def text_ids(text: str, path: Path, model: VisionLanguageModel, window: int) -> TextIds:
    """Tokenizes a text with the bundle's tokenizer.

    Args:
        text: whole.
        path: its file, for messages.
        model: whose tokenizer it is; if that begins plain text with the beginning-of-sequence
            token, each window will.
        window: tokens of a window.

    Raises:
        InputError: if there is nothing to predict, a window is longer than the bundle allows, or
            the text contains what the tokenizer takes for an image.
    """
    longest = model.manifest.dimensions.max_length
    if window > longest:
        msg = (
            f"window: found {window} tokens; the bundle's max_length is {longest}; use a smaller "
            "window, or export with a larger --max-length"
        )
        raise InputError(msg)
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    special = model.manifest.special_tokens
    size = model.manifest.dimensions.vocab_size
    strange = [one for one in ids if one >= size or one == special.image_token_id]
    if strange:
        token = model.tokenizer.id_to_token(strange[0])
        msg = (
            f"{path}: contains {token!r}, which the bundle's tokenizer takes for an image or which "
            "is not in its vocabulary; take it out of the text"
        )
        raise InputError(msg)
    begins = model.tokenizer.encode("a").ids[:1] == [special.bos_token_id]
    if len(ids) < (1 if begins else 2):
        msg = f"{path}: found {len(ids)} tokens; expected enough text to predict one from another"
        raise InputError(msg)
    return TextIds(tuple(ids), special.bos_token_id if begins else None)


def cut_windows(text: TextIds, window: int, limit: int | None) -> list[list[int]]:
    """Cuts a text into windows, one behind the other, that have no token in common.

    Args:
        text: tokenized.
        window: tokens of each but the last; the beginning-of-sequence token counts.
        limit: most windows.

    Returns:
        Token ids of each; one whose only token would be given is left out.
    """
    front = [] if text.bos is None else [text.bos]
    step = window - len(front)
    cut = [[*front, *text.ids[start : start + step]] for start in range(0, len(text.ids), step)]
    return [one for one in cut if len(one) > 1][:limit]


def choose_batch(models: Sequence[VisionLanguageModel], window: int) -> int:
    """Windows whose caches and logits take half a gibibyte at most; one at least.

    Args:
        models: that run side by side.
        window: tokens of a window.
    """
    row = 0
    for model in models:
        layout = model.manifest.kv_layout
        # bfloat16 is none of numpy's names, and float16 and bfloat16 are equally long.
        item = 4 if layout.dtype == "float32" else 2
        row += 2 * layout.num_layers * layout.num_kv_heads * layout.head_dim * window * item
        row += model.manifest.dimensions.vocab_size * np.dtype(np.float32).itemsize
    return max(1, min(_MOST_ROWS, _MOST_BYTES // row))
