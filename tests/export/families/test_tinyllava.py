"""What is peculiar to the family: prompt forms, cut prompts, adapters, two towers."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.adapter_checkpoints import make_adapter_run
from support.checkpoints import Recipe, make_checkpoint
from support.parity_cases import mixed_cases
from support.parity_rows import check_parity_row

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.errors import CheckpointError, ExportError, InputError, VlmportError
from vlmport.export.family import plan_checkpoint
from vlmport.export.prompt_templates import PROMPT_TEMPLATES
from vlmport.runtime import VisionLanguageModel
from vlmport.runtime.messages import ImagePart, Message, TextPart
from vlmport.runtime.preprocessing.prepared import ImageLayout
from vlmport.runtime.prompt import PromptEncoder

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import RunCli

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
ENDS = {
    "phi": "<|endoftext|>",
    "llama": "</s>",
    "gemma": "<eos>",
    "qwen2_base": "<|endoftext|>",
    "qwen2_instruct": "<|im_end|>",
}


def edit_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def encoder_of(checkpoint: Path, template: str | None = None) -> PromptEncoder:
    _, plan = plan_checkpoint(checkpoint, prompt_template=template)
    return PromptEncoder(plan.tokenizer, plan.prompt, plan.special_tokens)


def chat(*turns: tuple[Literal["user", "assistant"], int, str]) -> tuple[Message, ...]:
    messages = []
    for role, images, text in turns:
        places: list[ImagePart | TextPart] = [ImagePart() for _ in range(images)]
        messages.append(Message(role, (*places, TextPart(text))))
    return tuple(messages)


@pytest.mark.parametrize("name", ENDS)
def test_conversation_is_written_as_factory_writes_it(name: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Recipe(tower="clip"))
    messages = chat(
        ("user", 1, " What is it?\n"), ("assistant", 0, "A cat."), ("user", 0, "Are you sure?")
    )
    found = encoder_of(checkpoint, name).encode(messages, [ImageLayout(1, 4, 4)])
    assert found.text == (
        f"{SYSTEM}USER: <image>\nWhat is it? ASSISTANT: A cat.{ENDS[name]}"
        "USER: Are you sure? ASSISTANT:"
    )


def test_pretraining_form_is_the_image_alone(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Recipe(tower="clip"))
    encoder = encoder_of(checkpoint, "pretrain")
    messages = chat(("user", 1, "What is it?"), ("assistant", 0, "a cat"), ("user", 1, ""))
    layouts = [ImageLayout(1, 4, 4)] * 2
    assert encoder.encode(messages, layouts).text == "<image>a cat\n<image>"
    with pytest.raises(InputError, match="found a user message without one"):
        encoder.encode(chat(("user", 0, "What is it?")), [])


@pytest.mark.parametrize(
    ("language_model", "named", "end", "expected"),
    [
        ("llama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "</s>", "llama"),
        ("phi", "microsoft/phi-2", "</s>", "phi"),
        ("stablelm", "stabilityai/stablelm-2-zephyr-1_6b", "</s>", "phi"),
        ("gemma", "google/gemma-2b-it", "</s>", "gemma"),
        ("qwen2", "Qwen/Qwen2-0.5B", "</s>", "qwen2_base"),
        ("qwen2", "Qwen/Qwen2-0.5B-Instruct", "</s>", "qwen2_instruct"),
        ("qwen2", "Qwen/Qwen2.5-3B", "<|im_end|>", "qwen2_base"),
        ("qwen2", "/data/mine", "<|im_end|>", "qwen2_instruct"),
        ("qwen2", "/data/mine", "<|endoftext|>", "qwen2_base"),
    ],
)
def test_template_is_that_of_the_training_scripts(
    language_model: str, named: str, end: str, expected: str, tmp_path: Path
) -> None:
    recipe = Recipe(language_model, "clip", "linear")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", recipe)
    edit_config(checkpoint, llm_model_name_or_path=named)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)
    tokenizer.add_special_tokens({"eos_token": end})
    tokenizer.save_pretrained(checkpoint)
    _, plan = plan_checkpoint(checkpoint)
    assert plan.prompt.chat_template == PROMPT_TEMPLATES[expected]
    assert plan.special_tokens.eos_token_ids == (tokenizer.eos_token_id,)


def test_end_of_the_template_ends_an_answer_too(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Recipe("qwen2", "clip", "linear"))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(checkpoint)
    _, plan = plan_checkpoint(checkpoint, prompt_template="qwen2_instruct")
    added = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert plan.special_tokens.eos_token_ids == (tokenizer.eos_token_id, added)


def test_prompt_template_is_chosen_on_the_command_line(tmp_path: Path, run_cli: RunCli) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Recipe(tower="clip", connector="linear"))
    bundle = tmp_path / "bundle"
    code, _, errors = run_cli("export", checkpoint, bundle, "--prompt-template", "qwen3")
    assert code == 1
    assert "prompt template 'qwen3'; did you mean qwen2_base? known: gemma, llama, phi" in errors
    code, _, errors = run_cli("export", checkpoint, bundle, "--prompt-template", "qwen2_base")
    assert code == 0, errors
    manifest = VisionLanguageModel.load(bundle).manifest
    assert manifest.source.prompt_template == "qwen2_base"
    assert manifest.prompt.chat_template == PROMPT_TEMPLATES["qwen2_base"]
    code, out, errors = run_cli(
        "parity", checkpoint, bundle, "--prompt", "What is it?", "--max-new-tokens", "4"
    )
    assert code == 0, out + errors
    assert "PASS" in out


def test_checkpoint_with_its_own_prompt_form_takes_no_template(tmp_path: Path) -> None:
    recipe = Recipe("llama", "clip", "mlp2x_gelu", layout="transformers")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", recipe)
    with pytest.raises(ExportError, match="brings its own prompt form; leave --prompt-template"):
        plan_checkpoint(checkpoint, prompt_template="llama")


def test_prompt_with_images_is_cut_where_training_cuts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # 4 x 4 patches of the first picture fit whole, those of the second in part.
    recipe = Recipe("llama", "clip", "mlp2x_gelu", max_prompt=120)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", recipe)
    bundle = tmp_path / "bundle"
    export(ExportOptions(checkpoint, bundle), SilentProgress())
    row = f"{recipe.name}, prompts cut"
    check_parity_row("tinyllava", row, checkpoint, bundle, mixed_cases(), 32)
    model = VisionLanguageModel.load(bundle)
    picture = Image.new("RGB", (30, 20), "red")
    long = "Which? " * 40
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vlmport"):
        cut = model.generate(prompt=long, images=[picture], max_new_tokens=2)
        whole = model.generate(prompt=long, max_new_tokens=2)
    assert cut.prompt_tokens == 120 < whole.prompt_tokens
    [record] = caplog.records
    assert "tokens were cut off" in record.getMessage()
    assert "keeps the first 120 of a prompt with images" in record.getMessage()


@pytest.mark.parametrize("kept", [95, 100, 105])
def test_prompt_is_cut_inside_an_image(kept: int, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Recipe(tower="clip"))
    _, plan = plan_checkpoint(checkpoint)
    whole, cut = (
        PromptEncoder(plan.tokenizer, prompt, plan.special_tokens).encode(
            chat(("user", 2, "What is it?")), [ImageLayout(1, 4, 4)] * 2
        )
        for prompt in (plan.prompt, replace(plan.prompt, kept_with_images=kept))
    )
    assert whole.num_cut == 0
    assert cut.num_cut == len(whole.input_ids) - kept
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:kept])
    np.testing.assert_array_equal(cut.image_mask, whole.image_mask[:kept])


def test_adapter_run_answers_as_peft_merged_it(tmp_path: Path) -> None:
    recipe = Recipe("llama", "siglip", "mlp2x_gelu")
    parts = ("language_model", "vision_tower", "connector")
    run, merged = make_adapter_run(tmp_path, recipe, parts, r=4, lora_alpha=8)
    bundle = tmp_path / "bundle"
    report = export(ExportOptions(run, bundle), SilentProgress())
    check_parity_row("tinyllava", "LoRA run beside peft", merged, bundle, mixed_cases())
    read = {entry.path for entry in report.manifest.source.files}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"connector_type": "identity"}, "length 64 and embeddings of length 96"),
        ({"image_aspect_ratio": "anyres"}, "five axes, which the tower refuses"),
        ({"text_config": {"model_type": "openelm"}}, "has no OpenELM"),
        ({"text_config": {"model_type": "gemma2"}}, "did you mean gemma"),
        ({"vision_model_name_or_path": "mof:openai/clip-vit-large-patch14"}, "expected CLIP"),
        ({"connector_type": "mof_mlp"}, "no vision_model_name_or_path2"),
        ({"connector_type": "qformer"}, r"missing weights .*connector\.bert\.encoder"),
    ],
)
def test_what_factory_cannot_run_is_a_clear_error(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Recipe(connector="linear"))
    edit_config(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=message):
        plan_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"connector_type": "linear"}, "connector 'linear' for two towers; expected 'mof_mlp'"),
        ({"vision_model_name_or_path2": "mof:facebook/dinov2-giant"}, "expected equal ones"),
        ({"vision_model_name_or_path2": "mof:openai/clip-vit-large-patch14"}, "expected Dinov2"),
        ({"vision_model_name_or_path2": "mof:facebook/dinov2"}, "did you mean facebook/dinov2-"),
    ],
)
def test_towers_that_do_not_fit_each_other_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = Recipe("llama", "mof", "mof_mlp")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", recipe)
    edit_config(checkpoint, vision_model_name_or_path="mof:second", **changes)
    with pytest.raises(CheckpointError, match=message):
        plan_checkpoint(checkpoint)


def test_processor_that_contradicts_the_model_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Recipe(tower="clip"))
    transformers.CLIPImageProcessorPil().save_pretrained(checkpoint)
    with pytest.raises(VlmportError, match=r"makes pictures of \(224, 224\), the vision tower"):
        plan_checkpoint(checkpoint)


@pytest.mark.parametrize("bad", ["activation", "layers"])
def test_unknown_projector_settings_are_refused(bad: str, tmp_path: Path) -> None:
    recipe = Recipe("llama", "clip", "mlp2x_gelu", layout="transformers")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", recipe)
    if bad == "activation":
        edit_config(checkpoint, projector_hidden_act="silo")
        message = "projector_hidden_act 'silo'; did you mean .*silu"
    else:
        edit_config(checkpoint, vision_feature_layer=[-2, -9])
        message = r"found \[-2, -9\] for a tower of 3 layers"
    with pytest.raises(CheckpointError, match=message):
        plan_checkpoint(checkpoint)


@pytest.mark.slow
def test_fused_gates_of_dinov2_giant_are_split(tmp_path: Path) -> None:
    recipe = Recipe("llama", "dinov2-giant", "linear", dtype=torch.float16)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", recipe)
    export(ExportOptions(checkpoint, tmp_path / "bundle"), SilentProgress())
    check_parity_row("tinyllava", recipe.name, checkpoint, tmp_path / "bundle", mixed_cases(), 16)
