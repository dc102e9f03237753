"""Continuous batching: requests join and leave one running batch between its decode steps."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from vlmport.errors import CancelledError, DeadlineError, InputError, VlmportError
from vlmport.runtime.sampling import best_token
from vlmport.runtime.serving.batch_statistics import BatchStatistics
from vlmport.runtime.serving.pacing import PrefillPacing
from vlmport.runtime.serving.prefix_reuse import PrefixReuse
from vlmport.runtime.serving.sequence import ActiveSequence, Event
from vlmport.runtime.serving.waiting import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.base import SlotDecoding
    from vlmport.runtime.request import Piece
    from vlmport.runtime.serving.options import ServingOptions
    from vlmport.runtime.serving.sequence import Sequence

__all__ = ["ContinuousBatch"]

_log = logging.getLogger(__name__)
_LOWEST = np.finfo(np.float32).min


class ContinuousBatch:
    """Answers sequences together; has no thread and is not safe to be used from several at once.

    Sequences that decode have the first slots, in any order. At most one more has a slot, behind
    them: the newcomer whose prompt is running. The next one is let in when that has ended, so it
    may still be overtaken by a more urgent one, and finds the prompts that ran before its own.

    Args:
        decoding: the slots; closed with the batch.
        manifest: the bundle's.
        options: limits.
        clock: seconds; what deadlines mean, and what steps are timed by.
    """

    def __init__(
        self,
        decoding: SlotDecoding,
        manifest: Manifest,
        options: ServingOptions,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._decoding = decoding
        self._clock = clock
        self._eos_token_ids = manifest.special_tokens.eos_token_ids
        self._suppressed = list(manifest.generation.suppressed_token_ids)
        self._runs_whole_prompt = manifest.attention.prompt == "bidirectional"
        self._waiting = WaitingQueue(options.max_queue)
        self._pacing = PrefillPacing(options.prefill_tokens, clock)
        self._prefixes = PrefixReuse(
            decoding, options.prefix_bytes, is_whole=self._runs_whole_prompt
        )
        self._rows: list[ActiveSequence] = []  # that decode; each at the index of its slot
        self._newcomer: ActiveSequence | None = None
        self._events: list[Event] = []
        self._is_decode_due = False
        self._is_closed = False
        self._num_steps = self._prefill_tokens = self._generated_tokens = 0

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not (self._events or self._waiting or self._active())

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more requests, for good: by `close`, or as the backend is broken."""
        return self._is_closed

    def submit(self, sequence: Sequence) -> None:
        """Accepts a request, which begins in one of the next steps.

        Raises:
            InputError: if it is longer than the whole cache.
            QueueFullError: if too many wait.
            VlmportError: if the batch is closed.
        """
        if self._is_closed:
            msg = "service: closed; it takes no more requests; start it again"
            raise VlmportError(msg)
        self.check_fits(sequence)
        free_slots = self._decoding.num_slots - len(self._active())
        self._waiting.add(sequence, free_slots)

    def check_fits(self, sequence: Sequence) -> None:
        """Checks that a request can be answered at all; in any thread, as the limits are fixed.

        Raises:
            InputError: if it is longer than the whole cache.
        """
        if not self._decoding.fits(1, sequence.reservation):
            msg = (
                f"request: found {sequence.prompt_length} tokens of the prompt and up to "
                f"{sequence.row.max_new_tokens} of the answer; the service's cache is smaller; "
                "shorten the prompt, ask for fewer new tokens, or raise cache_tokens"
            )
            raise InputError(msg)

    def cancel(self, ticket: int) -> None:
        """Ends a request at once, wherever it is; its last event comes with the next step.

        Nothing happens if it has ended already.
        """
        message = "request: taken back before its answer was complete; ask again"
        self._guard(
            lambda: self._end_all(CancelledError, message, lambda one: one.ticket == ticket)
        )

    def step(self) -> list[Event]:
        """Ends what is late; then newcomers run pieces of their prompts, or all others get a token.

        The two take turns. They are no single step, since a first token should not wait until the
        others have got theirs.

        Returns:
            What has happened since the last step, in order.
        """
        self._guard(self._round)
        events, self._events = self._events, []
        return events

    def close(self) -> list[Event]:
        """Ends what has not ended and gives back the cache.

        Returns:
            What has happened since the last step; the events of what was ended here are the last.
        """
        if not self._is_closed:
            message = "service: closed before the answer was complete; ask another one"
            self._guard(lambda: self._end_all(CancelledError, message, lambda _: True))
            self._is_closed = True
            self._decoding.close()
        events, self._events = self._events, []
        return events

    def statistics(self) -> BatchStatistics:
        """What the batch holds and has done."""
        return BatchStatistics(
            num_slots=self._decoding.num_slots,
            num_active=len(self._active()),
            num_waiting=len(self._waiting),
            num_steps=self._num_steps,
            prefill_tokens=self._prefill_tokens,
            generated_tokens=self._generated_tokens,
            prefix_hits=self._prefixes.num_hits,
            prefix_tokens=self._prefixes.num_tokens,
            prefix_bytes=self._prefixes.store.num_bytes,
            prefix_evictions=self._prefixes.store.num_evicted,
        )

    def _active(self) -> list[ActiveSequence]:
        return self._rows if self._newcomer is None else [*self._rows, self._newcomer]

    def _round(self) -> None:
        self._end_late()
        ran_prompts = not self._is_decode_due and self._prefill()
        self._is_decode_due = ran_prompts and bool(self._rows)
        if not ran_prompts:
            self._decode()

    def _end_late(self) -> None:
        now = self._clock()
        message = "request: not answered within its time; allow more, or ask for fewer tokens"

        def is_late(sequence: Sequence) -> bool:
            return sequence.deadline is not None and sequence.deadline <= now

        self._end_all(DeadlineError, message, is_late)

    def _end_all(
        self, kind: type[VlmportError], message: str, chosen: Callable[[Sequence], bool]
    ) -> None:
        """Ends the sequences that are chosen, waiting ones first; each with an error of its own."""
        for sequence in [one for one in self._waiting if chosen(one)]:
            self._waiting.remove(sequence)
            self._events.append(Event(sequence.ticket, None, kind(message), is_last=True))
        # From behind, so that the row which moves into a hole is one that stays.
        for active in reversed([one for one in self._active() if chosen(one.sequence)]):
            self._report_error(active, kind(message))
            self._leave(active)

    def _prefill(self) -> bool:
        """Runs pieces of prompts, one newcomer after the other, while there is time for it.

        Returns:
            Whether any ran.
        """
        self._pacing.begin_round(is_decoding=bool(self._rows))
        ran = False
        while self._room() > 0:
            newcomer = self._newcomer or self._admitted()
            if newcomer is None:
                break
            # Asked again: a prefix may have been copied, which takes time.
            if (room := self._room()) <= 0:
                break
            ran = True
            logits = self._run_piece(newcomer, room)
            if newcomer.length == newcomer.sequence.prompt_length:
                self._begin_decoding(newcomer, logits)
            else:
                self._look_at(newcomer, logits)
        return ran

    def _room(self) -> int:
        return self._pacing.room(is_decoding=bool(self._rows))

    def _admitted(self) -> ActiveSequence | None:
        """Gives the first one in the queue a slot, if he may have one now."""
        head, slot = self._waiting.head, len(self._rows)
        if head is None or slot == self._decoding.num_slots:
            return None
        # What is admitted can always grow to its end: nobody is ever put back.
        longest = max(one.reservation for one in (head, *(row.sequence for row in self._rows)))
        if not self._decoding.fits(slot + 1, longest):
            return None
        self._waiting.remove(head)
        self._newcomer = ActiveSequence(head, slot)
        self._prefixes.begin(self._newcomer, self._rows)
        return self._newcomer

    def _run_piece(self, newcomer: ActiveSequence, room: int) -> NDArray[np.float32]:
        """Runs the next tokens of a prompt; returns the logits float32 [vocab_size] behind them."""
        length, start = newcomer.sequence.prompt_length, newcomer.length
        stop = length if self._runs_whole_prompt else min(length, start + room)
        embeds, started = newcomer.sequence.row.inputs_embeds, self._clock()
        logits = self._decoding.prefill(newcomer.slot, embeds, start, stop)
        self._pacing.prefilled(stop - start, self._clock() - started)
        self._prefill_tokens += stop - start
        newcomer.length = stop
        return logits

    def _look_at(self, newcomer: ActiveSequence, logits: NDArray[np.float32]) -> None:
        """Ends a newcomer whose numbers overflowed; those behind a piece show if any of it did.

        Not only behind the last piece: rows that are given other places in the cache meanwhile
        leave copies behind, which nobody would overwrite.
        """
        try:
            best_token(logits)
        except VlmportError as error:
            newcomer.is_faulty = True
            self._report_error(newcomer, error)
            self._leave(newcomer)

    def _begin_decoding(self, newcomer: ActiveSequence, logits: NDArray[np.float32]) -> None:
        """Chooses the first token and lets the newcomer join those who decode."""
        logits[self._suppressed] = _LOWEST
        self._choose(newcomer, logits)
        if newcomer.is_ended:
            self._leave(newcomer)
            return
        slot = len(self._rows)
        if newcomer.slot != slot:  # rows have left since it came
            self._decoding.move(newcomer.slot, slot)
            newcomer.slot = slot
        self._rows.append(newcomer)
        self._newcomer = None

    def _decode(self) -> None:
        """Appends the tokens chosen last to their rows and chooses the next ones."""
        if not self._rows:
            return
        token_ids = np.array([row.sequence.row.token_ids[-1] for row in self._rows], np.int64)
        started = self._clock()
        logits = self._decoding.step(token_ids)
        self._pacing.stepped(self._clock() - started)
        self._num_steps += 1
        logits[:, self._suppressed] = _LOWEST
        for active, row_logits in zip(self._rows, logits, strict=True):
            active.length += 1
            self._choose(active, row_logits)
        for active in reversed([row for row in self._rows if row.is_ended]):
            self._leave(active)

    def _choose(self, active: ActiveSequence, logits: NDArray[np.float32]) -> None:
        """Takes the next token of one sequence; numbers that overflowed end that one alone."""
        row = active.sequence.row
        try:
            token_id = row.sampler.select(logits)
        except VlmportError as error:
            active.is_faulty = True
            self._report_error(active, error)
            return
        self._generated_tokens += 1
        self._report(active, row.append(token_id, self._eos_token_ids))

    def _report(self, active: ActiveSequence, piece: Piece) -> None:
        active.is_ended = active.sequence.row.finish_reason is not None
        event = Event(active.sequence.ticket, piece, None, is_last=active.is_ended)
        self._events.append(event)

    def _report_error(self, active: ActiveSequence, error: VlmportError) -> None:
        active.is_ended = True
        self._events.append(Event(active.sequence.ticket, None, error, is_last=True))

    def _leave(self, active: ActiveSequence) -> None:
        """Empties the slot of a sequence that has ended; the last row moves into the hole."""
        others = [row for row in self._rows if row is not active and not row.is_faulty]
        self._prefixes.keep(active, others)
        self._decoding.release(active.slot, is_faulty=active.is_faulty)
        if active is self._newcomer:
            self._newcomer = None
            return
        last = self._rows[-1]
        if last is not active:
            self._decoding.move(last.slot, active.slot)
            last.slot = active.slot
            self._rows[active.slot] = last
        self._rows.pop()

    def _guard(self, work: Callable[[], None]) -> None:
        """Does some work; what the decoding raises ends all requests that have a slot."""
        if self._is_closed:
            return
        try:
            work()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Ends all that have a slot, as nobody knows what the slots hold."""
        _log.error("the backend failed; the requests under way end", exc_info=error)
        actives, self._rows, self._newcomer = self._active(), [], None
        for active in actives:
            if not active.is_ended:
                self._report_error(active, _told(error))
        try:
            # All of them: a call that failed may have begun to fill one that nobody has yet.
            for slot in range(self._decoding.num_slots):
                self._decoding.release(slot, is_faulty=True)
        except Exception as second:
            _log.exception("the backend cannot be used any more; the service is closed")
            for sequence in self._waiting:
                self._events.append(Event(sequence.ticket, None, _told(second), is_last=True))
            self._waiting.clear()
            self._is_closed = True
            with contextlib.suppress(Exception):
                self._decoding.close()


def _told(error: Exception) -> VlmportError:
    """The error for one request; each has its own, as each is raised in a place of its own."""
    if isinstance(error, VlmportError):
        told = type(error)(*error.args)
    else:
        told = VlmportError(
            f"backend: {type(error).__name__}: {error}; the answers that it was computing have "
            "ended; ask again, and report it if that happens again"
        )
    told.__cause__ = error
    return told
