"""What the slots of every backend must do: answer as a sequence alone, whatever their neighbours.

`check_trace` plays a scheduler that joins, leaves, moves, copies, stores and loads at random.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from support.loop_scenarios import loop_requests

from vlmport.api.tolerances import tolerance_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlmport.runtime import VisionLanguageModel
    from vlmport.runtime.backends.base import PromptEmbeddings, SlotDecoding, StoredTokens

__all__ = ["Question", "TraceReport", "alone", "check_slots", "check_trace", "questions"]


@dataclass(eq=False)
class Question:
    """A prompt, and what it is answered alone.

    Attributes:
        prompt: from the backend under test.
        token_ids: of the greedy answer alone.
        logits: float32 [new_tokens, vocab_size] that they were chosen from.
    """

    prompt: PromptEmbeddings
    token_ids: list[int]
    logits: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TraceReport:
    """What a trace did.

    Attributes:
        counts: how often each thing was done.
        largest: difference of logits.
    """

    counts: dict[str, int]
    largest: float


@dataclass(eq=False)
class _Running:
    question: Question
    new_tokens: int
    done: int = 0  # tokens of the prompt that have run
    token_ids: list[int] = field(default_factory=list)


def check_slots(
    found: VisionLanguageModel,
    expected: VisionLanguageModel,
    *,
    num_slots: int,
    cache_tokens: int,
    texts: Sequence[int] = (1, 63, 64, 150),
    atol: float | None = None,
    margin: float = 0.0,
    count: int = 25,
) -> TraceReport:
    """A random trace on a backend's slots.

    Args:
        found: under test.
        expected: what it is compared with, its prompts alone.
        num_slots: as in `Backend.start_slots`.
        cache_tokens: as in `Backend.start_slots`.
        texts: lengths of prompts of random tokens.
        atol: the greatest difference of logits; None for that of float32 bundles from PyTorch.
        margin: by which another token than alone may be preferred.
        count: answers.
    """
    asked = questions(found, expected, 24, texts)
    cuts = found.manifest.attention.prompt == "causal"
    limit = tolerance_for("logits", "float32").max_abs if atol is None else atol
    with closing(found._backend.start_slots(num_slots, cache_tokens)) as slots:
        report = check_trace(slots, asked, cuts=cuts, count=count, atol=limit, margin=margin)
    assert min(report.counts.values()) > 0, report  # everything was tried
    return report


def questions(
    found: VisionLanguageModel,
    expected: VisionLanguageModel,
    new_tokens: int,
    texts: Sequence[int] = (),
) -> list[Question]:
    """Prompts with pictures, and some of random tokens.

    Args:
        found: under test.
        expected: what it is compared with.
        new_tokens: of an answer.
        texts: lengths of prompts of random tokens.
    """
    generator = np.random.default_rng(7)
    made = []
    for request in loop_requests(4):
        prompts = [model._row(request, 0.0).inputs_embeds for model in (found, expected)]
        made.append(_question(prompts, expected, new_tokens))
    for length in texts:
        ids = generator.integers(5, found.manifest.dimensions.vocab_size, length)
        no_image = np.zeros(length, np.bool_)
        prompts = [model._backend.embed_prompt(ids, no_image, []) for model in (found, expected)]
        made.append(_question(prompts, expected, new_tokens))
    return made


def _question(
    prompts: Sequence[PromptEmbeddings], expected: VisionLanguageModel, new_tokens: int
) -> Question:
    return Question(prompts[0], *alone(expected, prompts[1].numpy(), new_tokens))


def alone(
    model: VisionLanguageModel, inputs_embeds: NDArray[np.floating], new_tokens: int
) -> tuple[list[int], NDArray[np.float32]]:
    """The greedy answer of one sequence: tokens, and float32 [new_tokens, vocab_size]."""
    length = len(inputs_embeds)
    token_ids, logits = [], []
    with closing(model.start_decoding(1, length + new_tokens)) as decoding:
        row = decoding.prefill(inputs_embeds[None], np.array([length], np.int64))[0]
        for _ in range(new_tokens):
            logits.append(row.copy())
            token_ids.append(int(row.argmax()))
            row = decoding.step(np.array([token_ids[-1]], np.int64), np.ones(1, np.bool_))[0]
    return token_ids, np.stack(logits)


def check_trace(
    slots: SlotDecoding,
    asked: Sequence[Question],
    *,
    cuts: bool,
    count: int,
    atol: float,
    margin: float = 0.0,
    seed: int = 0,
) -> TraceReport:
    """Answers many questions at once, the tokens and logits of each as it is answered alone.

    Args:
        slots: empty; empty again at the end.
        asked: to choose from.
        cuts: whether prompts may run in pieces.
        count: answers.
        atol: the greatest difference of logits.
        margin: by which another token than alone may be preferred.
        seed: of the trace.

    """
    trace = _Trace(slots, asked, np.random.default_rng(seed), cuts=cuts, atol=atol, margin=margin)
    while trace.counts["answers"] < count:
        trace.round(begins=trace.counts["begun"] < count)
    assert not any(trace.running)
    return TraceReport(trace.counts, trace.largest)


class _Trace:
    """A scheduler whose decoded sequences are in the first slots, those in prefill behind them."""

    def __init__(
        self,
        slots: SlotDecoding,
        asked: Sequence[Question],
        generator: np.random.Generator,
        *,
        cuts: bool,
        atol: float,
        margin: float,
    ) -> None:
        self.slots = slots
        self.asked = asked
        self.generator = generator
        self.cuts = cuts
        self.atol = atol
        self.margin = margin
        self.running: list[_Running | None] = [None] * slots.num_slots
        self.stored: dict[int, StoredTokens] = {}  # by the index of the question
        self.largest = 0.0
        actions = ("begun", "answers", "steps", "pieces", "moved", "copied", "saved", "loaded")
        self.counts: dict[str, int] = dict.fromkeys(actions, 0)

    def round(self, *, begins: bool) -> None:
        """Something of everything that a scheduler does between two steps."""
        if begins and None in self.running and self.generator.random() < 0.6:
            self._begin()
        for slot, one in enumerate(self.running):
            if one is not None and not one.token_ids and self.generator.random() < 0.7:
                self._prefill(slot, one)
        for slot in range(len(self.running)):
            one = self.running[slot]
            if one is not None and one.token_ids and slot > self._decoded():
                self._move_to_front(slot)
        if self._decoded():
            self._step()

    def _decoded(self) -> int:
        """Slots in front that are decoded."""
        return next(
            (i for i, one in enumerate(self.running) if one is None or not one.token_ids),
            len(self.running),
        )

    def _begin(self) -> None:
        index = int(self.generator.integers(len(self.asked)))
        question = self.asked[index]
        free = [slot for slot, one in enumerate(self.running) if one is None]
        slot = int(self.generator.choice(free))
        lengths = [len(one.question.prompt) + one.new_tokens for one in self.running if one]
        one = _Running(question, int(self.generator.integers(1, len(question.token_ids) + 1)))
        used = max([slot, *(i for i, other in enumerate(self.running) if other)]) + 1
        if not self.slots.fits(used, max([*lengths, len(question.prompt) + one.new_tokens])):
            return
        self.running[slot] = one
        self.counts["begun"] += 1
        self._reuse(slot, index, one)

    def _reuse(self, slot: int, index: int, one: _Running) -> None:
        """Takes the same prompt from another slot or from what was stored, all but a token of it.

        Where tokens see each other, only the whole prompt's keys and values are right.
        """
        most = len(one.question.prompt) - 1
        if not most:
            return
        length = int(self.generator.integers(1, most + 1)) if self.cuts else most
        others = [
            place
            for place, other in enumerate(self.running)
            if other
            and other is not one
            and other.question is one.question
            and other.done == most + 1
        ]
        if others and self.generator.random() < 0.7:
            self.slots.copy(others[0], slot, length)
            self.counts["copied"] += 1
        elif index in self.stored and self.generator.random() < 0.7:
            self.slots.load(slot, self.stored[index], length)
            self.counts["loaded"] += 1
        else:
            return
        one.done = length

    def _prefill(self, slot: int, one: _Running) -> None:
        length = len(one.question.prompt)
        stop = length
        if self.cuts:
            stop = int(self.generator.integers(one.done + 1, length + 1))
        logits = self.slots.prefill(slot, one.question.prompt, one.done, stop)
        self.counts["pieces"] += 1
        one.done = stop
        if stop == length:
            self._take(slot, one, logits)

    def _move_to_front(self, slot: int) -> None:
        """Puts a sequence behind the decoded ones, and what is there where it was."""
        target = self._decoded()
        waiting = self.running[target]
        stored = self.slots.save(target, waiting.done) if waiting and waiting.done else None
        if waiting is not None:
            self.slots.release(target)
        self.slots.move(slot, target)
        self.counts["moved"] += 1
        self.running[target], self.running[slot] = self.running[slot], waiting
        if stored is not None and waiting is not None:
            self.slots.load(slot, stored, waiting.done)

    def _step(self) -> None:
        decoded = [one for one in self.running[: self._decoded()] if one is not None]
        logits = self.slots.step(np.array([one.token_ids[-1] for one in decoded], np.int64))
        self.counts["steps"] += 1
        for slot in reversed(range(len(decoded))):
            self._take(slot, decoded[slot], logits[slot].copy())

    def _take(self, slot: int, one: _Running, logits: NDArray[np.float32]) -> None:
        """Compares what a sequence says, and ends it if it is long enough."""
        question, place = one.question, len(one.token_ids)
        difference = float(np.abs(logits - question.logits[place]).max())
        self.largest = max(self.largest, difference)
        assert difference <= self.atol, (slot, place, difference)
        expected = question.token_ids[place]
        assert float(logits.max() - logits[expected]) <= self.margin, (slot, place)
        one.token_ids.append(expected)
        if len(one.token_ids) == one.new_tokens:
            index = list(self.asked).index(question)
            if self.generator.random() < 0.5:
                self.stored[index] = self.slots.save(slot, len(question.prompt))
                self.counts["saved"] += 1
            self.slots.release(slot)
            self.running[slot] = None
            self.counts["answers"] += 1
