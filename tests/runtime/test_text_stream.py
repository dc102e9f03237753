from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vlmport.runtime.text_stream import TextStream

TEXTS = [
    "Ünïcode 🙂👩‍👩‍👧 中文字 é",
    "a 🙂",
    "plain words only",
    " leading and  double  spaces ",
    "🙂",
]


@pytest.fixture(scope="module", params=["byte-fallback", "byte-level"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "byte-fallback":
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        make_tokenizer(folder)
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["plain words only, words and spaces"], trainer)
    return made


def pieces(tokenizer: Tokenizer, token_ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stops)
    return [*(stream.push(token_id) for token_id in token_ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text_and_no_character_is_torn(
    tokenizer: Tokenizer, text: str
) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    found = pieces(tokenizer, token_ids)
    assert "".join(found) == tokenizer.decode(token_ids) == text
    assert not any("\ufffd" in piece for piece in found)
    assert sum(bool(piece) for piece in found) >= min(2, len(text)) or len(text) == 1


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_streams_whole(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    stream = TextStream(tokenizer, ())
    found = "".join([*(stream.push(token_id) for token_id in token_ids), stream.finish()])
    assert found == stream.text() == tokenizer.decode(token_ids)


@settings(max_examples=60, deadline=None)
@given(token_ids=st.lists(st.integers(0, 299), max_size=30))
def test_any_tokens_stream_without_error(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    stream = TextStream(tokenizer, ())
    found = "".join([*(stream.push(token_id) for token_id in token_ids), stream.finish()])
    assert found == stream.text() == tokenizer.decode(token_ids)


def byte_tokens(tokenizer: Tokenizer, content: bytes) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    if "<0x00>" not in vocabulary:
        pytest.skip("a byte-level vocabulary has no byte tokens")
    return [vocabulary[f"<0x{byte:02X}>"] for byte in content]


def test_bytes_that_spoil_a_character_before_them_spoil_the_stream(tokenizer: Tokenizer) -> None:
    token_ids = byte_tokens(tokenizer, b"\xc3\xa9\xff") + tokenizer.encode("a").ids
    found = pieces(tokenizer, token_ids)
    assert "".join(found) == tokenizer.decode(token_ids)
    assert found[:3] == ["", "", ""]


def test_stop_string_of_bytes_needs_no_further_token(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("\n",))
    text = tokenizer.encode("plain", add_special_tokens=False).ids
    found = "".join(stream.push(i) for i in [*text, *byte_tokens(tokenizer, b"\n")])
    assert stream.stopped
    assert found == stream.text() == "plain"


def test_special_token_between_words_leaves_their_space(tokenizer: Tokenizer) -> None:
    special = tokenizer.get_vocab()["<s>"]
    words = tokenizer.encode("plain words", add_special_tokens=False).ids
    token_ids = [token for word in words for token in (word, special)]
    found = pieces(tokenizer, token_ids)
    assert "".join(found) == tokenizer.decode(token_ids) == "plain words"


def test_incomplete_character_at_the_end_becomes_a_replacement(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a 🙂", add_special_tokens=False).ids[:-1]
    found = pieces(tokenizer, token_ids)
    assert "\ufffd" in found[-1]
    assert "".join(found) == tokenizer.decode(token_ids)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("words",), "plain "),
        (("rds on",), "plain wo"),
        (("only", "words"), "plain "),
        (("nothing",), "plain words only"),
        (("only!",), "plain words only"),
        (("p",), ""),
    ],
)
def test_stop_string_is_never_shown(
    tokenizer: Tokenizer, stops: tuple[str, ...], expected: str
) -> None:
    token_ids = tokenizer.encode("plain words only", add_special_tokens=False).ids
    stream = TextStream(tokenizer, stops)
    found = "".join([*(stream.push(token_id) for token_id in token_ids), stream.finish()])
    assert found == stream.text() == expected
    assert stream.stopped == (expected != "plain words only")
    assert not stream.stopped or stream.push(token_ids[0]) == ""
