"""Requests of mixed options for each trained checkpoint, and what they are answered alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from support.trained import EXAMPLES

from vlmport.errors import InputError
from vlmport.runtime import Request, SamplingOptions, VisionLanguageModel
from vlmport.runtime.messages import ImagePart, Message, TextPart

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Expected", "Family", "expected_of", "mixed_requests"]


@dataclass(frozen=True, slots=True)
class Expected:
    """What `vlmport generate` gives: tokens and text, or the message of its error."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """A trained checkpoint as the models `name` and `name`_bls of a server, and in this process."""

    name: str
    model: VisionLanguageModel
    requests: list[Request]
    expected: list[Expected]


def mixed_requests(checkpoint: str) -> list[Request]:
    """Greedy and sampled, long and short, one picture, two or none, stop strings and chats."""
    folder = "questions" if checkpoint == "tinyllava" else f"questions-{checkpoint}"
    lines = (EXAMPLES / folder / "heldout.jsonl").read_text().splitlines()[:4]
    rows = [json.loads(line) for line in lines]
    pictures: list[Path] = [EXAMPLES / folder / row["image"] for row in rows]
    texts: list[str] = [row["text"] for row in rows]
    # Nearly all tokens alike: long answers in which every random number counts.
    hot = SamplingOptions(temperature=6.0, seed=11)
    turn = Message("user", (ImagePart(), TextPart(texts[0])))
    chat = (
        turn,
        Message("assistant", (TextPart(rows[0]["answer"]),)),
        Message("user", (TextPart(texts[1]),)),
    )
    return [
        Request(texts[0], images=(pictures[0],)),
        Request(texts[1], images=(pictures[1],), max_new_tokens=1),
        Request(texts[0], images=(pictures[0],), stop_strings=(rows[0]["answer"][-2:], "zzz")),
        Request(texts[2], images=(pictures[2],), sampling=hot, max_new_tokens=40),
        Request(
            texts[0],
            images=(pictures[0], pictures[1]),
            sampling=SamplingOptions(5.0, top_k=60, top_p=0.95, min_p=0.001, seed=5),
            max_new_tokens=24,
        ),
        Request(
            texts[3],
            images=(pictures[3],),
            sampling=SamplingOptions(
                4.0,
                repetition_penalty=1.3,
                frequency_penalty=0.5,
                presence_penalty=-0.5,
                seed=2**40,
            ),
            max_new_tokens=24,
        ),
        Request(messages=(turn,), images=(pictures[0],), sampling=hot, max_new_tokens=12),
        # Some families refuse these two: their clients must get the same words.
        Request(messages=chat, images=(pictures[0],)),
        Request(texts[0], sampling=hot, max_new_tokens=16),
    ]


def expected_of(model: VisionLanguageModel, request: Request) -> Expected:
    """What the request is answered alone and in this process."""
    try:
        result = model.generate_batch([request])[0]
    except InputError as error:
        return Expected(error=str(error))
    return Expected(result.token_ids, result.text, result.finish_reason)
