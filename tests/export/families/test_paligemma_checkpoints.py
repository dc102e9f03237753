"""Which PaliGemma checkpoints are read, and what is said of those that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paligemma_checkpoints import VOCAB, PaliGemmaRecipe, make_paligemma

from vlmport.contract import AttentionForm, LocationTokenAnswers
from vlmport.errors import CheckpointError, InputError
from vlmport.export.family import plan_checkpoint
from vlmport.runtime.messages import parse_messages
from vlmport.runtime.preprocessing.prepared import ImageLayout
from vlmport.runtime.prompt import PromptEncoder

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.export.family import ExportPlan

RECIPE = PaliGemmaRecipe(layers=1, tower_layers=1)
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_paligemma(tmp_path / "checkpoint", RECIPE)


def planned(path: Path) -> ExportPlan:
    return plan_checkpoint(path)[1]


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    for name, value in changes.items():
        section, _, key = name.partition("__")
        target = content[section] if key else content
        target[key or name] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("language_model", ["gemma", "gemma2"])
@pytest.mark.parametrize("layout", ["bin", "nested", "saved"])
def test_every_layout_holds_the_same_weights(
    layout: str, language_model: str, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, language_model=language_model)
    hub = planned(make_paligemma(tmp_path / "hub", recipe)).store
    other = planned(make_paligemma(tmp_path / layout, replace(recipe, layout=layout))).store
    assert hub.entries.keys() == other.entries.keys()
    for name in hub.entries:
        np.testing.assert_array_equal(hub.read(name), other.read(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoint_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    store = planned(make_paligemma(tmp_path / "half", replace(RECIPE, dtype=dtype))).store
    assert store.tensor("connector.weight").dtype.itemsize == 2


def test_head_reads_the_embedding_unless_it_is_untied(checkpoint: Path, tmp_path: Path) -> None:
    tied = planned(checkpoint).store.entries
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    assert tied[head] == tied[embedding]
    untied = planned(make_paligemma(tmp_path / "untied", replace(RECIPE, tied=False))).store
    assert (untied.read(head) != untied.read(embedding)).any()


def test_plan_says_what_the_runtime_needs(checkpoint: Path) -> None:
    plan = planned(checkpoint)
    assert plan.attention == AttentionForm("bidirectional", 1)
    assert plan.answers == LocationTokenAnswers("location_tokens", 1024, 128, 16)
    assert plan.special_tokens.eos_token_ids == (1,)
    assert plan.prompt.image_tokens.count == 16
    assert plan.dimensions.max_length == 8192
    assert plan.variant == "gemma + siglip, 56 px, linear"


def test_missing_keys_of_config_have_the_defaults_of_the_class(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    content = json.loads(path.read_text())
    for name in ("tie_word_embeddings", "hidden_size", "bos_token_id", "eos_token_id"):
        del content[name]
    del content["vision_config"]["vision_use_head"]
    path.write_text(json.dumps(content))
    # SiglipVisionConfig declares a head; the checkpoint has no weights of one, and needs none.
    assert planned(checkpoint).prompt.image_tokens.count == 16


def test_checkpoint_without_processor_files_gets_the_released_ones(checkpoint: Path) -> None:
    expected = planned(checkpoint).image
    (checkpoint / "preprocessor_config.json").unlink()
    assert planned(checkpoint).image == expected


def test_image_token_may_lie_outside_of_the_embedding(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors"):
        state = load_file(path)
        for name in [name for name in state if name.endswith("embed_tokens.weight")]:
            state[name] = state[name][: VOCAB - 1].clone()
        save_file(state, path)
    edit_json(checkpoint / "config.json", text_config__vocab_size=VOCAB - 1)
    assert planned(checkpoint).special_tokens.image_token_id == VOCAB - 1
    edit_json(checkpoint / "config.json", text_config__vocab_size=VOCAB - 2)
    with pytest.raises(CheckpointError, match="weights of the wrong shape"):
        planned(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config__image_size": 70}, r"wrong shape.*position_embedding"),
        ({"text_config__num_hidden_layers": 2}, r"missing weights \(9\)"),
        ({"text_config__head_dim": 8}, "weights of the wrong shape"),
        ({"tie_word_embeddings": False}, r"missing weights \(1\): language_model\.lm_head\.weight"),
        ({"projection_dim": 32}, r"projection_dim 32; expected text_config\.hidden_size, 48"),
        ({"text_config__model_type": "gemma3_text"}, "model_type 'gemma3_text'; did you mean ge"),
        ({"vision_config__model_type": "clip_vision_model"}, "'clip_vision_model'; did you mean"),
        ({"text_config__model_type": "none"}, "transformers refuses it"),
        ({"text_config__hidden_size": "48"}, "transformers refuses it .*hidden_size"),
        ({"image_token_index": 7}, r"'<image>' is token 1552 of the tokenizer; expected 7"),
    ],
)
def test_config_that_does_not_fit_is_a_clear_error(
    changes: dict[str, Any], message: str, checkpoint: Path
) -> None:
    edit_json(checkpoint / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        planned(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": 70, "width": 70}}, r"makes pictures of \(70, 70\), the vision tower"),
        ({"image_seq_length": 25}, "image_seq_length 25; the vision tower makes 16 tokens of 56"),
    ],
)
def test_processor_file_that_contradicts_the_model_is_a_clear_error(
    changes: dict[str, Any], message: str, checkpoint: Path
) -> None:
    edit_json(checkpoint / "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        planned(checkpoint)


def test_extra_weights_are_listed(checkpoint: Path) -> None:
    state = load_file(checkpoint / SHARD)
    state["language_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(3)
    save_file(state, checkpoint / SHARD)
    with pytest.raises(CheckpointError, match=r"has no place for \(1\).*layers\.7\.mlp"):
        planned(checkpoint)


def test_tokenizer_larger_than_the_vocabulary_is_refused(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    stray = {**content["added_tokens"][-1], "id": VOCAB, "content": "<stray>"}
    content["added_tokens"] += [{**stray, "id": VOCAB + i, "content": f"<s{i}>"} for i in range(9)]
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"goes up to token 1561; expected at most 1559"):
        planned(checkpoint)


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}model:{% endif %}\n"
)


def test_own_chat_template_takes_other_turns(tmp_path: Path) -> None:
    plan = planned(make_paligemma(tmp_path / "c", replace(RECIPE, chat_template=TEMPLATE)))
    encoder = PromptEncoder(plan.tokenizer, plan.prompt, plan.special_tokens)
    image, layout = {"type": "image"}, ImageLayout(1, 0, 0)
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [image, {"type": "text", "text": "And this?"}]},
    ]
    text = encoder.encode(parse_messages(chat), [layout, layout]).text
    # The beginning-of-sequence token behind the last image, and a newline at the end.
    assert text == (
        "system: Be brief.\nuser: <image>What is it?\nassistant: A cat.\nuser: <image><bos>And "
        "this?\nmodel:\n"
    )
    with pytest.raises(InputError, match="found no image, expected one or more"):
        encoder.encode(parse_messages(chat[:1]), [])
    [prompt_ids] = [
        plan.reference().greedy(chat, [_grey(), _grey()], 1).prompt_ids,
    ]
    own = encoder.encode(parse_messages(chat), [layout, layout])
    np.testing.assert_array_equal(prompt_ids, np.where(own.image_mask, -1, own.input_ids))


def _grey() -> Any:
    from PIL import Image

    return Image.new("RGB", (20, 30), (90, 90, 90))
