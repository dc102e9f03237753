"""A reference and a bundle that are scripts: quick, exact, and wrong where a test wants it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlmport.api.builtin_cases import Case
from vlmport.api.parity_model import TokensAndText
from vlmport.export.reference import IMAGE_TOKEN, ReferenceAnswer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["END", "VOCAB", "FakeModel", "FakeReference", "fake_cases"]

VOCAB = 12
END = 0
_TOKENS_AN_IMAGE = 4


def fake_cases() -> tuple[Case, ...]:
    text: dict[str, str] = {"type": "text", "text": "Hi"}
    question: dict[str, str] = {"type": "text", "text": "What is <this> & that?"}
    image = {"type": "image"}
    picture = Image.new("RGB", (8, 6), (10, 200, 90))
    return (
        Case("text", (text,), ()),
        Case("picture", (image, question), (picture,)),
        Case("two", (image, image, text), (picture, Image.new("L", (5, 5), 77))),
    )


def _prompt(messages: Sequence[dict[str, Any]]) -> str:
    return "".join(str(part) for part in messages[0]["content"])


@dataclass
class FakeReference:
    """Answers every prompt with a fixed sequence of tokens, each a clear winner.

    Attributes:
        length: tokens before the end-of-sequence token.
        edit_logits: changes the logits [steps, vocab_size] of every answer.
    """

    length: int = 6
    edit_logits: Callable[[NDArray[np.float32]], None] = lambda logits: None

    def image_inputs(self, image: Image.Image) -> dict[str, NDArray[Any]]:
        sized = np.asarray(image.resize((4, 4)), np.float32).transpose(2, 0, 1)[None]
        return {"pixel_values": (sized / 255).astype(np.float32)}

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if graph == "vision_encoder":
            pixels = inputs["pixel_values"]
            return {"vision_features": pixels.reshape(len(pixels), 4, 12) * 100 + 1}
        if graph == "projector":
            features = inputs["vision_features"][..., :6] / 50
            return {"image_features": features.astype(np.float32)}
        table = np.random.default_rng(0).standard_normal((128, 6), np.float32)
        return {"inputs_embeds": table[inputs["input_ids"]]}

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> NDArray[np.int64]:
        images = sum(part["type"] == "image" for part in messages[0]["content"])
        text = [ord(letter) % 128 for letter in _prompt(messages)]
        return np.array([IMAGE_TOKEN] * (_TOKENS_AN_IMAGE * images) + text, np.int64)

    def logits(self, messages: Sequence[dict[str, Any]]) -> NDArray[np.float32]:
        random = np.random.default_rng(len(_prompt(messages)))
        logits = random.standard_normal((self.length + 1, VOCAB)).astype(np.float32)
        winners = [*random.integers(1, VOCAB, self.length), END]
        logits[np.arange(self.length + 1), winners] = 6.0
        self.edit_logits(logits)
        return logits

    def greedy(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image], max_new_tokens: int
    ) -> ReferenceAnswer:
        logits = self.logits(messages)[:max_new_tokens]
        token_ids = np.array([_choice(row) for row in logits], np.int64)
        return ReferenceAnswer(self.prompt_ids(messages), token_ids, logits, _text(token_ids))


@dataclass
class FakeModel:
    """A bundle of `reference`, exact but for what a test plants in it.

    Attributes:
        reference: what it imitates.
        edits: "preprocessing", "encode", "logits" or a graph -> function that gets its right array
            and returns another.
        edit_logits: changes the logits [steps, vocab_size] of a case; gets the case's name.
        edit_batch: the same, in batches of several cases only.
        edit_tokens: what is answered in place of the argmax of each step.
    """

    reference: FakeReference = field(default_factory=FakeReference)
    edits: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    edit_logits: Callable[[str, NDArray[np.float32]], None] = lambda name, logits: None
    edit_batch: Callable[[str, NDArray[np.float32]], None] = lambda name, logits: None
    edit_tokens: Callable[[list[int]], list[int]] = lambda token_ids: token_ids
    max_length: int = 4096

    @property
    def image_graphs(self) -> tuple[str, ...]:
        return ("vision_encoder", "projector")

    def image_inputs(self, image: Path | Image.Image) -> dict[str, NDArray[Any]]:
        assert isinstance(image, Image.Image)
        inputs = self.reference.image_inputs(image.convert("RGB"))
        return self._edited_values("preprocessing", inputs)

    def encode(self, case: Case) -> NDArray[np.int64]:
        return self._edited("encode", self.reference.prompt_ids(case.messages))

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._edited_values(graph, self.reference.run(graph, inputs))

    def greedy(
        self,
        cases: Sequence[Case],
        max_new_tokens: int,
        on_logits: Callable[[NDArray[np.float32]], None],
    ) -> list[TokensAndText]:
        rows = [self._logits(case, len(cases) > 1, max_new_tokens) for case in cases]
        width = rows[0].shape[1]
        # One buffer for all steps, and rubbish after a row's end, as a runtime may do it.
        buffer = np.empty((len(cases), width), np.float32)
        for step in range(max(len(logits) for logits in rows)):
            for index, logits in enumerate(rows):
                buffer[index] = logits[step] if step < len(logits) else np.nan
            on_logits(buffer)
        answers = [self.edit_tokens([_choice(row) for row in logits]) for logits in rows]
        return [TokensAndText(tuple(ids), _text(ids)) for ids in answers]

    def _logits(self, case: Case, is_batch: bool, max_new_tokens: int) -> NDArray[np.float32]:
        room = self.max_length - len(self.encode(case))
        logits = self.reference.logits(case.messages)[: min(max_new_tokens, room)].copy()
        self.edit_logits(case.name, logits)
        if is_batch:
            self.edit_batch(case.name, logits)
        return self._edited("logits", logits)

    def _edited_values(
        self, method: str, arrays: dict[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        return {name: self._edited(method, array) for name, array in arrays.items()}

    def _edited(self, method: str, result: NDArray[Any]) -> NDArray[Any]:
        edited: NDArray[Any] = self.edits.get(method, lambda unchanged: unchanged)(result)
        return edited


def _choice(logits: NDArray[np.float32]) -> int:
    return int(np.nan_to_num(logits, nan=-np.inf).argmax())


def _text(token_ids: Sequence[int] | NDArray[np.int64]) -> str:
    return " ".join(f"<{int(token)}>" for token in token_ids if token != END)
