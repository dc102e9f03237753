"""A tiny Fuyu: no tower, a linear layer from patches straight into a Persimmon decoder.

The model is transformers' own class. What is peculiar to the family: images of any size, one
|SPEAKER| for each patch and a |NEWLINE| behind each row of them; <0x04> between question and
answer; layer norms of queries and keys; rotary embedding of half of each head; an untied head.

Source: https://www.adept.ai/blog/fuyu-8b; transformers 5.23: models/fuyu, models/persimmon.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import Unigram
from torch import Tensor, nn
from transformers import FuyuConfig, FuyuForCausalLM, PersimmonConfig

from tiny.family import Pixels, Turn
from tiny.hub_layout import (
    RESCALE_AND_NORMALIZE,
    encoder,
    published,
    save_checkpoint,
    tokenizer_settings,
)
from tiny.packing import embed, pack
from tiny.pictures import normalized, resized, whole_number
from tiny.tokenizer import BOS, EOS, SPACE, UNK, learn_pieces

__all__ = ["TinyFuyu", "build_fuyu", "load_fuyu"]

PLACEHOLDER, NEWLINE, END, ANSWER = "|SPEAKER|", "|NEWLINE|", "|ENDOFTEXT|", "<0x04>"
PATCH_SIZE = 30
LARGEST = 180  # pixels; what is higher or wider is shrunk
HUB_NAMES = {
    "model.language_model.": "language_model.model.",
    "model.vision_embed_tokens.": "vision_embed_tokens.",
    "lm_head.": "language_model.lm_head.",
}


class TinyFuyu:
    """The Fuyu side of the training loop; see `tiny.family.TinyFamily` for the methods.

    There being no tower, the first phase teaches the lower half of the decoder, by its hidden
    states at the patches, and the second phase is left out.
    """

    first_position = 0
    sees_whole_prompt = False
    talks_in_turns = False

    def __init__(self, model: FuyuForCausalLM, tokenizer: Tokenizer) -> None:
        """Takes the model, in float32, and its tokenizer."""
        self.model = model
        self.module: nn.Module = model
        self.tokenizer = tokenizer
        self.tower: nn.Module = model.model
        self.text_config: dict[str, Any] = model.config.to_dict()["text_config"]
        self.feature_size: int = self.text_config["hidden_size"]
        self.patch_size = whole_number("patch_size", model.config.patch_size)
        self.image_token_id = whole_number(PLACEHOLDER, tokenizer.token_to_id(PLACEHOLDER))
        self.newline_token_id = whole_number(NEWLINE, tokenizer.token_to_id(NEWLINE))
        self.bos_token_id = whole_number(BOS, tokenizer.token_to_id(BOS))
        self.eos_token_id = whole_number(END, tokenizer.token_to_id(END))
        self._encode = encoder(tokenizer)

    def resize(self, image: Image.Image) -> Tensor:
        """Returns uint8 [3, height, width]: shrunk to fit, never enlarged, then padded.

        The processor pads with the value 1 of 255 up to a whole number of patches.
        """
        scale = min(1.0, LARGEST / image.height, LARGEST / image.width)
        size = (int(image.width * scale), int(image.height * scale))
        pixels = resized(image, size, Image.Resampling.BILINEAR)
        right, bottom = -pixels.shape[2] % self.patch_size, -pixels.shape[1] % self.patch_size
        return nn.functional.pad(pixels, (0, right, 0, bottom), value=1)

    def features(self, batch: Sequence[Pixels]) -> Tensor:
        """Returns the hidden states at the patches half way up, float32 [num_patches, hidden_size].

        Half way, so that the other layers are left for relating patches and question. The patches
        of all images lie one behind the other.
        """
        prefixes = [self.prefix(pixels) for pixels in batch]
        packed = pack(prefixes, [[] for _ in batch], self.eos_token_id, branch=True)
        output = self.model.model.language_model(
            inputs_embeds=embed(self, packed.input_ids, self.image_tokens(batch)),
            attention_mask=packed.allowed,
            position_ids=packed.position_ids,
            use_cache=False,
            output_hidden_states=True,
        )
        half = self.text_config["num_hidden_layers"] // 2
        hidden: Tensor = output.hidden_states[half]  # 0 is the embeddings
        return hidden[packed.input_ids == self.image_token_id]

    def image_tokens(self, batch: Sequence[Pixels]) -> list[Tensor]:
        """Returns the projected patches, float32 [num_patches, hidden_size] for each image."""
        patches = [self._patches(image) for (image,) in batch]
        tokens: Tensor = self.model.model.vision_embed_tokens(torch.cat(patches))
        return list(torch.split_with_sizes(tokens, [len(rows) for rows in patches]))

    def prefix(self, pixels: Pixels) -> list[int]:
        """Returns the placeholders, a newline behind each row of them, and <s>."""
        (image,) = pixels
        rows, columns = (side // self.patch_size for side in image.shape[1:])
        row = [self.image_token_id] * columns + [self.newline_token_id]
        return row * rows + [self.bos_token_id]

    def turn(self, question: str, answer: str, *, is_first: bool) -> Turn:
        """Encodes a question up to <0x04> and its answer."""
        if not is_first:
            message = "Fuyu: found a second turn; it knows single questions only"
            raise ValueError(message)
        asked = self._encode(question + ANSWER)
        return Turn([*asked, *self._encode(answer), self.eos_token_id], len(asked))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Returns float32 [batch, sequence_length, hidden_size]."""
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
        """Turns an answer's ids into text, without special tokens and outer spaces."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()

    def save(self, folder: Path) -> None:
        """Writes the checkpoint with its processor's files; config.json is flat, as released."""
        config = published(self.model)
        text = config.pop("text_config")
        ids = {"bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id}
        special = {"bos_token": BOS, "eos_token": END, "pad_token": UNK, "unk_token": UNK}
        files = {
            "config.json": text | config,
            "generation_config.json": ids | {"pad_token_id": 0},
            "preprocessor_config.json": {
                **RESCALE_AND_NORMALIZE,
                "do_pad": True,
                "do_resize": True,
                "image_processor_type": "FuyuImageProcessor",
                "padding_mode": "constant",
                "padding_value": 1.0,
                "patch_size": {"height": self.patch_size, "width": self.patch_size},
                "processor_class": "FuyuProcessor",
                "resample": int(Image.Resampling.BILINEAR),
                "size": {"height": LARGEST, "width": LARGEST},
            },
            "special_tokens_map.json": special,
            "tokenizer_config.json": special
            | tokenizer_settings("FuyuProcessor", padding_side="left"),
        }
        save_checkpoint(folder, self.model, HUB_NAMES, self.tokenizer, files)

    def _patches(self, image: Tensor) -> Tensor:
        """Cuts an image into float32 [num_patches, patch_size * patch_size * 3], rows first.

        The order inside a patch is height, width, channel. FuyuImageProcessorPil.patchify_image of
        transformers 5.23 does the same for an array, but its processor passes it a tensor, whose
        transpose takes other arguments: TypeError.
        """
        size = self.patch_size
        blocks = normalized([image])[0].unfold(1, size, size).unfold(2, size, size)
        return blocks.permute(1, 2, 3, 4, 0).reshape(-1, size * size * 3)


def build_fuyu(corpus: list[str]) -> TinyFuyu:
    """Builds the untrained model; seed torch first.

    Args:
        corpus: text with every word that the tokenizer should know.
    """
    tokenizer = _unigram(corpus)
    text = PersimmonConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 25000.0,
            "partial_rotary_factor": 0.5,
        },
        pad_token_id=0,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(END),
    )
    config = FuyuConfig(
        text_config=text,
        patch_size=PATCH_SIZE,
        image_size=300,
        image_token_id=whole_number(PLACEHOLDER, tokenizer.token_to_id(PLACEHOLDER)),
    )
    return TinyFuyu(FuyuForCausalLM(config), tokenizer)


def load_fuyu(folder: Path) -> TinyFuyu:
    """Builds the model from a saved folder alone, its float16 weights widened to float32."""
    model = FuyuForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return TinyFuyu(model, Tokenizer.from_file(str(folder / "tokenizer.json")))


def _unigram(corpus: list[str]) -> Tokenizer:
    """Makes a SentencePiece-like Unigram tokenizer: a word is one piece wherever it is known.

    The processor expects "▁" in front of the first placeholder, so the placeholders have to be
    pieces of the model: in front of an added token the normalizer would put none.
    """
    learner = learn_pieces(corpus, 1000, (UNK, BOS, EOS))
    vocab = learner.get_vocab(with_added_tokens=True)
    pieces = [*sorted(vocab, key=vocab.__getitem__), PLACEHOLDER, NEWLINE, END]
    # One long piece always beats two shorter ones, and a byte never wins against letters.
    scores = [-8.0 if len(piece) > 1 else -12.0 for piece in pieces]
    tokenizer = Tokenizer(Unigram(list(zip(pieces, scores, strict=True)), 0, byte_fallback=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (UNK, BOS, EOS, END)]
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return tokenizer
