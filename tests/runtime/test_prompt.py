from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from support.checkpoints import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

from vlmport.contract import ImageTokens, PromptFormat, SpecialTokens
from vlmport.errors import InputError
from vlmport.runtime.messages import (
    ImagePart,
    Message,
    TextPart,
    count_images,
    messages_from_prompt,
    parse_messages,
)
from vlmport.runtime.preprocessing.prepared import ImageLayout
from vlmport.runtime.prompt import EncodedPrompt, PromptEncoder

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


def repeated(count: int) -> ImageTokens:
    return ImageTokens("repeat", "<image>", count, "", "", "")


def encoded(own: PromptEncoder, chat: tuple[Message, ...]) -> EncodedPrompt:
    return own.encode(chat, [ImageLayout(1, 0, 0)] * count_images(chat))


def encoder(folder: Path, tokenization: Any, template: str = TEMPLATE) -> PromptEncoder:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    image = 3 if tokenization == "whole" else None
    special = SpecialTokens(1, (2,), image, "<s>", "</s>")
    form = PromptFormat(
        template, "<image>", repeated(IMAGES), tokenization, add_special_tokens=True
    )
    return PromptEncoder(tokenizer, form, special)


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
    found = encoded(encoder(folder, "whole"), messages)
    images = [np.zeros((56, 56, 3), np.uint8)] * found.num_images
    expected = processor(text=found.text, images=images or None)["input_ids"]
    np.testing.assert_array_equal(found.input_ids, np.array(expected).reshape(-1))
    assert found.image_tokens == IMAGES * found.num_images == (found.input_ids == 3).sum()


@pytest.mark.parametrize("chat", CASES)
def test_chunks_are_tokenized_apart_with_one_beginning(
    folder: Path, chat: list[dict[str, Any]]
) -> None:
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    found = encoded(encoder(folder, "chunks"), parse_messages(chat))
    chunks = [tokenizer(chunk).input_ids for chunk in found.text.split("<image>")]
    expected = chunks[0] + [token for chunk in chunks[1:] for token in chunk[1:]]
    np.testing.assert_array_equal(found.text_ids, expected)
    assert found.image_tokens == IMAGES * (len(chunks) - 1)
    if len(chunks) > 1:
        first = int(np.flatnonzero(found.image_mask)[0])
        assert first == len(chunks[0])


def byte_level(add_bos: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["What is in the picture? A red circle."], trainer)
    if add_bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return made


@pytest.mark.parametrize("chat", CASES)
def test_whole_prompt_equals_the_processor_for_bytes(chat: list[dict[str, Any]]) -> None:
    tokenizer = byte_level(add_bos=False)
    processor: Any = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer=cast("Any", PreTrainedTokenizerFast(tokenizer_object=tokenizer)),
        patch_size=14,
        vision_feature_select_strategy="full",
        image_token="<image>",
    )
    special = SpecialTokens(None, (1,), 2, "", "</s>")
    form = PromptFormat(TEMPLATE, "<image>", repeated(IMAGES), "whole", add_special_tokens=True)
    found = encoded(PromptEncoder(tokenizer, form, special), parse_messages(chat))
    images = [np.zeros((56, 56, 3), np.uint8)] * found.num_images
    expected = processor(text=found.text, images=images or None)["input_ids"]
    np.testing.assert_array_equal(found.input_ids, np.array(expected).reshape(-1))


FACTORY = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "USER: {% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] | trim }}"
    "{% endfor %} {% else %}ASSISTANT: {{ message['content'][0]['text'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}ASSISTANT:"
)


