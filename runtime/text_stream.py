"""Turns tokens into text while they come."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

__all__ = ["TextStream"]

# What tokenizers write for bytes that are no character, or none yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# How vocabularies with byte fallback spell the token of one byte.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """Emits text as soon as it is certain.

    A character of several tokens is emitted when it is complete, and text that may be the
    beginning of a stop string is held back. tokenizers' own DecodeStream (0.23) raises "Invalid
    prefix encountered" when byte tokens that are no character are followed by text, which a model
    may well generate; so a window of the last tokens is decoded anew at each step.

    Byte tokens of a byte-fallback vocabulary are held back until another token follows: its
    decoder turns a whole run of them into U+FFFD if the run's end is no character, also those
    bytes that had been one. A stop string is found in held text, too: no token follows it.

    Args:
        tokenizer: decodes.
        stop_strings: texts that end the answer and are not part of it.

    Attributes:
        stopped: whether a stop string has appeared.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {token_id for token_id, token in added.items() if token.special}
        self._token_ids: list[int] = []  # without special ones
        # Tokens [start, read) have been decoded and give the context (a leading space is dropped
        # from the first token alone); tokens from `read` on wait for their character's end.
        self._start = 0
        self._read = 0
        self._decoded = ""
        self._emitted = 0
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Takes a token and returns the text that is now certain."""
        # A special token has no text. In the window it would stand where a token is whose leading
        # space tells whether the decoder drops the next one's.
        if self.stopped or token_id in self._special_ids:
            return ""
        self._token_ids.append(token_id)
        window = self._decode(self._start, len(self._token_ids))
        waiting = window[len(self._decode(self._start, self._read)) :]
        is_byte = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "") is not None
        is_certain = not is_byte and not window.endswith(_INCOMPLETE)
        if not is_certain and not self._stops(self._decoded + waiting, self._emitted):
            return ""
        self._take(waiting)
        return self._emit(hold_back=True)

    def finish(self) -> str:
        """Returns what was held back; bytes that became no character are U+FFFD."""
        if self.stopped:
            return ""
        window = self._decode(self._start, len(self._token_ids))
        self._take(window[len(self._decode(self._start, self._read)) :])
        return self._emit(hold_back=False)

    def text(self) -> str:
        """All tokens decoded at once, up to the stop string; the emitted pieces add up to it."""
        whole = self._decode(0, len(self._token_ids))
        return whole[: min(self._stops(whole, 0), default=len(whole))]

    def _decode(self, start: int, stop: int) -> str:
        return str(self._tokenizer.decode(self._token_ids[start:stop], skip_special_tokens=True))

    def _take(self, waiting: str) -> None:
        self._decoded += waiting
        self._start, self._read = self._read, len(self._token_ids)

    def _emit(self, *, hold_back: bool) -> str:
        found = self._stops(self._decoded, self._emitted)
        end = min(found, default=len(self._decoded))
        self.stopped = bool(found)
        if hold_back and not found:
            end -= max((_overlap(self._decoded, stop) for stop in self._stop_strings), default=0)
            end = max(end, self._emitted)
        piece = self._decoded[self._emitted : end]
        self._emitted = end
        return piece

    def _stops(self, text: str, start: int) -> list[int]:
        positions = (text.find(stop, start) for stop in self._stop_strings)
        return [position for position in positions if position >= 0]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
