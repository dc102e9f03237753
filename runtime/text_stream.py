"""Turns tokens into text while they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

__all__ = ["TextStream"]

# What tokenizers write for bytes that are no character, or none yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Emits text as soon as it is certain.

    A character of several tokens is emitted when it is complete, and text that may be the
    beginning of a stop string is held back. tokenizers' own DecodeStream (0.23) raises "Invalid
    prefix encountered" when byte tokens that are no character are followed by text, which a model
    may well generate; so a window of the last tokens is decoded anew at each step.

    Args:
        tokenizer: decodes.
        stop_strings: texts that end the answer and are not part of it.

    Attributes:
        stopped: whether a stop string has appeared.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._token_ids: list[int] = []
        # Tokens [start, read) have been decoded and give the context (a leading space is dropped
        # from the first token alone); tokens from `read` on wait for their character's end.
        self._start = 0
        self._read = 0
        self._decoded = ""
        self._emitted = 0
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Takes a token and returns the text that is now certain."""
        if self.stopped:
            return ""
        self._token_ids.append(token_id)
        window = self._decode(self._start, len(self._token_ids))
        if window.endswith(_INCOMPLETE):
            return ""
        self._take(window)
        return self._emit(hold_back=True)

    def finish(self) -> str:
        """Returns what was held back; bytes that became no character are U+FFFD."""
        if self.stopped:
            return ""
        self._take(self._decode(self._start, len(self._token_ids)))
        return self._emit(hold_back=False)

    def text(self) -> str:
        """All tokens decoded at once, up to the stop string.

        The emitted pieces add up to it, unless bytes that had been a character turn out to be part
        of a longer sequence that is none.
        """
        whole = self._decode(0, len(self._token_ids))
        return whole[: min(self._stops(whole, 0), default=len(whole))]

    def _decode(self, start: int, stop: int) -> str:
        return str(self._tokenizer.decode(self._token_ids[start:stop], skip_special_tokens=True))

    def _take(self, window: str) -> None:
        self._decoded += window[len(self._decode(self._start, self._read)) :]
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
