"""One request inside of a running batch, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmport.errors import VlmportError
    from vlmport.runtime.generate import Row
    from vlmport.runtime.request import Piece
    from vlmport.runtime.serving.prefix_key import PrefixKey

__all__ = ["ActiveSequence", "Event", "Sequence"]


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """A request that is prepared, so that only the decoder has still to run.

    Attributes:
        ticket: names it; different from those of all other requests that have not ended.
        row: its state; the batch appends to it.
        key: its prompt by content.
        priority: smaller numbers come first; any whole number.
        deadline: of the batch's clock; None if it may take any time.
    """

    ticket: int
    row: Row
    key: PrefixKey
    priority: int = 0
    deadline: float | None = None

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.row.inputs_embeds)

    @property
    def reservation(self) -> int:
        """Tokens that it may grow to."""
        return self.prompt_length + self.row.max_new_tokens


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a request.

    Attributes:
        ticket: the request's.
        piece: the next step of its answer; None if it failed.
        error: why it failed, was late or taken back; None if it did not.
        is_last: whether it has ended. Each accepted request gets exactly one such event.
    """

    ticket: int
    piece: Piece | None
    error: VlmportError | None
    is_last: bool


@dataclass(slots=True, eq=False)
class ActiveSequence:
    """A sequence that has a slot.

    Attributes:
        sequence: the request.
        slot: its slot.
        length: tokens whose keys and values are there.
        is_ended: whether its last event was given out.
        is_faulty: whether its numbers overflowed.
    """

    sequence: Sequence
    slot: int
    length: int = 0
    is_ended: bool = False
    is_faulty: bool = False

    def content(self) -> PrefixKey:
        """The tokens whose keys and values are there; those of the whole prompt must be.

        The last token of an answer never is: it would only be run to choose the next one.
        """
        answered = self.length - self.sequence.prompt_length
        return self.sequence.key.extended(self.sequence.row.token_ids[:answered])
