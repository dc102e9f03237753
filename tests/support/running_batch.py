"""A continuous batch over fake slots, and all that it says."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from support.fake_requests import serving_manifest
from support.fake_slots import NEVER_ENDS, Costs, FakeClock, FakeSlots

from vlmport.runtime.serving.batch import ContinuousBatch
from vlmport.runtime.serving.options import ServingOptions

if TYPE_CHECKING:
    from vlmport.contract import Manifest
    from vlmport.errors import VlmportError
    from vlmport.runtime.serving.sequence import Event

__all__ = ["Running", "endless", "prompt"]


class Running:
    """A batch that keeps what it has said.

    Attributes:
        events: of each ticket.
        order: tickets by their first token.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        num_slots: int = 3,
        cache_tokens: int = 300,
        sees_whole_prompt: bool = False,
        costs: Costs | None = None,
        max_queue: int = 64,
        prefill_tokens: int | None = None,
        prefix_bytes: int = 1000,
    ) -> None:
        self.clock = FakeClock()
        self.slots = FakeSlots(
            num_slots,
            cache_tokens,
            sees_whole_prompt=sees_whole_prompt,
            clock=self.clock,
            costs=costs,
        )
        options = ServingOptions(
            num_slots=num_slots,
            cache_tokens=cache_tokens,
            max_queue=max_queue,
            prefill_tokens=prefill_tokens,
            prefix_bytes=prefix_bytes,
        )
        manifest = serving_manifest(manifest, sees_whole_prompt=sees_whole_prompt)
        self.batch = ContinuousBatch(self.slots, manifest, options, self.clock)
        self.events: dict[int, list[Event]] = defaultdict(list)
        self.order: list[int] = []

    def step(self) -> None:
        self.take(self.batch.step())

    def take(self, events: list[Event]) -> None:
        for event in events:
            assert not any(past.is_last for past in self.events[event.ticket])
            if event.ticket not in self.order and event.piece is not None:
                self.order.append(event.ticket)
            self.events[event.ticket].append(event)

    def finish(self) -> None:
        while not self.batch.is_idle:
            self.step()

    def tokens(self, ticket: int) -> list[int]:
        pieces = [event.piece for event in self.events[ticket] if event.piece is not None]
        return [piece.token_id for piece in pieces if piece.token_id is not None]

    def text(self, ticket: int) -> str:
        return "".join(event.piece.text for event in self.events[ticket] if event.piece)

    def error(self, ticket: int) -> VlmportError | None:
        return self.events[ticket][-1].error


def prompt(length: int, first: int = 1) -> tuple[float, ...]:
    """Values of a prompt; others for another `first`."""
    return tuple(float((first + index) % 20 + 1) for index in range(length))


def endless(length: int, first: int = 1) -> tuple[float, ...]:
    """Values of a prompt whose answer only ends at a limit."""
    return (NEVER_ENDS, *prompt(length - 1, first))