def factory_ids(tokenizer: Tokenizer, prompt: str, bos_token_id: int) -> list[int]:
    """TinyLLaVA_Factory's rule (tokenizer_image_token), -200 where an image stands."""
    chunks = [tokenizer.encode(chunk).ids for chunk in prompt.split("<image>")]
    offset = 1 if chunks[0] and chunks[0][0] == bos_token_id else 0
    token_ids = list(chunks[0])
    for chunk in chunks[1:]:
        token_ids += [-200, *chunk[offset:]]
    return token_ids


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize(
    "chat",
    [*CASES, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<s>"}]}]],
)
def test_chunks_equal_those_of_the_factory(chat: list[dict[str, Any]], add_bos: bool) -> None:
    tokenizer = byte_level(add_bos)
    special = SpecialTokens(0, (1,), None, "<s>", "</s>")
    form = PromptFormat(FACTORY, "<image>", repeated(1), "chunks", add_special_tokens=True)
    found = encoded(PromptEncoder(tokenizer, form, special), parse_messages(chat))
    ids = np.where(found.image_mask, -200, found.input_ids)
    np.testing.assert_array_equal(ids, factory_ids(tokenizer, found.text, 0))


def test_chunk_that_begins_with_the_beginning_token_keeps_it_if_none_was_added() -> None:
    special = SpecialTokens(0, (0,), None, "<s>", "<s>")
    form = PromptFormat(
        "a{% for _ in messages %}<image><s>b{% endfor %}", "<image>", repeated(1), "chunks", True
    )
    chat = (Message("user", (ImagePart(),)),)
    tokenizer = byte_level(add_bos=False)
    found = encoded(PromptEncoder(tokenizer, form, special), chat)
    ids = np.where(found.image_mask, -200, found.input_ids)
    np.testing.assert_array_equal(ids, factory_ids(tokenizer, found.text, 0))


def test_one_image_renders_as_the_factory_does(folder: Path) -> None:
    chat = messages_from_prompt(" What? ", 1, "<image>")
    text = encoded(encoder(folder, "chunks", FACTORY), chat).text
    assert text.endswith("questions. USER: <image>\nWhat? ASSISTANT:")
    assert text.startswith("A chat between a curious user")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m['role'] }}{% endgeneration %}\n{% endfor %}",
        "{{ messages[0] | tojson }} {{ messages | tojson(indent=2) }}",
        "{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }} {{ bos_token }}",
        (
            "  {% for m in messages %}\n  {% if m.role == 'user' %}\n x{% break %}\n  {% endif %}\n"
            "  {% endfor %}\n{{ strftime_now('%d %Y %Z') }}|"
        ),
    ],
)
def test_template_renders_as_in_transformers(folder: Path, template: str) -> None:
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "text", "text": "<é> & 'x'"}]}]
    expected = tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert encoded(encoder(folder, "chunks", template), parse_messages(chat)).text == expected


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


@pytest.mark.parametrize("texts", [("see <image>",), ("see <ima", "ge>")])
def test_text_cannot_smuggle_a_placeholder_in(folder: Path, texts: tuple[str, ...]) -> None:
    chat = (Message("user", tuple(TextPart(text) for text in texts)),)
    with pytest.raises(InputError, match="contains '<image>', which stands for an image"):
        encoded(encoder(folder, "chunks"), chat)


def test_half_a_surrogate_pair_is_refused(folder: Path) -> None:
    chat = parse_messages([{"role": "user", "content": "a\ud83d"}])
    with pytest.raises(InputError, match=r"contains '\\ud83d', half of a surrogate pair"):
        encoded(encoder(folder, "chunks"), chat)


def test_placeholder_that_is_no_token_is_reported(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    form = PromptFormat(TEMPLATE, "<image>", repeated(IMAGES), "whole", add_special_tokens=True)
    chat = messages_from_prompt("What?", 1, "<image>")
    for image_token_id in (None, 77):
        special = SpecialTokens(1, (2,), image_token_id, "<s>", "</s>")
        with pytest.raises(InputError, match="made 0 image tokens of 1 images"):
            encoded(PromptEncoder(tokenizer, form, special), chat)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system messages') }}", "no system messages"),
        ("text without places", "placed 0 of 1 images"),
        ("{{ 1 + 'a' }}", "chat template refuses them"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
        ("{% set n = namespace(_x=1) %}", "begins with an underscore"),
        ("{{ messages[0].content.__class__.__mro__ }}", "chat template refuses them"),
    ],
)
def test_template_that_refuses_says_why(folder: Path, template: str, message: str) -> None:
    chat = parse_messages([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(InputError, match=message):
        encoded(encoder(folder, "chunks", template), chat)


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
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            r"unknown url.*file on this machine",
        ),
        ([{"role": "user", "content": [{"type": "image", "path": 3}]}], "path of a file"),
    ],
)
def test_wrong_messages_are_refused(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_messages(value)


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(InputError, match=r"messages\[0\].role.*messages\[1\].content"):
        parse_messages([{"role": "x", "content": ""}, {"role": "user", "content": 3}])
