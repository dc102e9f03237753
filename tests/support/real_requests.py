"""Requests of the trained checkpoints, prepared so that only the decoder has still to run."""

from __future__ import annotations

import hashlib
import itertools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tiny.recipes import RECIPES

from vlmport.runtime import Request, SamplingOptions
from vlmport.runtime.generate import make_row
from vlmport.runtime.messages import Message, TextPart, messages_from_prompt
from vlmport.runtime.preparation import chat_of
from vlmport.runtime.serving.prefix_key import PrefixKey
from vlmport.runtime.serving.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmport.runtime import VisionLanguageModel
    from vlmport.runtime.backends.base import PromptEmbeddings
    from vlmport.runtime.prompt import EncodedPrompt

__all__ = ["PreparedRequest", "mixed_requests", "prepared"]

HELDOUT_SEED = 3  # scripts/train_tiny.py's
# Families whose template takes one turn alone are not asked a second one.
CHATS = ("tinyllava", "idefics2")


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A request in the form that the batch takes.

    Attributes:
        request: what was asked.
        prompt: encoded.
        embeds: its embeddings, which several sequences may share.
        key: its content.
        sizes: of its pictures.
    """

    request: Request
    prompt: EncodedPrompt
    embeds: PromptEmbeddings
    key: PrefixKey
    sizes: tuple[tuple[int, int], ...]

    def sequence(self, model: VisionLanguageModel, ticket: int, *, priority: int = 0) -> Sequence:
        started = time.perf_counter()
        row = make_row(
            self.request,
            self.prompt,
            self.embeds,
            model.manifest,
            model.tokenizer,
            started,
            self.sizes,
        )
        return Sequence(ticket, row, self.key, priority)


def prepared(model: VisionLanguageModel, request: Request) -> PreparedRequest:
    """Everything that is done with a request before the decoder sees it."""
    images = [model.prepare(image) for image in request.images]
    prompt = model.encode(chat_of(request, model.manifest), [image.layout for image in images])
    features = [model.encode_image(image) for image in images]
    embeds = model.embed_prompt(prompt, features)
    digests = [digest(image.inputs) for image in images]
    lengths = [len(one) for one in features]
    key = PrefixKey.of_prompt(prompt.input_ids, prompt.image_mask, lengths, digests)
    return PreparedRequest(request, prompt, embeds, key, tuple(image.size for image in images))


def digest(inputs: dict[str, Any]) -> bytes:
    found = hashlib.sha256()
    for name, array in sorted(inputs.items()):
        found.update(f"{name}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.digest()


def mixed_requests(name: str, model: VisionLanguageModel, count: int, seed: int) -> list[Request]:
    """Questions about real drawings with all kinds of options; pictures and questions recur."""
    generator = np.random.default_rng(seed)
    found = list(itertools.islice(_questions(name, model, count), count))
    generator.shuffle(found)
    return [
        replace(
            request,
            max_new_tokens=int(generator.integers(1, 25)),
            sampling=_sampling(generator),
            stop_strings=((), (), ("e",), (" is", "er"))[generator.integers(4)],
        )
        for request in found
    ]


def _questions(name: str, model: VisionLanguageModel, count: int) -> Iterator[Request]:
    samples = list(RECIPES[name].lessons().heldout(max(4, count // 4), HELDOUT_SEED))
    texts = [sample.question.text for sample in samples]
    for index in itertools.count():
        sample = samples[index % len(samples)]
        images = tuple(sample.drawing.images)
        if index % 3 == 2:  # of another size, which is a longer prompt for some families
            images = tuple(one.resize((2 * one.width, 3 * one.height), 0) for one in images)
        first = Request(prompt=sample.question.text, images=images)
        yield first
        yield first
        other = texts[(index + 1) % len(texts)]
        yield Request(prompt=other, images=images)
        if name in CHATS:
            yield _second_turn(model, first, other)


def _second_turn(model: VisionLanguageModel, first: Request, text: str) -> Request:
    """The chat goes on behind what the model answers greedily."""
    assert first.prompt is not None
    answer = model.generate(prompt=first.prompt, images=first.images, max_new_tokens=16).text
    turns = (
        *messages_from_prompt(first.prompt, len(first.images), "<no image has this place>"),
        Message("assistant", (TextPart(answer),)),
        Message("user", (TextPart(text),)),
    )
    return Request(messages=turns, images=first.images)


def _sampling(generator: np.random.Generator) -> SamplingOptions:
    if generator.random() < 0.5:
        return SamplingOptions()
    return SamplingOptions(
        temperature=float(generator.choice([0.7, 1.0, 1.6])),
        top_k=int(generator.choice([0, 20])),
        top_p=float(generator.choice([1.0, 0.9])),
        min_p=float(generator.choice([0.0, 0.02])),
        repetition_penalty=float(generator.choice([1.0, 1.2])),
        presence_penalty=float(generator.choice([0.0, 0.5])),
        seed=int(generator.integers(1000)),
    )
