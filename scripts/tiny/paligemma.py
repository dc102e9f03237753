"""A tiny PaliGemma: SigLIP tower, linear projector, Gemma with one key/value head.

The model is transformers' own class. What is peculiar to the family: image and question see each
other in both directions and only the answer is causal; positions begin at 1; the embedding is tied
to the head; the tokenizer has 1024 location and 128 segmentation tokens.

Source: https://arxiv.org/abs/2407.07726, section 3; transformers 5.23: models/paligemma.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from tiny.family import Pixels, Turn
from tiny.hub_layout import (
    RESCALE_AND_NORMALIZE,
    encoder,
    published,
    save_checkpoint,
    tokenizer_settings,
)
from tiny.pictures import normalized, resized, whole_number
from tiny.tokenizer import train_gemma_tokenizer

__all__ = ["TinyPaliGemma", "build_paligemma", "load_paligemma"]

IMAGE = "<image>"
LOCATIONS = [f"<loc{number:04d}>" for number in range(1024)]
SEGMENTS = [f"<seg{number:03d}>" for number in range(128)]
IMAGE_SIZE, PATCH_SIZE = 56, 14
HUB_NAMES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


class TinyPaliGemma:
    """The PaliGemma side of the training loop; see `tiny.family.TinyFamily` for the methods."""

    first_position = 1
    sees_whole_prompt = True
    talks_in_turns = False

    def __init__(self, model: PaliGemmaForConditionalGeneration, tokenizer: Tokenizer) -> None:
        """Takes the model, in float32, and its tokenizer."""
        self.model = model
        self.module: nn.Module = model
        self.tokenizer = tokenizer
        self.tower: nn.Module = model.model.vision_tower
        vision: dict[str, Any] = model.config.to_dict()["vision_config"]
        self.feature_size: int = vision["hidden_size"]
        self.image_size: int = vision["image_size"]
        self.num_image_tokens: int = (self.image_size // vision["patch_size"]) ** 2
        self.image_token_id = whole_number(IMAGE, tokenizer.token_to_id(IMAGE))
        self.eos_token_id = whole_number("<eos>", tokenizer.token_to_id("<eos>"))
        self._encode = encoder(tokenizer)

    def resize(self, image: Image.Image) -> Tensor:
        """Returns uint8 [3, image_size, image_size]: bicubic, whatever the aspect ratio."""
        return resized(image, (self.image_size, self.image_size), Image.Resampling.BICUBIC)

    def features(self, batch: Sequence[Pixels]) -> Tensor:
        """Returns the tower's output, float32 [batch * num_patches, feature_size]."""
        return self._patch_features(batch).flatten(0, 1)

    def image_tokens(self, batch: Sequence[Pixels]) -> list[Tensor]:
        """Returns the projector's output, float32 [num_patches, hidden_size] for each image."""
        return list(self.model.model.multi_modal_projector(self._patch_features(batch)))

    def prefix(self, pixels: Pixels) -> list[int]:
        """Returns the image tokens and <bos>."""
        del pixels  # every image has as many tokens
        return [self.image_token_id] * self.num_image_tokens + list(self._encode("<bos>"))

    def turn(self, question: str, answer: str, *, is_first: bool) -> Turn:
        """Encodes a question, its line break and the answer, which has no space in front."""
        if not is_first:
            message = "PaliGemma: found a second turn; it knows single questions only"
            raise ValueError(message)
        asked = self._encode(f"{question}\n")
        return Turn([*asked, *self._encode(answer), self.eos_token_id], len(asked))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Returns float32 [batch, sequence_length, hidden_size], scaled by sqrt(hidden_size)."""
        embeddings: Tensor = self.model.get_input_embeddings()(input_ids)
        return embeddings

    def decode(self, inputs_embeds: Tensor, allowed: Tensor, position_ids: Tensor) -> Tensor:
        """Returns float32 [batch, sequence_length, hidden_size], after the final norm."""
        hidden_states: Tensor = self.model.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=allowed,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        return hidden_states

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Returns float32 [..., vocab_size]."""
        logits: Tensor = self.model.lm_head(hidden_states)
        return logits

    def decode_text(self, token_ids: list[int]) -> str:
        """Turns an answer's ids into text; location tokens are text here."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()

    def save(self, folder: Path) -> None:
        """Writes the checkpoint with its processor's files."""
        ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
        special = {
            "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
            "additional_special_tokens": [IMAGE],
        }  # fmt: skip
        files = {
            "config.json": published(self.model) | ids,
            "generation_config.json": ids,
            "preprocessor_config.json": {
                **RESCALE_AND_NORMALIZE,
                "do_convert_rgb": True,
                "do_resize": True,
                "image_processor_type": "SiglipImageProcessor",
                "image_seq_length": self.num_image_tokens,
                "processor_class": "PaliGemmaProcessor",
                "resample": int(Image.Resampling.BICUBIC),
                "size": {"height": self.image_size, "width": self.image_size},
            },
            "special_tokens_map.json": special,
            "tokenizer_config.json": special
            | tokenizer_settings("PaliGemmaProcessor", padding_side="left"),
        }
        save_checkpoint(folder, self.model, HUB_NAMES, self.tokenizer, files)

    def _patch_features(self, batch: Sequence[Pixels]) -> Tensor:
        pixel_values = normalized([image for (image,) in batch])
        features: Tensor = self.tower(pixel_values).last_hidden_state
        return features


def build_paligemma(corpus: list[str]) -> TinyPaliGemma:
    """Builds the untrained model; seed torch first.

    Args:
        corpus: text with every word that the tokenizer should know.
    """
    tokenizer = train_gemma_tokenizer(corpus, vocab_size=1000)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in LOCATIONS + SEGMENTS])
    tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    vocab_size = -(-tokenizer.get_vocab_size() // 64) * 64  # a multiple of 64, as released
    text = GemmaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=8192,
        initializer_range=0.05,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=whole_number(IMAGE, tokenizer.token_to_id(IMAGE)),
        projection_dim=128,
        hidden_size=128,
        vocab_size=vocab_size,
    )
    return TinyPaliGemma(PaliGemmaForConditionalGeneration(config), tokenizer)


def load_paligemma(folder: Path) -> TinyPaliGemma:
    """Builds the model from a saved folder alone, its float16 weights widened to float32."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return TinyPaliGemma(model, Tokenizer.from_file(str(folder / "tokenizer.json")))
