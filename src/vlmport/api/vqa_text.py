"""Answers brought into the form that VQA accuracy compares.

Source: visualqa.org/evaluation.html: all lower case; no periods but decimal points; number words as
digits; no articles; apostrophes put back into contractions; all other punctuation but apostrophes
and colons becomes a space.
"""

from __future__ import annotations

import re
from types import MappingProxyType

__all__ = ["vqa_normalized"]

_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = MappingProxyType(
    {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}
)
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"(?<=\d),(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")  # also the one behind a number, which ends a sentence
# Of the published table. Those that are words of their own without the apostrophe ("well", "were",
# "ill", "its") are not in it.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've
"""


def _without_some(word: str) -> set[str]:
    """The word without all of its apostrophes, and without each one of them."""
    places = [index for index, letter in enumerate(word) if letter == "'"]
    return {word.replace("'", ""), *(word[:place] + word[place + 1 :] for place in places)}


_FULL_FORMS = MappingProxyType(
    {written: word for word in _CONTRACTIONS.split() for written in _without_some(word)}
)


def vqa_normalized(answer: str) -> str:
    """One answer, normalized; applied to the model's answer and to the references alike.

    The published script also takes apostrophes and colons for punctuation, against its own
    description, leaves out "-", "!" and braces, and brings references, being released in normalized
    form, only in part into that form; here the description is followed, on both sides.
    """
    text = " ".join(answer.lower().split())
    text = _PERIOD.sub("", _punctuated(text))
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_FULL_FORMS.get(word, word) for word in words if word not in _ARTICLES)


def _punctuated(text: str) -> str:
    """Takes marks out: one that touches a space anywhere vanishes, any other becomes a space.

    In a text with a comma between digits ("1,000") all of them vanish, as in the published script.
    """
    has_large_number = _DIGIT_COMMA.search(text) is not None
    cleared = text
    for mark in _MARKS:
        vanishes = has_large_number or f"{mark} " in text or f" {mark}" in text
        cleared = cleared.replace(mark, "" if vanishes else " ")
    return cleared
