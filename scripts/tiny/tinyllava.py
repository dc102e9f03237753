"""A tiny TinyLLaVA: SigLIP tower, two-layer GELU connector, Llama with grouped key/value heads.

The modules are transformers' own. `save` writes the merged layout of TinyLLaVA_Factory's finetune
stage: one folder with config.json, model.safetensors and the tokenizer; weight prefixes
`language_model.`, `vision_tower._vision_tower.vision_model.` and `connector._connector.`.

Source: https://github.com/TinyLLaVA/TinyLLaVA_Factory (commit 53f12c7): modeling_tinyllava.py,
template/llama_template.py, connector/mlp.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tiny.factory_layout import FEATURE_LAYER, write_factory_files
from tiny.family import Prompt, Turn
from tiny.questions import corpus
from tiny.tokenizer import BOS, EOS, UNK, train_tokenizer

__all__ = ["TinyLlava", "build_tinyllava", "load_tinyllava"]

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
IMAGE = "<image>"


class TinyLlava:
    """The TinyLLaVA side of the training loop; see `tiny.family.TinyFamily` for the methods."""

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
        self.image_size = _integer("vision_config.image_size", vision.image_size)
        self.feature_size = vision.hidden_size
        patch_size = _integer("vision_config.patch_size", vision.patch_size)
        self.patch_cells = _patch_cells(self.image_size // patch_size)
        self.num_image_tokens = len(self.patch_cells)
        self.eos_token_id = _integer(EOS, tokenizer.token_to_id(EOS))
        side = {"height": self.image_size, "width": self.image_size}
        self._processor = SiglipImageProcessorPil(size=side, do_convert_rgb=True)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resizes (bicubic) and normalizes to float32 [3, image_size, image_size]."""
        pixel_values: Tensor = self._processor(image, return_tensors="pt")["pixel_values"][0]
        return pixel_values

    def normalize(self, pixels: Tensor) -> Tensor:
        """Does the processor's arithmetic on uint8 [batch, 3, height, width], resized already."""
        return (pixels.float() / 255 - 0.5) / 0.5

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """Returns the input of the tower's last block without its first token.

        Factory's "patch" rule drops token 0 for SigLIP as well, where it is a patch and no CLS.
        """
        hidden_states = self.tower.embeddings(pixel_values)
        for layer in self.tower.encoder.layers[: FEATURE_LAYER + 1]:
            hidden_states = layer(hidden_states, None)
        features: Tensor = hidden_states[:, 1:]
        return features

    def image_tokens(self, patch_features: Tensor) -> Tensor:
        """Returns float32 [batch, num_image_tokens, hidden_size], the connector's output."""
        tokens: Tensor = self.connector(patch_features)
        return tokens

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

    def prompt(self, question: str) -> Prompt:
        """Splits the prompt on `<image>` and encodes each chunk; only the first keeps its BOS."""
        before, after = f"{SYSTEM}USER: {IMAGE}\n{question} ASSISTANT:".split(IMAGE)
        return Prompt(self.tokenizer.encode(before).ids, self._encode(after))

    def turn(self, question: str, answer: str, *, is_first: bool) -> Turn:
        """Encodes one turn; Factory joins turns without a space, right behind `</s>`."""
        start = f"\n{question} ASSISTANT:" if is_first else f"USER: {question} ASSISTANT:"
        return Turn(self._encode(f"{start} {answer}{EOS}"), len(self._encode(start)))

    def decode_text(self, token_ids: list[int]) -> str:
        """Turns an answer's ids into text, without special tokens and outer spaces."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()

    def save(self, folder: Path) -> None:
        """Writes config.json, model.safetensors (float16), the tokenizer files and LICENSE."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: tensor.detach().to(torch.float16).contiguous()
            for name, tensor in self._factory_weights().items()
        }
        path = folder / "model.safetensors"
        save_file(weights, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes it readable by its owner only
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_factory_files(folder, self.text_config, self.vision_config)

    def load_weights(self, path: Path) -> None:
        """Reads model.safetensors, widened to float32 in place."""
        stored = load_file(path)
        for name, tensor in self._factory_weights().items():
            tensor.data.copy_(stored[name])

    @functools.cached_property
    def _encode_once(self) -> Callable[[str], list[int]]:
        """Remembers what was encoded: training asks the same few thousand turns again and again."""
        return functools.cache(
            lambda text: self.tokenizer.encode(text, add_special_tokens=False).ids
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._encode_once(text))

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


def _integer(name: str, value: object) -> int:
    """Narrows what transformers and tokenizers declare as wider than a whole number."""
    if not isinstance(value, int):
        message = f"{name}: found {value!r}; a tiny model needs one whole number here"
        raise TypeError(message)
    return value


def _patch_cells(side: int) -> list[int]:
    """Lists the drawing's cell of each patch in row-major order, but of the dropped first one."""
    half = side // 2
    cells = [row // half * 2 + column // half for row in range(side) for column in range(side)]
    return cells[1:]
