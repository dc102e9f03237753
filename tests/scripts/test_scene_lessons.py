"""Each answer is found again from the pixels, the question's words and nothing else."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from support.scenes import box_of, inks_in
from tiny.family import Curriculum
from tiny.questions import Question
from tiny.scene_lessons import ComparingLessons, DetectionLessons, GridLessons
from tiny.scenes import Album, Scene

NUMBERS = ["zero", "one", "two", "three", "four", "five"]
LESSONS: list[Curriculum[Album]] = [DetectionLessons(), ComparingLessons(), GridLessons()]
EVERY = pytest.mark.parametrize("lessons", LESSONS, ids=lambda lessons: type(lessons).__name__)


def asked(lessons: Curriculum[Album], kind: str, albums: int = 60) -> list[tuple[Album, Question]]:
    rng = random.Random(9)
    pairs = [
        (album, question)
        for album in itertools.islice(lessons.examples(7), albums)
        for question in lessons.ask(album, rng)
        if question.kind == kind
    ]
    assert len(pairs) >= 20
    return pairs


def colour_of(scene: Scene, name: str) -> str:
    (colour,) = [shape.colour for shape in scene.shapes if shape.name == name]
    assert colour in inks_in(scene)
    return colour


def named_in(text: str) -> str:
    (name,) = re.findall(r"circle|square|triangle|cross|star", text)
    return str(name)


@EVERY
def test_held_out_questions_are_as_many_of_each_kind(lessons: Curriculum[Album]) -> None:
    kinds = [sample.question.kind for sample in lessons.heldout(120, 3)]
    assert {kind: kinds.count(kind) for kind in lessons.kinds} == dict.fromkeys(
        lessons.kinds, 120 // len(lessons.kinds)
    )


@EVERY
def test_counts_are_those_of_the_colours_in_the_picture(lessons: Curriculum[Album]) -> None:
    for album, question in asked(lessons, "count"):
        (scene,) = album.scenes
        assert question.answer == NUMBERS[len(inks_in(scene))]


@EVERY
def test_colours_and_shapes_belong_together(lessons: Curriculum[Album]) -> None:
    for album, question in asked(lessons, "colour"):
        assert question.answer == colour_of(album.scenes[0], named_in(question.text))
    for album, question in asked(lessons, "shape"):
        (colour,) = [ink for ink in inks_in(album.scenes[0]) if ink in question.text.split("?")[0]]
        assert name_of(album.scenes[0], colour) == question.answer


def name_of(scene: Scene, colour: str) -> str:
    (name,) = [shape.name for shape in scene.shapes if shape.colour == colour]
    return name


@EVERY
def test_labels_say_how_many_shapes_there_are_where(lessons: Curriculum[Album]) -> None:
    for album in itertools.islice(lessons.examples(7), 50):
        labels = lessons.labels(album)
        assert labels.shape[1] == len(lessons.label_sizes)
        assert (labels >= 0).all()
        assert (labels.max(0).values < labels.new_tensor(lessons.label_sizes)).all()


def test_boxes_enclose_the_pixels_of_every_shape_of_the_name() -> None:
    lessons = DetectionLessons()
    boxes = 0
    for album, question in asked(lessons, "detect"):
        (scene,) = album.scenes
        side = scene.pixels.shape[0]
        name = question.text.removeprefix("detect ")
        parts = question.answer.split(" ; ")
        twins = [shape for shape in scene.shapes if shape.name == name]
        assert len(parts) == len(twins)
        for part, shape in zip(parts, twins, strict=True):
            found = re.fullmatch(
                rf"<loc(\d{{4}})><loc(\d{{4}})><loc(\d{{4}})><loc(\d{{4}})> {name}", part
            )
            assert found is not None
            edges = [int(value) * side / 1024 for value in found.groups()]
            for edge, seen in zip(edges, box_of(scene, shape.colour), strict=True):
                # A star does not reach the bottom and the sides of its box.
                assert abs(edge - seen) <= (0.06 * side if name == "star" else 2)
            boxes += 1
    assert boxes > len(asked(lessons, "detect"))


def test_presence_is_that_of_the_picture() -> None:
    answers = set()
    for album, question in asked(DetectionLessons(), "presence"):
        is_there = any(shape.name == named_in(question.text) for shape in album.scenes[0].shapes)
        assert question.answer == ("yes" if is_there else "no")
        answers.add(question.answer)
    assert answers == {"yes", "no"}


def test_rows_of_a_grid_are_counted_from_one() -> None:
    cell = GridLessons.layout.cell
    for album, question in asked(GridLessons(), "row"):
        (scene,) = album.scenes
        top, _, _, _ = box_of(scene, colour_of(scene, named_in(question.text)))
        assert scene.rows > 1
        assert question.answer == NUMBERS[top // cell + 1]


def test_size_is_that_of_the_picture() -> None:
    cell = GridLessons.layout.cell
    for album, question in asked(GridLessons(), "size"):
        height, width = album.scenes[0].pixels.shape[:2]
        side = height if "rows" in question.text else width
        assert question.answer == NUMBERS[side // cell]


def test_places_of_a_picture_are_thirds_or_halves() -> None:
    for album, question in asked(ComparingLessons(), "position"):
        (scene,) = album.scenes
        top, left, bottom, right = box_of(scene, colour_of(scene, named_in(question.text)))
        height, width = scene.pixels.shape[:2]
        names = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}[scene.rows]
        row = names[(top + bottom) // 2 * scene.rows // height]
        names = {2: ("left", "right"), 3: ("left", "middle", "right")}[scene.columns]
        assert question.answer == f"{row} {names[(left + right) // 2 * scene.columns // width]}"


def test_comparisons_are_those_of_the_two_pictures() -> None:
    lessons = ComparingLessons()
    for album, question in asked(lessons, "more"):
        first, second = (len(inks_in(scene)) for scene in album.scenes)
        expected = "the first" if first > second else "the second" if second > first else "both"
        assert question.answer == expected
    for album, question in asked(lessons, "which"):
        has = [any(s.name == named_in(question.text) for s in x.shapes) for x in album.scenes]
        words = {(True, True): "both", (True, False): "the first", (False, True): "the second"}
        assert question.answer == words.get((has[0], has[1]), "neither")
    answers = []
    for album, question in asked(lessons, "same"):
        colours = {colour_of(scene, named_in(question.text)) for scene in album.scenes}
        assert question.answer == ("yes" if len(colours) == 1 else "no")
        answers.append(question.answer)
    assert 0.25 < answers.count("yes") / len(answers) < 0.75
    for album, question in asked(lessons, "ordinal"):
        scene = album.scenes["second" in question.text]
        assert question.answer == colour_of(scene, named_in(question.text))
