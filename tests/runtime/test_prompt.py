from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from support.checkpoints import make_tokenizer
from tokenizers import Tokenizer
from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

from vlmport.contract import PromptFormat, SpecialTokens
from vlmport.errors import InputError
from vlmport.runtime.prompt import (
    ImagePart,
    Message,
    PromptEncoder,
    TextPart,
    messages_from_prompt,
    parse_messages,
)

if TYPE_CHECKING:
    from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} answer:{% endif %}"
)
IMAGES = 16
CASES = [
    [{"role": "user", "content": "What is in the picture?"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
    [
        {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "image"}]},
        {"role": "assistant", "content": "A red circle."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " more?"}]},
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(made, ("<image>",))
    return made


def encoder(folder: Path, tokenization: Any, template: str = TEMPLATE) -> PromptEncoder:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    image = 3 if tokenization == "whole" else None
    special = SpecialTokens(1, (2,), image, "<s>", "</s>")
    form = PromptFormat(template, "<image>", tokenization, add_special_tokens=True)
    return PromptEncoder(tokenizer, form, special, IMAGES)


@pytest.mark.parametrize("chat", CASES)
def test_whole_prompt_equals_the_processor(folder: Path, chat: list[dict[str, Any]]) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    processor: Any = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer=cast("Any", tokenizer),
        patch_size=14,
        vision_feature_select_strategy="full",
        image_token="<image>",
    )
    messages = parse_messages(chat)
    found = encoder(folder, "whole").encode(messages)
    images = [np.zeros((56, 56, 3), np.uint8)] * found.num_images
    expected = processor(text=found.text, images=images or None)["input_ids"]
    np.testing.assert_array_equal(found.input_ids, np.array(expected).reshape(-1))
    assert found.image_tokens == IMAGES * found.num_images == (found.input_ids == 3).sum()


@pytest.mark.parametrize("chat", CASES)
def test_chunks_are_tokenized_apart_with_one_beginning(
    folder: Path, chat: list[dict[str, Any]]
) -> None:
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    found = encoder(folder, "chunks").encode(parse_messages(chat))
    chunks = [tokenizer(chunk).input_ids for chunk in found.text.split("<image>")]
    expected = chunks[0] + [token for chunk in chunks[1:] for token in chunk[1:]]
    np.testing.assert_array_equal(found.text_ids, expected)
    assert found.image_tokens == IMAGES * (len(chunks) - 1)
    if len(chunks) > 1:
        first = int(np.flatnonzero(found.image_mask)[0])
        assert first == len(chunks[0])


def test_images_come_first_or_where_the_prompt_says() -> None:
    assert messages_from_prompt("What?", 2, "<image>") == (
        Message("user", (ImagePart(), ImagePart(), TextPart("What?"))),
    )
    assert messages_from_prompt("<image> or <image>?", 2, "<image>") == (
        Message("user", (ImagePart(), TextPart(" or "), ImagePart(), TextPart("?"))),
    )
    for count in (1, 3):
        with pytest.raises(InputError, match=f"found 2 places for images .* and {count} images"):
            messages_from_prompt("<image> or <image>?", count, "<image>")


def test_text_cannot_smuggle_a_placeholder_in(folder: Path) -> None:
    chat = parse_messages([{"role": "user", "content": "see <image>"}])
    with pytest.raises(InputError, match="contains '<image>', which stands for an image"):
        encoder(folder, "chunks").encode(chat)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system messages') }}", "no system messages"),
        ("text without places", "placed 0 of 1 images"),
        ("{{ messages[0].content.__class__.__mro__ }}", "chat template refuses them"),
    ],
)
def test_template_that_refuses_says_why(folder: Path, template: str, message: str) -> None:
    chat = parse_messages([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(InputError, match=message):
        encoder(folder, "chunks", template).encode(chat)


def test_damaged_template_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="not a valid template"):
        encoder(folder, "chunks", "{% for %}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "expected a JSON list"),
        ([], "expected a JSON list"),
        (["text"], r"messages\[0\]: expected an object"),
        ([{"role": "boss", "content": "x"}], r"messages\[0\].role: found 'boss'"),
        ([{"role": "user"}], r"messages\[0\].content: expected text or a list"),
        ([{"role": "user", "content": "x", "name": "y"}], "unknown name"),
        ([{"role": "user", "content": [{"type": "video"}]}], r"content\[0\]: expected type"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: expected type"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "unknown url"),
        ([{"role": "user", "content": [{"type": "image", "path": 3}]}], "path of a file"),
    ],
)
def test_wrong_messages_are_refused(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_messages(value)


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(InputError, match=r"messages\[0\].role.*messages\[1\].content"):
        parse_messages([{"role": "x", "content": ""}, {"role": "user", "content": 3}])
