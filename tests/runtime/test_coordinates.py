"""Boxes and points are scaled as transformers scales them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.fuyu import processing_fuyu

from vlmport.contract import CoordinateTokens
from vlmport.errors import InputError
from vlmport.runtime.coordinates import Location, answer_locations, answer_scale, split_locations

TOKENS = CoordinateTokens("<0x00>", "<0x01>", "<0x02>", "<0x03>", "<0x04>")
MOST = (1080, 1920)


class AnswerTokenizer:
    """What post_process_box_coordinates asks of a tokenizer, with a word for each token."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        if tokens not in self.words:
            self.words.append(tokens)
        return self.words.index(tokens)

    def convert_ids_to_tokens(self, ids: Any) -> list[str]:
        return [self.words[int(token)] for token in ids]

    def tokenize(self, text: str) -> list[str]:
        return ["▁", text.strip()]


def transformers_answer(names: list[str], size: tuple[int, int]) -> list[str]:
    tokenizer = AnswerTokenizer()
    # In a whole sequence an image comes first, and a location at place 0 would not be found.
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(["|SPEAKER|", *names]))
    processor: Any = type("Processor", (), {})()
    processor.tokenizer = tokenizer
    processor.image_processor = type("Sizes", (), {"size": {"height": 1080, "width": 1920}})()
    found = processing_fuyu.FuyuProcessor.post_process_box_coordinates(
        processor, [ids], torch.tensor([size])
    )
    return tokenizer.convert_ids_to_tokens(found[0])[1:]


def our_answer(names: list[str], size: tuple[int, int]) -> list[str]:
    locations, faults = answer_locations(names, TOKENS, answer_scale(size, MOST))
    assert not faults
    result, rest = [], iter(locations)
    inside = False
    for name in names:
        if name in (TOKENS.box_open, TOKENS.point_open):
            result.append(next(rest).text())
            inside = True
        elif name in (TOKENS.box_close, TOKENS.point_close):
            inside = False
        elif not inside:
            result.append(name)
    return result


def box(*numbers: int) -> list[str]:
    return ["<0x00>", *map(str, numbers), "<0x01>"]


def point(*numbers: int) -> list[str]:
    return ["<0x02>", *map(str, numbers), "<0x03>"]


@settings(deadline=None, max_examples=300)
@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.lists(st.integers(0, 999), min_size=6, max_size=6),
)
def test_answers_are_scaled_as_by_transformers(size: tuple[int, int], numbers: list[int]) -> None:
    names = ["a", *box(*numbers[:4]), "and", *point(*numbers[4:]), "b"]
    assert our_answer(names, size) == transformers_answer(names, size)


@pytest.mark.parametrize("size", [(1080, 1920), (2000, 3000), (1081, 10), (7, 1921), (3001, 77)])
def test_every_coordinate_is_scaled_as_by_transformers(size: tuple[int, int]) -> None:
    numbers = list(range(0, 1000, 3))
    names = [name for number in numbers for name in point(number, number + 1)]
    assert our_answer(names, size) == transformers_answer(names, size)


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (
            ["<0x00>", "1", "2", "3", "<0x01>"],
            "found '<0x00> 1 2 3 <0x01>'; expected 4 coordinates",
        ),
        (box(1, 2, 3, 4)[:-1], "expected 4 coordinates between <0x00> and <0x01>"),
        (["<0x02>", "1", "cat", "<0x03>"], "expected 2 coordinates between <0x02> and <0x03>"),
        (["<0x02>", "1", "nan", "<0x03>"], "expected 2 coordinates"),
        (["<0x00>", "1", "2", "3", "4", "<0x03>"], "expected 4 coordinates"),
        (["cat", "<0x01>"], "answer token 1: found '<0x01>' that closes nothing"),
    ],
)
def test_malformed_locations_are_told(names: list[str], fault: str) -> None:
    locations, faults = answer_locations([*point(1, 2), *names], TOKENS, np.float32(1))
    assert locations == (Location("point", (2, 4)),)
    assert any(fault.replace("token 1:", "token 5:") in line for line in faults), faults


def transformers_parts(text: str, scale: float) -> list[Any]:
    tagged = processing_fuyu._replace_string_repr_with_token_tags(text)
    parts: list[Any] = []
    for part, is_location in processing_fuyu._segment_prompt_into_text_token_conversions(tagged):
        if not is_location:
            parts.append(part)
            continue
        numbers: Any = [float(number.strip()) for number in part.split(",")]
        if len(numbers) == 2:
            values = processing_fuyu.scale_point_to_transformed_image(*numbers, scale)
        else:
            values = processing_fuyu.scale_bbox_to_transformed_image(*numbers, scale)
        parts.append((len(numbers), tuple(int(value) for value in values)))
        joined = "".join(map(str, parts[-1][1]))
        assert joined in processing_fuyu.transform_within_tags(part, scale)
    return parts


def our_parts(text: str, scale: float) -> list[Any]:
    parts = split_locations(text, TOKENS, scale)
    sizes = {"point": 2, "box": 4}
    return [p if isinstance(p, str) else (sizes[p.kind], p.values) for p in parts]


@pytest.mark.parametrize(
    "text",
    [
        "plain text",
        "<box>10, 20, 30, 41</box>",
        "read <box>388, 428, 404, 488</box> and <point>12, 7</point> now",
        "two <box>1,2,3,4</box><box>5, 6, 7, 8</box>",
        "open <box>1, 2, 3, 4",
        "stray </box> here </point>",
        "<box>1, 2</box> a box of two is a point, <point>1, 2, 3, 4</point> the other way round",
        "tokens <0x00>1, 2, 3, 4<0x01> and <0x02>9, 9<0x03>",
        "fractions <point>10.5, 1e2</point> and <point> -3 , +4 </point>",
        "",
    ],
)
@pytest.mark.parametrize("scale", [1.0, float(np.float32(0.54)), float(np.float32(1 / 3))])
def test_prompts_are_cut_as_by_transformers(text: str, scale: float) -> None:
    assert our_parts(text, scale) == transformers_parts(text, scale)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.integers(0, 6000), min_size=4, max_size=4),
    st.floats(2**-6, 1, width=32),
)
def test_prompt_boxes_are_scaled_as_by_transformers(numbers: list[int], scale: float) -> None:
    text = f"a <box>{', '.join(map(str, numbers))}</box> b"
    assert our_parts(text, scale) == transformers_parts(text, scale)


@pytest.mark.parametrize(
    "inside", ["1, 2, 3", "one, two", "1 2", "nan, 1", "inf, 1", "1e300, 2", ",", "1, 2, 3, 4, 5"]
)
def test_a_malformed_location_in_a_prompt_is_told(inside: str) -> None:
    with pytest.raises(InputError, match="found a location"):
        split_locations(f"<box>{inside}</box>", TOKENS, 1.0)
