"""The points of a benchmark, and what was measured at each of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmport.api.bench_contenders import DecodeTiming
from vlmport.api.bench_worker import NotRun
from vlmport.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlmport.api.bench_prompts import BenchPrompt, PromptMaker
    from vlmport.api.bench_worker import Worker

__all__ = [
    "DecodePoint",
    "FirstTokenPoint",
    "Measurement",
    "Point",
    "decode_points",
    "first_token_points",
]


@dataclass(frozen=True, slots=True)
class FirstTokenPoint:
    """Time to the first token of one prompt.

    Attributes:
        images: pictures.
        text_tokens: that were asked for.
        prompt: None if there is none.
        reason: why there is none; "" if there is one.
    """

    images: int
    text_tokens: int
    prompt: BenchPrompt | None
    reason: str


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """Decode steps after one prompt.

    Attributes:
        batch: rows.
        context: tokens of the prompt that were asked for.
        steps: that are timed.
        prompt: None if there is none.
        reason: why there is none; "" if there is one.
    """

    batch: int
    context: int
    steps: int
    prompt: BenchPrompt | None
    reason: str


Point = FirstTokenPoint | DecodePoint


@dataclass(slots=True)
class Measurement:
    """Samples, as they come in.

    Attributes:
        points: what is measured.
        contenders: names; the first is the bundle that the others are compared with.
        bandwidths: bytes per second, one a round.
        seconds: (point, contender) -> one sample a round: to the first token, or of the median
            step.
        host_seconds: the same of what the host spends on a step; only where that is known.
        reasons: (point, contender) -> why there are no samples.
    """

    points: tuple[Point, ...]
    contenders: tuple[str, ...]
    bandwidths: list[float] = field(default_factory=list)
    seconds: dict[tuple[Point, str], list[float]] = field(default_factory=dict)
    host_seconds: dict[tuple[Point, str], list[float]] = field(default_factory=dict)
    reasons: dict[tuple[Point, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Points without a prompt are refused to everyone."""
        for point in self.points:
            if point.prompt is None:
                self.reasons |= {(point, name): point.reason for name in self.contenders}

    def refuse(self, contender: str, refusal: NotRun) -> None:
        """A contender is measured nowhere."""
        for point in self.points:
            self.reasons.setdefault((point, contender), refusal.reason)

    def warm_up(self, point: Point, contender: str, worker: Worker) -> None:
        """Measures once for nothing; a contender that cannot do it is not asked again."""
        self._ask(point, contender, worker)

    def measure(self, point: Point, contender: str, worker: Worker) -> None:
        """Adds the sample of a round."""
        answer = self._ask(point, contender, worker)
        if answer is None:
            return
        key = (point, contender)
        if not isinstance(answer, DecodeTiming):
            self.seconds.setdefault(key, []).append(answer)
            return
        self.seconds.setdefault(key, []).append(statistics.median(answer.step_seconds))
        if answer.host_seconds is not None:
            self.host_seconds.setdefault(key, []).append(statistics.median(answer.host_seconds))

    def _ask(self, point: Point, contender: str, worker: Worker) -> float | DecodeTiming | None:
        key = (point, contender)
        if key in self.reasons or point.prompt is None:
            return None
        if isinstance(point, FirstTokenPoint):
            answer: float | DecodeTiming | NotRun = worker.first_token(point.prompt)
        else:
            answer = worker.decode(point.prompt, point.batch, point.steps)
        if not isinstance(answer, NotRun):
            return answer
        # Samples of a contender that failed in a later round have no partners: they go.
        self.reasons[key] = answer.reason
        self.seconds.pop(key, None)
        self.host_seconds.pop(key, None)
        return None


def first_token_points(
    maker: PromptMaker, images: Sequence[int], text_tokens: Sequence[int]
) -> Iterator[FirstTokenPoint]:
    """Every number of pictures with every length of text."""
    for count in images:
        for wanted in text_tokens:
            prompt, reason = _prompt(maker, count, wanted, 1)
            yield FirstTokenPoint(count, wanted, prompt, reason)


def decode_points(
    maker: PromptMaker, contexts: Sequence[int], batches: Sequence[int], steps: int
) -> Iterator[DecodePoint]:
    """Every context at every batch, with a picture where the model answers about pictures alone."""
    images = maker.least_images
    others = maker.image_tokens(images)
    for context in contexts:
        prompt, reason = _prompt(maker, images, context - others, steps + 1)
        for batch in batches:
            yield DecodePoint(batch, context, steps, prompt, reason)


def _prompt(
    maker: PromptMaker, images: int, text_tokens: int, new_tokens: int
) -> tuple[BenchPrompt | None, str]:
    try:
        return maker.make(images, text_tokens, new_tokens), ""
    except InputError as error:
        return None, str(error)
