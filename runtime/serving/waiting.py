"""The bounded queue of requests that wait for a slot."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from vlmport.errors import QueueFullError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmport.runtime.serving.sequence import Sequence

__all__ = ["WaitingQueue"]

# A request is overtaken by fewer later ones than this for each step of priority between them, so
# that a stream of urgent requests cannot keep the others waiting for ever.
_PLACES_PER_PRIORITY = 32


class WaitingQueue:
    """Requests by priority, then first come first served.

    The order is fixed when a request arrives: a step of priority is worth 32 places. It ages by
    that alone, as the places of those that come later grow.

    Args:
        max_waiting: requests that wait at most while every slot is taken.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._arrivals = 0
        self._ranked: list[tuple[int, int, Sequence]] = []  # (place, arrival, sequence), ascending

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._ranked)

    def __iter__(self) -> Iterator[Sequence]:
        """The requests, the next one first."""
        return (sequence for _, _, sequence in self._ranked)

    @property
    def head(self) -> Sequence | None:
        """The next one.

        Nobody passes it by because he is smaller: small requests that come all the time would
        otherwise take every bit of memory that it waits for.
        """
        return self._ranked[0][2] if self._ranked else None

    def add(self, sequence: Sequence, free_slots: int) -> None:
        """Takes a request in.

        Args:
            sequence: the request.
            free_slots: slots that nobody has; those who get one at once do not count as waiting.

        Raises:
            QueueFullError: if too many wait.
        """
        if len(self._ranked) >= self._max_waiting + free_slots:
            msg = (
                f"queue: found {len(self._ranked)} requests that wait; the service's limit is "
                f"{self._max_waiting} (max_queue); ask again later, or raise the limit"
            )
            raise QueueFullError(msg)
        self._arrivals += 1
        place = self._arrivals + _PLACES_PER_PRIORITY * sequence.priority
        # Arrivals differ, so that sequences themselves are never compared.
        bisect.insort(self._ranked, (place, self._arrivals, sequence), key=lambda item: item[:2])

    def remove(self, sequence: Sequence) -> None:
        """Lets a request go."""
        self._ranked = [item for item in self._ranked if item[2] is not sequence]

    def clear(self) -> None:
        """Lets all of them go."""
        self._ranked.clear()
