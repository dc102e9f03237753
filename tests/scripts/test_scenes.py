from __future__ import annotations

import itertools

import pytest
from support.scenes import box_of, some_scenes
from tiny.scene_lessons import ComparingLessons, DetectionLessons, GridLessons
from tiny.scenes import Layout

LAYOUTS = pytest.mark.parametrize(
    "layout",
    [DetectionLessons.layout, ComparingLessons.layout, GridLessons.layout],
    ids=["detection", "comparing", "grid"],
)


@LAYOUTS
def test_held_out_drawings_are_never_training_drawings(layout: Layout) -> None:
    taught = {scene.pixels.tobytes() for scene in some_scenes(layout, 800, held_out=False)}
    kept = {scene.pixels.tobytes() for scene in some_scenes(layout, 100, held_out=True)}
    assert len(taught) > 700
    assert len(kept) > 90
    assert taught.isdisjoint(kept)


@LAYOUTS
def test_equal_seeds_give_equal_drawings(layout: Layout) -> None:
    first, second = (some_scenes(layout, 20, held_out=False) for _ in range(2))
    other = some_scenes(layout, 20, held_out=False, seed=6)
    assert [s.pixels.tobytes() for s in first] == [s.pixels.tobytes() for s in second]
    assert [s.pixels.tobytes() for s in first] != [s.pixels.tobytes() for s in other]


@LAYOUTS
def test_drawings_fit_their_layout(layout: Layout) -> None:
    drawn = some_scenes(layout, 200, held_out=False)
    assert {(scene.rows, scene.columns) for scene in drawn} == set(layout.grids)
    for scene in drawn:
        assert scene.pixels.shape == (scene.rows * layout.cell, scene.columns * layout.cell, 3)
        assert len({shape.colour for shape in scene.shapes}) == len(scene.shapes)
        for first, second in itertools.combinations(scene.shapes, 2):
            assert not first.overlaps(second)
        names = [shape.name for shape in scene.shapes]
        assert layout.has_twins or len(set(names)) == len(names)
    assert layout.has_twins == any(
        len({shape.name for shape in scene.shapes}) < len(scene.shapes) for scene in drawn
    )


@LAYOUTS
def test_shapes_are_painted_inside_their_boxes(layout: Layout) -> None:
    for scene in some_scenes(layout, 60, held_out=False):
        for shape in scene.shapes:
            top, left, bottom, right = box_of(scene, shape.colour)
            assert top >= shape.row * layout.cell
            assert left >= shape.column * layout.cell
            assert bottom <= (shape.row + shape.span) * layout.cell
            assert right <= (shape.column + shape.span) * layout.cell
