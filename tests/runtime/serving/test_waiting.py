from __future__ import annotations

import pytest
from support.fake_requests import FakeRequest

from vlmport.errors import QueueFullError
from vlmport.runtime.serving.waiting import WaitingQueue


def add(queue: WaitingQueue, ticket: int, priority: int = 0, free_slots: int = 0) -> None:
    queue.add(FakeRequest((1.0, 2.0)).sequence(ticket, priority=priority), free_slots)


def tickets(queue: WaitingQueue) -> list[int]:
    return [sequence.ticket for sequence in queue]


def test_priorities_come_in_order_and_equal_ones_as_they_came() -> None:
    queue = WaitingQueue(9)
    for ticket, priority in enumerate((0, 3, -2, 3, 0)):
        add(queue, ticket, priority)
    assert tickets(queue) == [2, 0, 4, 1, 3]
    head = queue.head
    assert head is not None
    queue.remove(head)
    assert tickets(queue) == [0, 4, 1, 3]
    assert len(queue) == 4


def test_a_stream_of_urgent_requests_keeps_nobody_waiting_for_ever() -> None:
    queue = WaitingQueue(200)
    add(queue, 0, priority=1)
    overtaken = 0
    for ticket in range(1, 200):
        add(queue, ticket)
        head = queue.head
        assert head is not None
        queue.remove(head)
        if head.ticket == 0:
            break
        overtaken += 1
    assert overtaken == 31


def test_those_who_get_a_slot_at_once_do_not_count() -> None:
    queue = WaitingQueue(2)
    for ticket in range(3):
        add(queue, ticket, free_slots=1)
    with pytest.raises(
        QueueFullError, match=r"^queue: found 3 requests that wait; .* limit is 2 \(max_queue\)"
    ):
        add(queue, 3, free_slots=1)
    add(queue, 3, free_slots=2)
    queue.clear()
    assert queue.head is None
    assert len(queue) == 0
