"""A tiny TinyLLaVA: SigLIP tower, two-layer GELU connector, Llama with grouped key/value heads.

The modules are transformers' own. `save` writes the merged layout of TinyLLaVA_Factory's finetune
stage: one folder with config.json, model.safetensors and the tokenizer; weight prefixes
`language_model.`, `vision_tower._vision_tower.vision_model.` and `connector._connector.`.

Source: https://github.com/TinyLLaVA/TinyLLaVA_Factory (commit 53f12c7): modeling_tinyllava.py,
template/llama_template.py, connector/mlp.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from tiny.factory_layout import FEATURE_LAYER, write_factory_files
from tiny.family import Pixels, Turn
from tiny.hub_layout import encoder, save_weights
from tiny.pictures import normalized, resized, whole_number
from tiny.questions import corpus
from tiny.tokenizer import BOS, EOS, UNK, train_tokenizer

__all__ = ["TinyLlava", "build_tinyllava", "load_tinyllava"]

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
IMAGE_TOKEN_INDEX = -200  # Factory's; it stands for the image and is never embedded


class TinyLlava:
    """The TinyLLaVA side of the training loop; see `tiny.family.TinyFamily` for the methods."""

    first_position = 0
    sees_whole_prompt = False
    talks_in_turns = True

    def __init__(self, text: LlamaConfig, vision: SiglipVisionConfig, tokenizer: Tokenizer) -> None:
        """Builds the modules with fresh weights; seed torch first."""
        self.text_config = text
        self.vision_config = vision
        self.tokenizer = tokenizer
        self.language_model = LlamaForCausalLM(text)
        self.tower = SiglipVisionModel(vision)
        self.connector = nn.Sequential(
            nn.Linear(vision.hidden_size, text.hidden_size),
            nn.GELU(),
            nn.Linear(text.hidden_size, text.hidden_size),
        )
        self.module: nn.Module = nn.ModuleList([self.language_model, self.tower, self.connector])
        self.image_size = whole_number("vision_config.image_size", vision.image_size)
        self.feature_size = vision.hidden_size
        patch_size = whole_number("vision_config.patch_size", vision.patch_size)
        self.num_image_tokens = (self.image_size // patch_size) ** 2 - 1  # see _patch_features
        self.image_token_id = IMAGE_TOKEN_INDEX
        self.eos_token_id = whole_number(EOS, tokenizer.token_to_id(EOS))
        self._encode = encoder(tokenizer)

    def resize(self, image: Image.Image) -> Tensor:
        """Returns uint8 [3, image_size, image_size]: bicubic, whatever the aspect ratio."""
        return resized(image, (self.image_size, self.image_size), Image.Resampling.BICUBIC)

    def features(self, batch: Sequence[Pixels]) -> Tensor:
        """Returns float32 [batch * num_patches, feature_size]."""
        return self._patch_features(batch).flatten(0, 1)

    def image_tokens(self, batch: Sequence[Pixels]) -> list[Tensor]:
        """Returns the connector's output, float32 [num_patches, hidden_size] for each image."""
        return list(self.connector(self._patch_features(batch)))

    def _patch_features(self, batch: Sequence[Pixels]) -> Tensor:
        """Returns the input of the tower's last block without its first token.

        Factory's "patch" rule drops token 0 for SigLIP as well, where it is a patch and no CLS.
        """
        hidden_states = self.tower.embeddings(normalized([image for (image,) in batch]))
        for layer in self.tower.encoder.layers[: FEATURE_LAYER + 1]:
            hidden_states = layer(hidden_states, None)
        features: Tensor = hidden_states[:, 1:]
        return features

    def embed(self, input_ids: Tensor) -> Tensor:
        """Returns float32 [batch, sequence_length, hidden_size] for int64 ids."""
        embeddings: Tensor = self.language_model.model.embed_tokens(input_ids)
        return embeddings

    def decode(self, inputs_embeds: Tensor, allowed: Tensor, position_ids: Tensor) -> Tensor:
        """Returns float32 [batch, sequence_length, hidden_size], after the final norm."""
        output = self.language_model.model(
            inputs_embeds=inputs_embeds,
            attention_mask=allowed,
            position_ids=position_ids,
            use_cache=False,
        )
        hidden_states: Tensor = output.last_hidden_state
        return hidden_states

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Returns float32 [..., vocab_size]."""
        logits: Tensor = self.language_model.lm_head(hidden_states)
        return logits

    def prefix(self, pixels: Pixels) -> list[int]:
        """Encodes what stands in front of `<image>`, which alone begins with BOS."""
        del pixels  # every image has as many tokens
        before = self.tokenizer.encode(f"{SYSTEM}USER: ").ids
        return before + [self.image_token_id] * self.num_image_tokens

    def turn(self, question: str, answer: str, *, is_first: bool) -> Turn:
        """Encodes one turn; Factory joins turns without a space, right behind `</s>`."""
        start = f"\n{question} ASSISTANT:" if is_first else f"USER: {question} ASSISTANT:"
        return Turn(list(self._encode(f"{start} {answer}{EOS}")), len(self._encode(start)))

    def decode_text(self, token_ids: list[int]) -> str:
        """Turns an answer's ids into text, without special tokens and outer spaces."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()

    def save(self, folder: Path) -> None:
        """Writes config.json, model.safetensors (float16), the tokenizer files and LICENSE."""
        save_weights(folder, self._factory_weights(), {})
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_factory_files(folder, self.text_config, self.vision_config)

    def load_weights(self, path: Path) -> None:
        """Reads model.safetensors, widened to float32 in place."""
        stored = load_file(path)
        for name, tensor in self._factory_weights().items():
            tensor.data.copy_(stored[name])

    def _factory_weights(self) -> dict[str, Tensor]:
        """Names every weight as Factory does; its transformers 4.x tower has `vision_model.`."""
        parts = {
            "language_model.": self.language_model,
            "vision_tower._vision_tower.vision_model.": self.tower,
            "connector._connector.": self.connector,
        }
        return {
            prefix + name: parameter
            for prefix, part in parts.items()
            for name, parameter in part.named_parameters()
        }


def build_tinyllava() -> TinyLlava:
    """Builds the untrained model; seed torch first."""
    prompt = f"{SYSTEM}USER: ASSISTANT:"
    tokenizer = train_tokenizer([*corpus(), *[prompt] * 8], vocab_size=1000)
    text = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.05,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(UNK),
        tie_word_embeddings=False,
    )
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    return TinyLlava(text, vision, tokenizer)


def load_tinyllava(folder: Path) -> TinyLlava:
    """Builds the model from a saved folder alone, its float16 weights widened to float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = LlamaConfig.from_dict(config["text_config"])
    vision = SiglipVisionConfig.from_dict(config["vision_config"])
    family = TinyLlava(text, vision, tokenizer)
    family.load_weights(folder / "model.safetensors")
    return family
