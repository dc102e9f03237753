"""A model's own greedy answers, and how closely another model follows them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vlmport.api.agreement import AnswerAgreement, compare_step, sum_agreement
from vlmport.runtime.sampling import SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.api.agreement import Agreement
    from vlmport.api.progress import Progress
    from vlmport.runtime import Request, VisionLanguageModel

__all__ = [
    "GreedyAnswer",
    "ask_reference",
    "keep_answer",
    "measure_agreement",
    "measure_answers",
]


_NO_TEXT = "(no text: its logits hold NaN or Inf)"


@dataclass(frozen=True, slots=True, eq=False)
class GreedyAnswer:
    """A greedy answer of the model that others are held against.

    Attributes:
        name: the question in a word or two, for people.
        request: what was asked, with the most tokens that an answer may have.
        token_ids: the answer, the end-of-sequence token included if it came.
        logits: float32 [generated_tokens, vocab_size], from which each token was chosen; mapped
            from a file, so that any number of answers fits into memory.
        text: the decoded answer.
    """

    name: str
    request: Request
    token_ids: tuple[int, ...]
    logits: NDArray[np.float32]
    text: str


def ask_reference(
    model: VisionLanguageModel,
    requests: Sequence[Request],
    folder: Path,
    progress: Progress,
    *,
    max_new_tokens: int = 32,
) -> tuple[GreedyAnswer, ...]:
    """Asks a model all questions, one at a time, greedily.

    Args:
        model: the bundle of the higher precision.
        requests: chats; how they sample is passed over.
        folder: where logits are kept; takes 4 x vocab_size bytes a token. It must outlive the
            answers.
        progress: is told of each answered question.
        max_new_tokens: most tokens of an answer.

    Raises:
        InputError: if a question cannot be used.
    """
    answers = []
    progress.start("asking the model of higher precision", len(requests))
    for index, asked in enumerate(requests):
        request = replace(asked, max_new_tokens=max_new_tokens, sampling=SamplingOptions())
        rows: list[NDArray[np.float32]] = []
        [result] = model.generate_batch([request], on_logits=partial(_keep_row, rows))
        name = request.prompt or f"question {index + 1}"
        answers.append(
            keep_answer(folder, name, request, result.token_ids, np.stack(rows), result.text)
        )
        progress.advance(1)
    progress.finish()
    return tuple(answers)


def keep_answer(
    folder: Path,
    name: str,
    request: Request,
    token_ids: Sequence[int],
    logits: NDArray[np.float32],
    text: str,
) -> GreedyAnswer:
    """Moves an answer's logits, float32 [generated_tokens, vocab_size], into a file."""
    path = folder / f"logits{len(list(folder.iterdir()))}.npy"
    np.save(path, logits)
    kept: NDArray[np.float32] = np.load(path, mmap_mode="r")
    return GreedyAnswer(name, request, tuple(map(int, token_ids)), kept, text)


def measure_agreement(
    answers: Sequence[GreedyAnswer], model: VisionLanguageModel, progress: Progress
) -> Agreement:
    """Leads a model along the reference's answers and sums up how far its next tokens are off.

    Args:
        answers: of the model of higher precision.
        model: the bundle under test.
        progress: is told of each question.
    """
    progress.start("comparing next tokens", len(answers))
    agreement = sum_agreement(_led(answers, model, progress))
    progress.finish()
    return agreement


def measure_answers(
    answers: Sequence[GreedyAnswer], model: VisionLanguageModel, progress: Progress
) -> tuple[AnswerAgreement, ...]:
    """As `measure_agreement`, question by question, with the text of each differing answer."""
    progress.start("comparing next tokens", len(answers))
    results = []
    for answer, led in zip(answers, _led(answers, model, progress), strict=True):
        text = led.text
        if any(step.kl is None for step in led.steps):
            text = _NO_TEXT
        elif led.first_difference is not None:
            text = model.generate_batch([answer.request])[0].text
        results.append(AnswerAgreement(led.question, led.steps, led.reference_text, text))
    progress.finish()
    return tuple(results)


def _led(
    answers: Sequence[GreedyAnswer], model: VisionLanguageModel, progress: Progress
) -> Iterator[AnswerAgreement]:
    suppressed = model.manifest.generation.suppressed_token_ids
    for answer in answers:
        forced = model.forced_logits(answer.request, answer.token_ids)
        steps = tuple(
            compare_step(logits, reference, suppressed)
            for logits, reference in zip(forced, answer.logits, strict=True)
        )
        yield AnswerAgreement(answer.name, steps, answer.text, answer.text)
        progress.advance(1)


def _keep_row(rows: list[NDArray[np.float32]], step: NDArray[np.float32]) -> None:
    rows.append(step[0].copy())  # the runtime writes every step's logits into the same buffer
