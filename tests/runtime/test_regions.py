from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paligemma_checkpoints import make_paligemma_tokenizer
from tokenizers import Tokenizer

from vlmport.contract import LocationTokenAnswers
from vlmport.runtime.masks import place_mask, run_lengths, with_masks
from vlmport.runtime.regions import Box, Region, RegionReading, read_regions

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

FORM = LocationTokenAnswers("location_tokens", 1024, 128, 16)
CODES = tuple(range(0, 128, 8))
SEGMENT = "".join(f"<seg{code:03}>" for code in CODES)
# 512 x 256 pixels: a location is half a pixel high and a quarter of one wide.
SIZE = (512, 256)


@pytest.fixture(scope="module", params=[False, True], ids=["ordinary", "special"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """Location tokens as ordinary tokens, and as special ones that decoded text leaves out."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_paligemma_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        if token["content"].startswith(("<loc", "<seg")):
            token["special"] = request.param
    return Tokenizer.from_str(json.dumps(content))


def read(tokenizer: Tokenizer, text: str, size: tuple[int, int] = SIZE) -> RegionReading:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return read_regions(ids, tokenizer, FORM, [size])


def located(*locations: int) -> str:
    return "".join(f"<loc{location:04}>" for location in locations)


def test_detected_boxes_are_pixels_of_the_picture(tokenizer: Tokenizer) -> None:
    answer = f"{located(0, 256, 512, 1023)} cat ; {located(100, 4, 103, 8)} red dog<eos>"
    reading = read(tokenizer, answer)
    assert reading.faults == ()
    assert reading.regions == (
        Region("cat", Box(0.0, 64.0, 256.0, 255.75), ()),
        Region("red dog", Box(50.0, 1.0, 51.5, 2.0), ()),
    )


@pytest.mark.parametrize("between", ["", " "])
def test_segments_have_a_box_and_codes(tokenizer: Tokenizer, between: str) -> None:
    answer = f"{located(1, 2, 3, 4)}{between}{SEGMENT} cat ; {located(5, 6, 7, 8)} dog"
    reading = read(tokenizer, answer)
    assert reading.faults == ()
    assert [(region.label, region.codes) for region in reading.regions] == [
        ("cat", CODES),
        ("dog", ()),
    ]


@pytest.mark.parametrize("answer", ["", "a cat on a mat", "<eos>", " ; ", "loc0001 <loc1> cat"])
def test_answer_without_location_tokens_is_no_fault(tokenizer: Tokenizer, answer: str) -> None:
    assert read(tokenizer, answer) == RegionReading((), ())


def test_label_may_be_empty_and_no_separator_needed(tokenizer: Tokenizer) -> None:
    reading = read(
        tokenizer, f"{located(1, 2, 3, 4)};{located(5, 6, 7, 8)}dog{located(1, 2, 3, 9)}"
    )
    assert [region.label for region in reading.regions] == ["", "dog", ""]
    assert reading.faults == ()


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (f"{located(1, 2, 3)} cat", r"region 1 \('cat'\): found 3 location tokens and 0 segment"),
        (f"{located(9, 8, 7, 6, 5)} cat", "found 5 location tokens and 0 segment tokens"),
        (f"{located(1, 2)} {located(3, 4)} cat", "found 2 location tokens and 0 segment tokens"),
        (f"{SEGMENT} cat", "found 0 location tokens and 16 segment tokens"),
        (f"{located(1, 2, 3, 4)}<seg001> cat", "expected 4 location tokens, then no or 16"),
        (f"{SEGMENT}{located(1, 2, 3, 4)} cat", "4 location tokens and 16 segment tokens, mixed"),
        (f"{located(1, 2, 1, 4)} cat", "found a box from y 1 to 1 and x 2 to 4; expected each"),
        (f"{located(1, 9, 3, 4)} cat", "found a box from y 1 to 3 and x 9 to 4"),
        (f"{located(1, 2, 3, 4)} cat ; dog", "found 'dog' without location tokens; expected 4"),
        (f"a cat {located(1, 2, 3, 4)}", "found 'a cat' without location tokens"),
    ],
)
def test_malformed_location_tokens_are_reported_and_not_guessed(
    tokenizer: Tokenizer, answer: str, fault: str
) -> None:
    good = f"{located(10, 10, 20, 20)} good"
    [region] = read(tokenizer, good).regions
    alone, behind = read(tokenizer, answer), read(tokenizer, f"{good} ; {answer}")
    assert behind.regions == (region, *alone.regions)
    assert len(alone.regions) == answer.count(located(1, 2, 3, 4)) * ("seg" not in answer)
    assert re.search(fault, alone.faults[0])
    assert len(behind.faults) == len(alone.faults)


def test_locations_beyond_the_form_are_reported(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"{located(1, 2, 3, 700)} cat", add_special_tokens=False).ids
    narrow = LocationTokenAnswers("location_tokens", 512, 128, 16)
    reading = read_regions(ids, tokenizer, narrow, [SIZE])
    assert reading.regions == ()
    assert "found loc0700; expected locations below 512" in reading.faults[0]


@pytest.mark.parametrize("count", [0, 2])
def test_locations_need_exactly_one_picture(tokenizer: Tokenizer, count: int) -> None:
    ids = tokenizer.encode(f"{located(1, 2, 3, 4)} cat", add_special_tokens=False).ids
    reading = read_regions(ids, tokenizer, FORM, [SIZE] * count)
    assert reading.regions == ()
    assert f"found locations and {count} pictures; expected one" in reading.faults[0]
    text = tokenizer.encode("a cat", add_special_tokens=False).ids
    assert read_regions(text, tokenizer, FORM, [SIZE] * count) == RegionReading((), ())


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 1600), max_size=40))
def test_any_tokens_give_regions_inside_of_the_picture_or_faults(ids: list[int]) -> None:
    reading = read_regions(ids, SHARED[0], FORM, [SIZE])
    for region in reading.regions:
        assert 0 <= region.box.y_min < region.box.y_max < SIZE[0]
        assert 0 <= region.box.x_min < region.box.x_max < SIZE[1]
        assert len(region.codes) in (0, 16)
    marks = [i for i in ids if (SHARED[0].id_to_token(i) or "").startswith(("<loc", "<seg"))]
    used = sum(4 + len(region.codes) for region in reading.regions)
    assert used == len(marks) or reading.faults


SHARED: list[Tokenizer] = []


@pytest.fixture(scope="module", autouse=True)
def _share(tokenizer: Tokenizer) -> None:
    SHARED[:] = [tokenizer]


def test_mask_is_stretched_over_its_box() -> None:
    mask = np.full((64, 64), -1.0, np.float32)
    mask[:32] = 1.0  # the upper half is inside
    placed = place_mask(mask, Box(10.4, 20.0, 30.0, 59.6), (40, 70))
    expected = np.zeros((40, 70), np.bool_)
    expected[10:20, 20:60] = True
    np.testing.assert_array_equal(placed, expected)


@pytest.mark.parametrize("box", [Box(0, 0, 0.3, 5), Box(2.6, 1, 3.0, 1.2), Box(2, 2, 2.4, 2.4)])
def test_box_without_a_whole_pixel_has_an_empty_mask(box: Box) -> None:
    assert not place_mask(np.ones((64, 64), np.float32), box, (3, 5)).any()


def test_only_regions_with_codes_are_decoded() -> None:
    box = Box(0, 0, 2, 2)
    regions = (Region("a", box, ()), Region("b", box, CODES), Region("c", box, CODES[::-1]))
    asked: list[NDArray[np.int64]] = []

    def decode(codes: NDArray[np.int64]) -> NDArray[np.float32]:
        asked.append(codes)
        return np.stack([np.full((64, 64), sign, np.float32) for sign in (1, -1)])

    first, second, third = with_masks(regions, (4, 4), decode)
    np.testing.assert_array_equal(asked, [[CODES, CODES[::-1]]])
    assert first.mask is None
    assert second.mask is not None
    assert third.mask is not None
    assert (second.mask.sum(), third.mask.sum()) == (4, 0)
    assert with_masks(regions[:1], (4, 4), decode) == regions[:1]
    assert len(asked) == 1


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_restore_the_mask(seed: int) -> None:
    generator = np.random.default_rng(seed)
    shape = tuple(generator.integers(1, 9, 2))
    mask = generator.random(shape) < generator.choice([0.0, 0.3, 0.9, 1.0])
    counts = run_lengths(mask)
    values = np.arange(len(counts)) % 2 == 1
    restored = np.repeat(values, counts).reshape(shape, order="F")
    np.testing.assert_array_equal(restored, mask)
