"""What the decode loop on a GPU must do, run on a real GPU and on the emulated one alike.

Models here do not stop at an end-of-sequence token (`device_scenarios.endless`), so that answers
are long enough to reach captured steps.
"""

from __future__ import annotations

import itertools
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image
from support.parity_cases import mixed_cases

from vlmport.api.parity import select_cases
from vlmport.api.parity_answers import Answer, compare_answers
from vlmport.api.parity_bundle import OpenedBundle
from vlmport.api.parity_compare import compare
from vlmport.api.parity_report import worst_verdict
from vlmport.api.progress import SilentProgress
from vlmport.runtime import Request, SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.runtime import VisionLanguageModel
    from vlmport.runtime.request import Piece

__all__ = [
    "SAMPLED",
    "check_answers",
    "check_cancellation",
    "check_full_context",
    "check_interleaved",
    "check_logits_path",
    "check_many_generations",
    "check_parity",
    "check_sampling",
    "check_stop_string",
    "loop_requests",
]

_QUESTION = "What shape is there? "
_SIZES = ((61, 83), (56, 56), (100, 31))
_LENGTHS = (9, 3, 14)  # most new tokens
SAMPLED = (
    SamplingOptions(temperature=0.8, seed=1),
    SamplingOptions(temperature=1.3, top_k=20, seed=2),
    SamplingOptions(temperature=1.0, top_p=0.7, min_p=0.02, seed=3),
    SamplingOptions(
        temperature=0.9,
        repetition_penalty=1.4,
        frequency_penalty=0.5,
        presence_penalty=0.3,
        seed=4,
    ),
    SamplingOptions(repetition_penalty=1.7, frequency_penalty=0.8),
    SamplingOptions(),
)


def loop_requests(count: int, max_new_tokens: int | None = None) -> list[Request]:
    """Prompts, pictures and answers of different lengths; every third one has two pictures."""
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (*s, 3), np.uint8)) for s in _SIZES]
    return [
        Request(
            prompt=_QUESTION * (1 + index % 4),
            images=tuple(pictures[: 2 if index % 3 == 2 else 1]),
            max_new_tokens=max_new_tokens or _LENGTHS[index % 3],
        )
        for index in range(count)
    ]


def check_answers(
    found: VisionLanguageModel, expected: VisionLanguageModel, requests: Sequence[Request]
) -> None:
    """Greedy tokens in one batch equal the other backend's, up to a fork that is a near tie.

    In float32 the emulated GPU computes what ONNX Runtime does; it has no forks.
    """
    together = found.generate_batch(requests)
    for request, result in zip(requests, together, strict=True):
        reference = _answer(expected, request)
        if result.token_ids == reference.token_ids:
            assert result.text == reference.text
            continue
        ours = _answer(found, replace(request, max_new_tokens=len(reference.token_ids)))
        comparison = compare_answers(
            Answer(result.token_ids, ours.logits, result.text),
            reference,
            found.manifest.precision,
            check="batch",
            subject=found.backend,
            other=expected.backend,
        )
        faults = [one.message for one in comparison.findings if one.verdict == "FAIL"]
        assert not faults, "\n".join(faults)


def check_parity(model: VisionLanguageModel, checkpoint: Path) -> None:
    """As `vlmport parity`: every graph, every step's logits and tokens beside PyTorch's."""
    from vlmport.export.family import load_reference

    precision = model.manifest.precision
    is_half = precision != "float32"
    bundle = OpenedBundle(model)
    cases, _ = select_cases(mixed_cases(), bundle)
    reports = compare(
        load_reference(checkpoint, precision),
        bundle,
        cases,
        24,
        SilentProgress(),
        precision=precision,
        float32=load_reference(checkpoint) if is_half else None,
    )
    findings = [f"{one.verdict}: {one.message}" for case in reports for one in case.findings]
    verdict = worst_verdict(report.verdict for report in reports)
    assert verdict in ("PASS", "NEAR_TIE"), "\n".join(findings)


def check_logits_path(model: VisionLanguageModel, requests: Sequence[Request]) -> None:
    """Tokens chosen on the GPU are those that the host chooses from the GPU's logits."""
    steps: list[NDArray[np.float32]] = []
    on_gpu = model.generate_batch(requests)
    on_host = model.generate_batch(requests, on_logits=lambda logits: steps.append(logits.copy()))
    assert [one.token_ids for one in on_gpu] == [one.token_ids for one in on_host]
    assert len(steps) == max(len(one.token_ids) for one in on_host)


