"""What the tiny PaliGemma, Idefics2 and Fuyu are taught: scenes and questions about them.

Each family is asked about what is peculiar to it: where shapes are, in location tokens (PaliGemma);
how two pictures differ (Idefics2); how many rows and columns drawings of many widths and heights
have, and in which row something lies (Fuyu).
"""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from tiny.drawings import COLOURS, SHAPES
from tiny.questions import (
    COLOUR_OF,
    HOW_MANY,
    SHAPE_OF_COLOUR,
    WHERE_IS,
    Question,
    Sample,
    pose,
)
from tiny.scenes import Album, Layout, Scene, Shape, scenes

__all__ = ["ComparingLessons", "DetectionLessons", "GridLessons", "SceneLessons"]

NUMBERS = ("zero", "one", "two", "three", "four", "five")
INKS = sorted(COLOURS)
IS_THERE = ("Is there a {thing}?", "Do you see a {thing}?")
IN_WHICH_ROW = ("In which row is the {thing}?", "Which row has the {thing}?")
MORE = ("Which picture has more shapes?", "In which picture are more shapes?")
WHICH = ("Which picture has a {thing}?", "In which picture is a {thing}?")
SAME = ("Is the {thing} of the same colour in both pictures?",)
ORDINAL = ("What colour is the {thing} in the {which} picture?",)
ORDINALS = ("first", "second")
HARD = ("position", "which", "same")  # of the kinds, those that are learnt last
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
SLOTS = {2: (0, 2), 3: (0, 1, 2)}  # of three places, those that two or three rows or columns take
HOW_LARGE = ("How many {line} are there?", "Count the {line}.")


class SceneLessons(ABC):
    """What the three curricula share; see `tiny.family.Curriculum` for the methods.

    Attributes:
        kinds: the kinds of questions.
        label_sizes: how many values each label has.
        layout: what the drawings look like.
    """

    kinds: tuple[str, ...]
    label_sizes: tuple[int, ...]
    layout: Layout

    def examples(self, seed: int) -> Iterator[Album]:
        """Yields training albums."""
        return self._albums(seed, held_out=False)

    def heldout(self, count: int, seed: int) -> list[Sample[Album]]:
        """Makes a held-out set: as many questions of each kind, each about its own album."""
        rng = random.Random(seed)
        stream = self._albums(seed, held_out=True)
        kinds = itertools.islice(itertools.cycle(self.kinds), count)
        return [self._sample(kind, stream, rng) for kind in kinds]

    @abstractmethod
    def labels(self, example: Album) -> Tensor:
        """Returns int64 [num_features, num_labels]."""

    @abstractmethod
    def ask(self, example: Album, rng: random.Random) -> list[Question]:
        """Lists questions in random order."""

    @abstractmethod
    def corpus(self) -> list[str]:
        """Lists text with every word of the questions and answers, for the tokenizer."""

    def _albums(self, seed: int, *, held_out: bool) -> Iterator[Album]:
        for scene in scenes(self.layout, seed, held_out=held_out):
            yield Album((scene,))

    def _sample(self, kind: str, stream: Iterator[Album], rng: random.Random) -> Sample[Album]:
        for album in stream:
            for question in self.ask(album, rng):
                if question.kind == kind:
                    return Sample(album, question)
        message = "the stream of albums ended; it is expected to be endless"
        raise ValueError(message)


