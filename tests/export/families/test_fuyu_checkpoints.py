"""Fuyu checkpoints that cannot be used are refused with the reason, before anything is traced."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file
from support.fuyu_checkpoints import FuyuRecipe, make_fuyu_checkpoint, make_fuyu_tokenizer

from vlmport.contract import PatchImages
from vlmport.errors import CheckpointError
from vlmport.export.family import load_reference, plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_fuyu_checkpoint(tmp_path / "checkpoint", FuyuRecipe(layers=1))


def edit_json(path: Path, section: str | None = None, **changes: Any) -> None:
    content = json.loads(path.read_text())
    target = content if section is None else content[section]
    target.update(changes)
    path.write_text(json.dumps(content))


def refused(checkpoint: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        plan_checkpoint(checkpoint)


def test_missing_extra_and_misshapen_weights_are_listed_at_once(checkpoint: Path) -> None:
    state = load_file(checkpoint / SECOND)
    state["vision_embed_tokens.weight"] = state["vision_embed_tokens.weight"][:, :-3].contiguous()
    del state["vision_embed_tokens.bias"]
    state["vision_tower.weight"] = state["vision_embed_tokens.weight"].clone()
    save_file(state, checkpoint / SECOND)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    del index["weight_map"]["vision_embed_tokens.bias"]
    index["weight_map"]["vision_tower.weight"] = SECOND
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(checkpoint, r"(?s)missing weights \(1\): connector\.bias.*vision_tower.*wrong shape")


def test_a_config_of_another_size_is_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", "text_config", intermediate_size=161)
    refused(checkpoint, r"config\.json and weights do not fit.*dense_4h_to_h")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_attention_heads": 5}, "hidden_size 96 is no multiple of num_attention_heads 5"),
        ({"model_type": "llama"}, "language model 'llama'; expected 'persimmon'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not"),
        ({"hidden_size": "large"}, "transformers cannot read it"),
    ],
)
def test_a_bad_language_model_is_named(
    checkpoint: Path, changes: dict[str, Any], reason: str
) -> None:
    edit_json(checkpoint / "config.json", "text_config", **changes)
    refused(checkpoint, reason)


def test_pictures_of_other_than_three_channels_are_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", num_channels=1)
    refused(checkpoint, "num_channels 1; expected 3")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patch_size": {"height": 5, "width": 6}}, r"patches of \(5, 6\); the model takes 6"),
        ({"size": {"height": 61, "width": 96}}, "a largest size of 61x96; expected whole patches"),
        ({"do_pad": False}, "do_resize or do_pad is off"),
        ({"do_resize": False}, "do_resize or do_pad is off"),
        ({"padding_mode": "reflect"}, "padding 'reflect' with 1.0; expected 'constant'"),
        ({"padding_value": 0.5}, "padding 'constant' with 0.5"),
        ({"padding_value": 256.0}, "padding 'constant' with 256"),
    ],
)
def test_an_image_processor_that_contradicts_the_model_is_refused(
    checkpoint: Path, changes: dict[str, Any], reason: str
) -> None:
    edit_json(checkpoint / "processor_config.json", "image_processor", **changes)
    refused(checkpoint, reason)


def test_an_image_processor_of_another_model_is_refused(checkpoint: Path) -> None:
    other = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 6, "width": 6}}
    (checkpoint / "processor_config.json").unlink()
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(other))
    refused(checkpoint, "is a SiglipImageProcessorPil; expected FuyuImageProcessor")


def test_a_checkpoint_without_a_processor_file_gets_the_released_one(tmp_path: Path) -> None:
    recipe = FuyuRecipe(layers=1, patch=30, max_height=1080, max_width=1920)
    checkpoint = make_fuyu_checkpoint(tmp_path / "checkpoint", recipe)
    _, expected = plan_checkpoint(checkpoint)
    (checkpoint / "processor_config.json").unlink()
    _, found = plan_checkpoint(checkpoint)
    assert isinstance(found.image, PatchImages)
    assert found.image == expected.image
    assert (found.image.max_height, found.image.padding_value) == (1080, 1)


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path) -> None:
    make_fuyu_tokenizer(checkpoint, 20000)
    refused(checkpoint, "the tokenizer does not belong to this checkpoint")
    text = (checkpoint / "tokenizer.json").read_text().replace("|NEWLINE|", "|OLDLINE|")
    (checkpoint / "tokenizer.json").write_text(text)
    refused(checkpoint, r"the tokenizer has no token \|NEWLINE\|")


def test_an_image_token_that_is_not_the_tokenizers_is_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", image_token_id=7)
    refused(checkpoint, "SPEAKER.*as token 3 .*image_token_id 7")


def test_the_base_of_the_rotation_comes_from_the_config(tmp_path: Path) -> None:
    for index, is_flat in enumerate((True, False)):
        recipe = FuyuRecipe(layers=1, theta=777.0, is_flat=is_flat)
        checkpoint = make_fuyu_checkpoint(tmp_path / str(index), recipe)
        reference: Any = load_reference(checkpoint)
        assert reference.model.config.text_config.rope_parameters["rope_theta"] == 777.0


def test_end_tokens_come_from_the_generation_config(checkpoint: Path) -> None:
    assert plan_checkpoint(checkpoint)[1].special_tokens.eos_token_ids == (2,)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert plan_checkpoint(checkpoint)[1].special_tokens.eos_token_ids == (2, 5)


def test_frequencies_that_old_checkpoints_saved_are_passed_over(checkpoint: Path) -> None:
    state = load_file(checkpoint / FIRST)
    some = next(iter(state.values()))
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = some.flatten()[
        :6
    ].clone()
    save_file(state, checkpoint / FIRST)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    index["weight_map"]["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = FIRST
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    plan_checkpoint(checkpoint)