def check_sampling(found: VisionLanguageModel, expected: VisionLanguageModel) -> None:
    """A seed gives the same tokens as on the CPU, whatever the neighbours in the batch do."""
    [question] = loop_requests(1, max_new_tokens=10)
    requests = [replace(question, sampling=sampling) for sampling in SAMPLED]
    for batch in (requests[:3], requests[3:], requests[3:4]):
        ours = [one.token_ids for one in found.generate_batch(batch)]
        assert ours == [expected.generate_batch([one])[0].token_ids for one in batch]


def check_stop_string(found: VisionLanguageModel, expected: VisionLanguageModel) -> None:
    """A text ends an answer in the middle; its neighbour goes on."""
    first, second = loop_requests(2, max_new_tokens=12)
    [whole] = expected.generate_batch([first])
    middle = whole.text[len(whole.text) // 2 :][:3]
    requests = [replace(first, stop_strings=(middle,)), second]
    ours, theirs = found.generate_batch(requests), expected.generate_batch(requests)
    assert [one.finish_reason for one in ours] == ["stop", "length"]
    assert [(one.text, one.token_ids) for one in ours] == [
        (one.text, one.token_ids) for one in theirs
    ]


def check_cancellation(
    found: VisionLanguageModel,
    expected: VisionLanguageModel,
    used: Callable[[], int],
    slack: int = 0,
) -> None:
    """An answer that is broken off gives its memory to the next, which is not disturbed.

    Args:
        found: under test.
        expected: what it is compared with.
        used: bytes of the GPU's memory in use.
        slack: bytes by which they may differ.
    """
    [request] = loop_requests(1, max_new_tokens=16)
    after: list[int] = []
    for pieces in (1, 2, 5, 3):
        stream = _stream(found, request)
        list(itertools.islice(stream, pieces))
        stream.close()
        del stream
        after.append(used())
    assert max(after) - after[0] <= slack, after
    check_answers(found, expected, [request])


def check_interleaved(found: VisionLanguageModel, expected: VisionLanguageModel) -> None:
    """Two answers that are read in turns do not disturb each other."""
    first, second = loop_requests(2, max_new_tokens=8)
    turns = zip(_stream(found, first), _stream(found, second), strict=True)
    ours = [list(tokens) for tokens in zip(*turns, strict=True)]
    for tokens, request in zip(ours, (first, second), strict=True):
        assert tuple(tokens) == expected.generate_batch([request])[0].token_ids


def check_full_context(
    found: VisionLanguageModel, expected: VisionLanguageModel, max_length: int
) -> None:
    """An answer fills the cache to its last row, beside a longer row that ended before."""
    short, long = loop_requests(2, max_new_tokens=1)
    prompts = [one.prompt_tokens for one in expected.generate_batch([short, long])]
    assert prompts[0] + 4 < prompts[1] + 2 <= max_length
    # The last token is chosen and never appended.
    filling = replace(short, max_new_tokens=max_length - prompts[0])
    check_answers(found, expected, [filling, replace(long, max_new_tokens=2)])


def check_many_generations(
    model: VisionLanguageModel, used: Callable[[], int], count: int, slack: int = 0
) -> None:
    """Memory in use does not grow, whatever is asked: batches, sampling, answers broken off.

    Args:
        model: under test.
        used: bytes of the GPU's memory in use.
        count: generations; the first quarter warms up.
        slack: bytes by which it may differ.
    """
    marks = []
    for index in range(count):
        requests = loop_requests(1 + index % 3, max_new_tokens=4)
        if index % 4 == 1:
            requests = [replace(one, sampling=SAMPLED[3]) for one in requests]
        if index % 5 == 4:
            stream = _stream(model, requests[0])
            next(stream)
            stream.close()
        else:
            model.generate_batch(requests)
        if index >= count // 4 and index % 12 == 0:  # always after the same kind of request
            marks.append(used())
    assert len(marks) >= 2
    assert max(marks) - marks[0] <= slack, marks


def _answer(model: VisionLanguageModel, request: Request) -> Answer:
    """A greedy answer with its logits, asked alone."""
    steps: list[NDArray[np.float32]] = []
    [result] = model.generate_batch(
        [request], on_logits=lambda logits: steps.append(logits[0].copy())
    )
    return Answer(result.token_ids, np.stack(steps), result.text)


def _stream(model: VisionLanguageModel, request: Request) -> Generator[int]:
    """Token ids of an answer as they are decoded."""
    assert request.prompt is not None
    pieces = model.stream(
        prompt=request.prompt,
        images=request.images,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
    )
    with closing(cast("Generator[Piece]", pieces)):
        for piece in pieces:
            assert piece.token_id is not None
            yield piece.token_id