class DetectionLessons(SceneLessons):
    """PaliGemma: shapes of one or two cells' width anywhere on a grid of 4 x 4 cells.

    A cell is a patch, so that only five values of a location occur: quarters of the side. Every
    patch has to tell what covers it, in which colour, from where to where, and how many shapes
    there are.
    """

    kinds = ("shape", "colour", "count", "presence", "detect")
    grid = 4
    layout = Layout(
        cell=28, grids=((4, 4),), spans=(1, 2), most_shapes=4, has_twins=True, fills_box=True
    )
    label_sizes = (1 + len(SHAPES), 1 + len(INKS), 5, 5, 5, 5, 5)

    def labels(self, example: Album) -> Tensor:
        """Returns int64 [16, 7]."""
        (scene,) = example.scenes
        table = torch.zeros((self.grid, self.grid, 7), dtype=torch.int64)
        for shape in scene.shapes:
            bottom, right = shape.row + shape.span, shape.column + shape.span
            table[shape.row : bottom, shape.column : right, :6] = torch.tensor(
                [*_look(shape), 1 + shape.row, 1 + shape.column, bottom, right]
            )
        table[..., 6] = len(scene.shapes)
        return table.flatten(0, 1)

    def ask(self, example: Album, rng: random.Random) -> list[Question]:
        """Lists questions; only a shape without a twin is asked for its colour."""
        (scene,) = example.scenes
        names = [shape.name for shape in scene.shapes]
        questions = _ask_about_one(scene, rng)
        questions += [
            Question("detect", f"detect {name}", self.boxes(scene, name)) for name in set(names)
        ]
        absent = [name for name in SHAPES if name not in names]
        questions.append(pose("presence", IS_THERE, "no", rng, thing=rng.choice(absent)))
        if names:
            questions.append(pose("presence", IS_THERE, "yes", rng, thing=rng.choice(names)))
        questions.sort(key=lambda question: question.text)  # a set has no order of its own
        rng.shuffle(questions)
        return questions

    def boxes(self, scene: Scene, name: str) -> str:
        """Spells the boxes of all shapes of one name, in reading order, as PaliGemma does."""
        return " ; ".join(
            f"{self._box(shape)} {name}" for shape in scene.shapes if shape.name == name
        )

    def corpus(self) -> list[str]:
        """Lists text with every word; the location tokens are no text."""
        return [*_corpus(), "yes", "no", *(f"detect {name} ; {name}" for name in SHAPES)] + [
            text.format(thing=name) for text in IS_THERE for name in SHAPES
        ]

    def _box(self, shape: Shape) -> str:
        """Spells y_min, x_min, y_max, x_max out of 1024; the picture's far edge is 1023."""
        edges = (shape.row, shape.column, shape.row + shape.span, shape.column + shape.span)
        return "".join(f"<loc{min(1023, round(edge * 1024 / self.grid)):04d}>" for edge in edges)


def _look(shape: Shape) -> tuple[int, int]:
    """Returns the label of a shape's name and that of its colour; 0 is for no shape."""
    return 1 + SHAPES.index(shape.name), 1 + INKS.index(shape.colour)


def _ask_about_one(scene: Scene, rng: random.Random) -> list[Question]:
    """Asks for the number of shapes, and for each one's name and colour."""
    names = [shape.name for shape in scene.shapes]
    questions = [pose("count", HOW_MANY, NUMBERS[len(names)], rng)]
    for shape in scene.shapes:
        questions.append(pose("shape", SHAPE_OF_COLOUR, shape.name, rng, colour=shape.colour))
        if names.count(shape.name) == 1:
            questions.append(pose("colour", COLOUR_OF, shape.colour, rng, thing=shape.name))
    return questions


def _corpus() -> list[str]:
    """Lists the questions of `_ask_about_one` and their answers."""
    questions = [text.format(colour=colour) for text in SHAPE_OF_COLOUR for colour in COLOURS]
    questions += [text.format(thing=name) for text in COLOUR_OF for name in SHAPES]
    return [*questions, *HOW_MANY, *SHAPES, *COLOURS, *NUMBERS]


class GridLessons(SceneLessons):
    """Fuyu: one shape at most in a cell; wide, tall and square grids; a cell is a patch.

    Every patch has to tell its shape, its colour and its row. Its column it cannot know in the
    first row: nothing stands in front of the image from which to count.
    """

    kinds = ("shape", "colour", "count", "row", "size")
    layout = Layout(
        cell=30,
        grids=(
            (1, 4), (4, 1), (1, 5), (5, 1), (2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3),
        ),
    )  # fmt: skip
    label_sizes = (1 + len(SHAPES), 1 + len(INKS), 5)

    def labels(self, example: Album) -> Tensor:
        """Returns int64 [rows * columns, 3]."""
        (scene,) = example.scenes
        table = torch.zeros((scene.rows, scene.columns, 3), dtype=torch.int64)
        table[..., 2] = torch.arange(scene.rows)[:, None]
        for shape in scene.shapes:
            table[shape.row, shape.column, :2] = torch.tensor(_look(shape))
        return table.flatten(0, 1)

    def ask(self, example: Album, rng: random.Random) -> list[Question]:
        """Lists questions in random order; only drawings of several rows are asked for a row."""
        (scene,) = example.scenes
        questions = _ask_about_one(scene, rng)
        if scene.rows > 1:
            questions += [
                pose("row", IN_WHICH_ROW, NUMBERS[shape.row + 1], rng, thing=shape.name)
                for shape in scene.shapes
            ]
        for line, count in (("rows", scene.rows), ("columns", scene.columns)):
            questions.append(pose("size", HOW_LARGE, NUMBERS[count], rng, line=line))
        rng.shuffle(questions)
        return questions

    def corpus(self) -> list[str]:
        """Lists text with every word."""
        questions = [text.format(thing=name) for text in IN_WHICH_ROW for name in SHAPES]
        questions += [text.format(line=line) for text in HOW_LARGE for line in ("rows", "columns")]
        return [*_corpus(), *questions]


