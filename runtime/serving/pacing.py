"""How many tokens of waiting prompts run between two decode steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PrefillPacing"]

# Few different lengths: an arena of memory keeps blocks for each that it has seen.
_SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_SMALLEST_PIECE, _LARGEST_PIECE = _SIZES[0], _SIZES[-1]
_FIRST_PIECE = 64  # while nothing is measured
_WEIGHT = 0.25  # of the newest measurement in a moving average
# A measurement counts as this many times the average at most: the machine sometimes stops for a
# moment, and that must not make the next prefill as long.
_OUTLIER = 2.0


class PrefillPacing:
    """Keeps the prefill between two decode steps about as long as a decode step.

    So a running answer waits about twice the time of a step for its next token, however long the
    prompts of others are; and a prompt gets half of the time, however many answers run.

    Args:
        fixed: tokens for each round; None to adapt them.
        clock: seconds.
    """

    def __init__(self, fixed: int | None, clock: Callable[[], float]) -> None:
        self._fixed = fixed
        self._clock = clock
        self._step_seconds: float | None = None
        self._piece_tokens = 0.0
        self._piece_seconds: float | None = None
        self._round_started = 0.0
        self._round_tokens = 0

    def begin_round(self, *, is_decoding: bool) -> None:
        """Begins what runs before the next decode step.

        Args:
            is_decoding: whether any answer waits for its next token; since the last step, then, so
                that what else was done after it counts, too.
        """
        self._round_tokens = 0
        if not is_decoding:
            self._round_started = self._clock()

    def room(self, *, is_decoding: bool) -> int:
        """Tokens that may still run in this round, as one piece; 0 or less if none.

        Args:
            is_decoding: whether any answer waits for its next token meanwhile.
        """
        if self._fixed is not None:
            return self._fixed - self._round_tokens
        room = _LARGEST_PIECE - self._round_tokens
        if not is_decoding:
            return room
        # The first piece runs in any case, so that prompts always get on.
        least = 0 if self._round_tokens else _SMALLEST_PIECE
        wanted = min(room, self._affordable())
        return max((size for size in _SIZES if size <= wanted), default=least)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Takes note of a piece that ran."""
        self._round_tokens += tokens
        if tokens < _SMALLEST_PIECE:
            return  # its time says what a call costs, not what a token does
        if self._piece_seconds is None:
            self._piece_tokens, self._piece_seconds = float(tokens), seconds
            return
        # Averaged apart, so that a long piece counts for more than a short one.
        expected = self._piece_seconds / self._piece_tokens * tokens
        seconds = min(seconds, _OUTLIER * expected) if expected > 0 else seconds
        self._piece_seconds += _WEIGHT * (seconds - self._piece_seconds)
        self._piece_tokens += _WEIGHT * (tokens - self._piece_tokens)

    def stepped(self, seconds: float) -> None:
        """Takes note of a decode step that has ended now."""
        self._round_started = self._clock()
        if not self._step_seconds:
            self._step_seconds = seconds
            return
        seconds = min(seconds, _OUTLIER * self._step_seconds)
        self._step_seconds += _WEIGHT * (seconds - self._step_seconds)

    def _affordable(self) -> int:
        if self._step_seconds is None or not self._piece_seconds:
            return _FIRST_PIECE
        left = self._step_seconds - (self._clock() - self._round_started)
        return int(left * self._piece_tokens / self._piece_seconds)
