from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmport.api.scoring import (
    anls,
    exact_match,
    pope_reads_yes,
    score,
    vqa_accuracy,
    yes_no_scores,
)
from vlmport.api.vqa_text import vqa_normalized


def test_exact_match_as_is_overlooks_outer_space_alone() -> None:
    assert exact_match(" a red circle\n", ["a red circle"], "none") == 1
    assert exact_match("A red circle", ["a red circle"], "none") == 0
    assert exact_match("a red circle.", ["a red circle"], "none") == 0
    assert exact_match("two", ["2", "two"], "none") == 1


def test_folded_match_overlooks_case_and_punctuation() -> None:
    assert exact_match("A red,  circle!", ["a red circle"], "fold") == 1
    assert exact_match("STRASSE", ["straße"], "fold") == 1
    assert exact_match("a red circle", ["the red circle"], "fold") == 0


@pytest.mark.parametrize(
    ("matches", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_of_ten_people(matches: int, expected: float) -> None:
    # By hand, 2 matches: left out is a match twice (1/3 each), something else 8 times (2/3 each).
    people = ["cat"] * matches + ["dog"] * (10 - matches)
    assert vqa_accuracy("cat", people) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.sampled_from(["cat", "dog", "hen"]), min_size=4, max_size=10))
def test_vqa_accuracy_is_the_mean_over_all_but_one(people: list[str]) -> None:
    subsets = list(itertools.combinations(people, len(people) - 1))
    expected = sum(min(subset.count("cat") / 3, 1) for subset in subsets) / len(subsets)
    assert vqa_accuracy("cat", people) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("written", "normalized"),
    [
        ("The Two Dogs.", "2 dogs"),
        ("An apple, a pear", "apple pear"),
        ("1,000 people", "1000 people"),
        ("3.5", "3.5"),
        ("it costs 3.", "it costs 3"),
        ("dont know", "don't know"),
        ("don't know", "don't know"),
        ("couldntve", "couldn't've"),
        ("the girl's", "girl's"),
        ("10:30", "10:30"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("(none)", "0"),
        ("stop!", "stop"),
        ("well", "well"),
    ],
)
def test_vqa_normalization(written: str, normalized: str) -> None:
    assert vqa_normalized(written) == normalized
    assert vqa_normalized(normalized) == normalized


def test_vqa_references_are_normalized_too() -> None:
    assert vqa_accuracy("Two.", ["2", "two", "Two", "the two", "3"]) == 1


@functools.cache
def edits(one: str, other: str) -> int:
    """The recursive definition of the Levenshtein distance."""
    if not one or not other:
        return len(one) + len(other)
    replaced = edits(one[1:], other[1:]) + (one[0] != other[0])
    return min(edits(one[1:], other) + 1, edits(one, other[1:]) + 1, replaced)


@given(st.text("ab c", max_size=6), st.lists(st.text("ab c", max_size=6), min_size=1, max_size=3))
def test_anls_is_the_definition(answer: str, references: list[str]) -> None:
    best = 0.0
    spaced = " ".join(answer.split())
    for reference in (" ".join(text.split()) for text in references):
        longer = max(len(spaced), len(reference))
        distance = edits(spaced, reference) / longer if longer else 0.0
        best = max(best, 1 - distance if distance < 0.5 else 0.0)
    assert anls(answer, references) == pytest.approx(best, abs=1e-12)


def test_anls_by_hand() -> None:
    assert anls("Coca Cola", ["coca  cola"]) == 1
    assert anls("coca cole", ["coca cola"]) == pytest.approx(1 - 1 / 9)
    assert anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert anls("ab", ["ax"]) == 0  # a distance of exactly half counts nothing
    assert anls("pepsi", ["coca cola", "pepsi"]) == 1


@pytest.mark.parametrize(
    ("answer", "is_yes"),
    [
        ("Yes", True),
        ("yes, there is no doubt. No.", False),
        ("Yes. There is no dog.", True),
        ("No, there isn't.", False),
        ("There is not a dog", False),
        ("NO", False),
        ("There isn't one", True),
        ("another", True),
        ("A dog", True),
        (" no ", False),
    ],
)
def test_pope_reads_the_first_sentence(answer: str, is_yes: bool) -> None:
    assert pope_reads_yes(answer) is is_yes


def test_pope_figures_by_hand() -> None:
    # 3 hits, 1 false alarm, 2 misses, 4 right refusals.
    answers = ["yes"] * 4 + ["no"] * 6
    labels = ["yes", "yes", "yes", "no", "yes", "yes", "no", "no", "no", "no"]
    found = yes_no_scores(answers, labels)
    assert found.accuracy == pytest.approx(7 / 10)
    assert found.precision == pytest.approx(3 / 4)
    assert found.recall == pytest.approx(3 / 5)
    assert found.f1 == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert found.yes_ratio == pytest.approx(0.4)
    singles = [score("pope", a, [b]) for a, b in zip(answers, labels, strict=True)]
    assert sum(singles) == 7


def test_pope_figures_without_a_yes() -> None:
    found = yes_no_scores(["no", "no"], ["no", "no"])
    assert (found.accuracy, found.precision, found.recall, found.f1) == (1, 0, 0, 0)


def test_each_metric_has_its_own_normalization() -> None:
    assert score("exact", "Two", ["two"]) == 0
    assert score("exact", "Two", ["two"], "fold") == 1
    assert score("vqa", "Two", ["2"] * 10) == 1
    assert score("anls", "Two", ["two"]) == 1
