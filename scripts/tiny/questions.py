"""Questions about a drawing, with their exact answers, and the held-out set made of them.

Six kinds: shape, colour, position, count, digit, word. What is not in the drawing is asked for too
and answered "nothing", so a model that guesses without looking is found out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from PIL import Image

from tiny.drawings import COLOURS, DIGITS, PLACES, SHAPES, WORDS, Drawing, drawings

__all__ = [
    "COLOUR_OF", "COUNTS", "HOW_MANY", "KINDS", "NOTHING", "SHAPE_OF_COLOUR", "WHERE_IS",
    "Pictured", "Question", "Sample", "ask", "corpus", "heldout", "pose",
]  # fmt: skip

KINDS = ("shape", "colour", "position", "count", "digit", "word")
COUNTS = ("zero", "one", "two", "three")
NOTHING = "nothing"
HALVES: dict[tuple[int, ...], str] = {(0, 1): "at the top", (2, 3): "at the bottom"}

SHAPE_AT = (
    "What shape is in the {place}?",
    "Which shape is drawn in the {place} corner?",
    "Name the shape in the {place}.",
)
SHAPE_OF_COLOUR = (
    "What shape is {colour}?",
    "Which shape has the colour {colour}?",
    "Name the {colour} shape.",
)
THING_AT = ("What is in the {place}?", "What do you see in the {place} corner?")
COLOUR_OF = (
    "What colour is the {thing}?",
    "What is the colour of the {thing}?",
    "Which colour does the {thing} have?",
    "Tell me the color of the {thing}.",
)
WHERE_IS = (
    "Where is the {thing}?",
    "In which part of the picture is the {thing}?",
    "Tell me where the {thing} is.",
)
HOW_MANY = (
    "How many shapes are there?",
    "How many shapes do you see?",
    "Count the shapes in the picture.",
    "What is the number of shapes?",
)
WHICH_DIGIT = (
    "Which digit is written?",
    "What digit do you see in the picture?",
    "Read the digit.",
    "What number is written here?",
)
WHICH_WORD = (
    "Which word is written?",
    "What word do you see in the picture?",
    "Read the word.",
    "What does the text say?",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one drawing.

    Attributes:
        kind: an element of KINDS.
        text: the question, one English sentence.
        answer: the only answer counted as right; one to six words.
    """

    kind: str
    text: str
    answer: str


class Pictured(Protocol):
    """Anything that a model can be asked about."""

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """Returns what the model is shown, in order."""
        ...


P_co = TypeVar("P_co", bound=Pictured, covariant=True)


@dataclass(frozen=True)
class Sample(Generic[P_co]):
    """A drawing, or several, with one question about it."""

    drawing: P_co
    question: Question


def ask(drawing: Drawing, rng: random.Random) -> list[Question]:
    """Lists questions about a drawing in random order and random phrasing."""
    questions = [pose("count", HOW_MANY, COUNTS[len(drawing.of_kind("shape"))], rng)]
    for item in drawing.of_kind("shape"):
        place = PLACES[item.cells[0]]
        questions += _ask_about_shape(item.name, item.colour, place, rng)
    for kind, phrasings in (("digit", WHICH_DIGIT), ("word", WHICH_WORD)):
        for item in drawing.of_kind(kind):
            place = HALVES.get(item.cells) or PLACES[item.cells[0]]
            questions.append(pose(kind, phrasings, item.name, rng))
            questions.append(pose("colour", COLOUR_OF, item.colour, rng, thing=kind))
            questions.append(pose("position", WHERE_IS, place, rng, thing=kind))
        if not drawing.of_kind(kind):
            questions.append(pose(kind, phrasings, NOTHING, rng))
    taken = {cell for item in drawing.items for cell in item.cells}
    empty = [place for cell, place in enumerate(PLACES) if cell not in taken]
    if empty:
        questions.append(pose("shape", SHAPE_AT + THING_AT, NOTHING, rng, place=rng.choice(empty)))
    rng.shuffle(questions)
    return questions


def heldout(count: int, seed: int) -> list[Sample[Drawing]]:
    """Makes a held-out set: as many questions of each kind, each about its own drawing.

    No drawing of it can be a training drawing (see `drawings`). At most one answer in ten of a
    kind is "nothing".

    Args:
        count: number of samples.
        seed: equal arguments give equal sets.
    """
    rng = random.Random(seed)
    stream = drawings(seed, held_out=True)
    samples = []
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        may_be_nothing = index // len(KINDS) % 10 == 0
        samples.append(_sample_of_kind(kind, stream, rng, may_be_nothing=may_be_nothing))
    return samples


def corpus() -> list[str]:
    """Lists every question phrasing, filled in, and every answer: the tokenizer's training text."""
    things = [*SHAPES, "digit", "word"]
    questions = [text.format(place=p) for text in SHAPE_AT + THING_AT for p in PLACES]
    questions += [text.format(colour=colour) for text in SHAPE_OF_COLOUR for colour in COLOURS]
    questions += [text.format(thing=t) for text in COLOUR_OF + WHERE_IS for t in things]
    questions += [*HOW_MANY, *WHICH_DIGIT, *WHICH_WORD]
    answers = [*SHAPES, *COLOURS, *PLACES, *HALVES.values(), *COUNTS, *DIGITS, *WORDS, NOTHING]
    answers += [_thing(shape, colour) for shape in SHAPES for colour in COLOURS]
    return questions + answers


def _ask_about_shape(name: str, colour: str, place: str, rng: random.Random) -> list[Question]:
    either = rng.choice((name, f"{colour} shape"))
    known = rng.choice((name, f"shape in the {place}"))
    return [
        pose("shape", SHAPE_AT, name, rng, place=place),
        pose("shape", SHAPE_OF_COLOUR, name, rng, colour=colour),
        pose("shape", THING_AT, _thing(name, colour), rng, place=place),
        pose("colour", COLOUR_OF, colour, rng, thing=known),
        pose("position", WHERE_IS, place, rng, thing=either),
    ]


def _thing(shape: str, colour: str) -> str:
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {shape}"


def pose(
    kind: str, phrasings: tuple[str, ...], answer: str, rng: random.Random, **blanks: str
) -> Question:
    """Makes a question in one of its phrasings, its blanks filled in."""
    return Question(kind, rng.choice(phrasings).format(**blanks), answer)


def _sample_of_kind(
    kind: str, stream: Iterator[Drawing], rng: random.Random, *, may_be_nothing: bool
) -> Sample[Drawing]:
    for drawing in stream:
        for question in ask(drawing, rng):
            if question.kind == kind and (may_be_nothing or question.answer != NOTHING):
                return Sample(drawing, question)
    message = "the stream of drawings ended; it is expected to be endless"
    raise ValueError(message)
