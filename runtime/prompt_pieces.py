"""Cuts prompts into the pieces in which they run, and says where each piece goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from vlmport.contract import AttentionForm

__all__ = ["PromptPiece", "longest_piece", "prompt_pieces"]

# Without a fused kernel the attention of a piece needs heads x piece x capacity floats.
_LONGEST_PIECE = 512


@dataclass(frozen=True, slots=True, eq=False)
class PromptPiece:
    """Tokens `start` to `stop` of every row, and the decoder's inputs that say so.

    Attributes:
        start: first token.
        stop: behind the last one.
        position_ids: int64 [batch, stop - start].
        write_indices: int64 [batch], where the piece goes in the cache.
        valid_lengths: int64 [batch], cache rows up to the token whose logits are chosen. Rows that
            end elsewhere choose any valid one.
        ends_here: bool [batch], whose last token is in this piece, so that its logits are kept.
    """

    start: int
    stop: int
    position_ids: NDArray[np.int64]
    write_indices: NDArray[np.int64]
    valid_lengths: NDArray[np.int64]
    ends_here: NDArray[np.bool_]

    def inputs(self) -> dict[str, NDArray[np.int64]]:
        """The decoder's inputs beside the embeddings and the cache, by name."""
        return {
            "position_ids": self.position_ids,
            "write_indices": self.write_indices,
            "valid_lengths": self.valid_lengths,
        }


def longest_piece(attention: AttentionForm, limit: int = _LONGEST_PIECE) -> int | None:
    """Tokens of a piece at most; None where prompts must run whole.

    Args:
        attention: whether a prompt may be cut.
        limit: of a backend that takes no longer ones.
    """
    return None if attention.prompt == "bidirectional" else limit


def prompt_pieces(
    lengths: NDArray[np.int64], first_position: int, longest: int | None, start: int = 0
) -> Iterator[PromptPiece]:
    """Pieces of right-padded prompts, in order.

    No piece has one token alone, if that can be avoided: ONNX Runtime's CPU provider computes
    attention for one token in another order of sums than for several, and what a prompt is answered
    shall not depend on how it was cut.

    Args:
        lengths: int64 [batch], tokens of each row.
        first_position: position id of a sequence's first token.
        longest: tokens of a piece at most; None if prompts must not be cut.
        start: first token that is asked for; those in front of it are in the cache. One of them
            runs again if only one is asked for.
    """
    end, batch = int(lengths.max()), len(lengths)
    first = max(0, min(start, end - 2)) if longest != 1 else start
    while first < end:
        stop = min(end, first + (longest or end))
        if end - stop == 1 and stop - first > 2:
            stop -= 1
        positions = np.arange(first, stop, dtype=np.int64) + first_position
        yield PromptPiece(
            first,
            stop,
            np.ascontiguousarray(np.broadcast_to(positions, (batch, stop - first))),
            np.full(batch, first, np.int64),
            np.clip(lengths, first + 1, stop),
            (lengths > first) & (lengths <= stop),
        )
        first = stop