class ComparingLessons(SceneLessons):
    """Idefics2: one drawing or two, square, wide and tall; questions that compare the two.

    Each patch and each of the resampler's nine latents has to tell its place and the content and
    colour there, and the number of shapes. Two rows are the top and bottom ones of three, so that
    every place has a latent of its own in every format.
    """

    kinds = ("shape", "colour", "position", "count", "ordinal", "more", "which", "same")
    layout = Layout(cell=32, grids=((2, 2), (2, 3), (3, 2)))
    label_sizes = (2 + len(SHAPES), 1 + len(INKS), 5, 9)
    patches = 2  # along a cell's side

    def labels(self, example: Album) -> Tensor:
        """Returns int64 [num_patches + 9 of all scenes, 4].

        Content 0 is no such place, 1 is an empty one.
        """
        return torch.cat([self._scene_labels(scene) for scene in example.scenes])

    def ask(self, example: Album, rng: random.Random) -> list[Question]:
        """Lists questions about the one drawing, or about the two; the hard ones come first."""
        if len(example.scenes) == 1:
            questions = self._ask_about_places(example.scenes[0], rng)
        else:
            first, second = example.scenes
            questions = self._compare(first, second, rng)
        rng.shuffle(questions)
        questions.sort(key=lambda question: question.kind not in HARD)
        return questions

    def corpus(self) -> list[str]:
        """Lists text with every word."""
        questions = [text.format(thing=name) for text in WHERE_IS for name in SHAPES]
        questions += [text.format(thing=name) for text in (*WHICH, *SAME) for name in SHAPES]
        questions += [text.format(thing=name, which=w) for text in ORDINAL for name in SHAPES
                      for w in ORDINALS]  # fmt: skip
        places = [f"{row} {column}" for row in ROWS for column in COLUMNS]
        answers = ["the first", "the second", "both", "neither", "yes", "no"]
        return [*_corpus(), *questions, *places, *MORE, *answers]

    def _albums(self, seed: int, *, held_out: bool) -> Iterator[Album]:
        """Makes every second album a pair; half of the pairs share a shape with its colour."""
        rng = random.Random(seed)
        stream = scenes(self.layout, seed, held_out=held_out)
        for scene in stream:
            if rng.random() < 0.5:
                yield Album((scene,))
                continue
            other = next(stream)
            looks = {_look(shape) for shape in scene.shapes}
            if looks and rng.random() < 0.5:
                while not looks & {_look(shape) for shape in other.shapes}:
                    other = next(stream)
            yield Album((scene, other))

    def _scene_labels(self, scene: Scene) -> Tensor:
        slots = torch.zeros((3, 3, 4), dtype=torch.int64)
        rows, columns = torch.tensor(SLOTS[scene.rows]), torch.tensor(SLOTS[scene.columns])
        slots[rows[:, None], columns, 0] = 1
        for shape in scene.shapes:
            name, colour = _look(shape)
            slots[rows[shape.row], columns[shape.column], :2] = torch.tensor([1 + name, colour])
        slots[..., 2] = len(scene.shapes)
        slots[..., 3] = torch.arange(9).reshape(3, 3)
        cells = slots[rows[:, None], columns]
        patches = cells.repeat_interleave(self.patches, 0).repeat_interleave(self.patches, 1)
        return torch.cat([patches.flatten(0, 1), slots.flatten(0, 1)])

    def _ask_about_places(self, scene: Scene, rng: random.Random) -> list[Question]:
        questions = _ask_about_one(scene, rng)
        for shape in scene.shapes:
            row, column = SLOTS[scene.rows][shape.row], SLOTS[scene.columns][shape.column]
            place = f"{ROWS[row]} {COLUMNS[column]}"
            questions.append(pose("position", WHERE_IS, place, rng, thing=shape.name))
        return questions

    def _compare(self, first: Scene, second: Scene, rng: random.Random) -> list[Question]:
        more = _which(
            len(first.shapes) > len(second.shapes), len(first.shapes) < len(second.shapes)
        )
        questions = [pose("more", MORE, "both" if more == "neither" else more, rng)]
        inks = [{shape.name: shape.colour for shape in scene.shapes} for scene in (first, second)]
        for name in SHAPES:
            answer = _which(name in inks[0], name in inks[1])
            if answer != "neither" or rng.random() < 0.3:
                questions.append(pose("which", WHICH, answer, rng, thing=name))
            if answer == "both":
                is_same = inks[0][name] == inks[1][name]
                questions.append(pose("same", SAME, "yes" if is_same else "no", rng, thing=name))
        for ordinal, named in zip(ORDINALS, inks, strict=True):
            questions += [
                pose("ordinal", ORDINAL, colour, rng, thing=name, which=ordinal)
                for name, colour in named.items()
            ]
        return questions


def _which(in_first: bool, in_second: bool) -> str:
    if in_first and in_second:
        return "both"
    return "the first" if in_first else "the second" if in_second else "neither"
