"""A tiny Idefics2: NaViT SigLIP, modality projection and perceiver resampler, Mistral.

The model is transformers' own class. What is peculiar to the family: images keep their size and
aspect ratio, padded to the largest of a batch under a patch mask; whatever its size, an image gives
as many image tokens as the resampler has latents; a prompt may hold several images; the chat
template and <end_of_utterance> are those of the instruction-tuned checkpoint.

Source: https://arxiv.org/abs/2405.02246, section 3; transformers 5.23: models/idefics2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    MistralConfig,
)
from transformers.models.idefics2.configuration_idefics2 import (
    Idefics2PerceiverConfig,
    Idefics2VisionConfig,
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
from tiny.tokenizer import BOS, EOS, UNK, train_tokenizer

__all__ = ["TinyIdefics2", "build_idefics2", "load_idefics2"]

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
SHORTEST, LONGEST = 32, 96  # pixels of an image's edges
PATCH_SIZE = 16
# That of HuggingFaceM4/idefics2-8b.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class TinyIdefics2:
    """The Idefics2 side of the training loop; see `tiny.family.TinyFamily` for the methods.

    The first phase teaches vision model and connector together, by the patches and the latents.
    """

    first_position = 0
    sees_whole_prompt = False
    talks_in_turns = False

    def __init__(self, model: Idefics2ForConditionalGeneration, tokenizer: Tokenizer) -> None:
        """Takes the model, in float32, and its tokenizer."""
        self.model = model
        self.module: nn.Module = model
        self.tokenizer = tokenizer
        self.tower: nn.Module = nn.ModuleList([model.model.vision_model, model.model.connector])
        config: dict[str, Any] = model.config.to_dict()
        self.text_config: dict[str, Any] = config["text_config"]
        self.feature_size: int = self.text_config["hidden_size"]
        self.patch_size: int = config["vision_config"]["patch_size"]
        self.num_latents: int = config["perceiver_config"]["resampler_n_latents"]
        self.image_token_id = whole_number(IMAGE, tokenizer.token_to_id(IMAGE))
        self.eos_token_id = whole_number(END, tokenizer.token_to_id(END))
        self._encode = encoder(tokenizer)

    def resize(self, image: Image.Image) -> Tensor:
        """Returns uint8 [3, height, width], the image in its own size.

        Raises:
            ValueError: if the processor would resize it, which training has no need for.
        """
        if max(image.size) > LONGEST or min(image.size) < SHORTEST:
            message = f"image: found {image.size}; edges of {SHORTEST} to {LONGEST} are expected"
            raise ValueError(message)
        return resized(image, image.size, Image.Resampling.BILINEAR)

    def features(self, batch: Sequence[Pixels]) -> Tensor:
        """Returns for each image its patches, rows first, then its latents.

        float32 [num_patches + num_latents of all images, hidden_size], which is the width of both.
        """
        hidden, patch_mask, latents = self._look([image for pixels in batch for image in pixels])
        parts = zip(hidden, patch_mask.flatten(1), latents, strict=True)
        return torch.cat([torch.cat([patches[mask], rest]) for patches, mask, rest in parts])

    def image_tokens(self, batch: Sequence[Pixels]) -> list[Tensor]:
        """Returns float32 [num_images * num_latents, hidden_size] for each example."""
        _, _, latents = self._look([image for pixels in batch for image in pixels])
        sizes = [len(pixels) * self.num_latents for pixels in batch]
        return list(torch.split_with_sizes(latents.flatten(0, 1), sizes))

    def prefix(self, pixels: Pixels) -> list[int]:
        """Returns <s>User: and the images; two that touch share the fake token between them."""
        one = [self.image_token_id] * self.num_latents + list(self._encode(FAKE))
        return [*self._encode(f"{BOS}User:{FAKE}"), *one * len(pixels)]

    def turn(self, question: str, answer: str, *, is_first: bool) -> Turn:
        """Encodes the rest of the user's message and the assistant's."""
        if not is_first:
            message = "Idefics2: found a second turn; it is taught single questions only"
            raise ValueError(message)
        asked = f" {question}{END}\nAssistant:"
        return Turn(list(self._encode(f"{asked} {answer}{END}")), len(self._encode(asked)))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Returns float32 [batch, sequence_length, hidden_size]."""
        embeddings: Tensor = self.model.get_input_embeddings()(input_ids)
        return embeddings

    def decode(self, inputs_embeds: Tensor, allowed: Tensor, position_ids: Tensor) -> Tensor:
        """Returns float32 [batch, sequence_length, hidden_size], after the final norm."""
        hidden_states: Tensor = self.model.model.text_model(
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
        """Writes the checkpoint with its processor's files."""
        special = {
            "bos_token": BOS, "eos_token": EOS, "pad_token": UNK, "unk_token": UNK,
            "additional_special_tokens": [FAKE, IMAGE, END],
        }  # fmt: skip
        text = self.text_config
        files = {
            "chat_template.json": {"chat_template": CHAT_TEMPLATE},
            "config.json": published(self.model),
            "generation_config.json": {
                "bad_words_ids": [[self._encode(FAKE)[0]], [self.image_token_id]],
                "bos_token_id": text["bos_token_id"],
                "eos_token_id": [text["eos_token_id"], self.eos_token_id],
                "pad_token_id": text["pad_token_id"],
            },
            "preprocessor_config.json": {
                **RESCALE_AND_NORMALIZE,
                "do_convert_rgb": True,
                "do_image_splitting": False,
                "do_pad": True,
                "do_resize": True,
                "image_processor_type": "Idefics2ImageProcessor",
                "processor_class": "Idefics2Processor",
                "resample": int(Image.Resampling.BILINEAR),
                "size": {"longest_edge": LONGEST, "shortest_edge": SHORTEST},
            },
            "processor_config.json": {
                "image_seq_len": self.num_latents,
                "processor_class": "Idefics2Processor",
            },
            "special_tokens_map.json": special,
            "tokenizer_config.json": special
            | tokenizer_settings("Idefics2Processor", padding_side="left")
            | {"chat_template": CHAT_TEMPLATE},
        }
        save_checkpoint(folder, self.model, {}, self.tokenizer, files)

    def _look(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Shows the images, padded to the largest height and width among them.

        Returns:
            hidden states float32 [num_images, num_patches, hidden_size]; patch mask bool
            [num_images, rows, columns]; latents float32 [num_images, num_latents, hidden_size].
        """
        height = max(image.shape[1] for image in images)
        width = max(image.shape[2] for image in images)
        grid = (height // self.patch_size, width // self.patch_size)
        pixel_values = torch.zeros((len(images), 3, height, width))
        patch_mask = torch.zeros((len(images), *grid), dtype=torch.bool)
        for row, image in enumerate(images):
            pixel_values[row, :, : image.shape[1], : image.shape[2]] = normalized([image])[0]
            rows, columns = (side // self.patch_size for side in image.shape[1:])
            patch_mask[row, :rows, :columns] = True
        hidden = self.model.model.vision_model(pixel_values, patch_mask).last_hidden_state
        return hidden, patch_mask, self.model.model.connector(hidden, patch_mask.flatten(1))


def build_idefics2(corpus: list[str], llama: Path) -> TinyIdefics2:
    """Builds the model; seed torch first.

    Args:
        corpus: text with every word that the tokenizer should know.
        llama: the folder of the tiny TinyLLaVA, with whose language model this one begins.
    """
    tokenizer = train_tokenizer([*corpus, *["User:", "Assistant:"] * 8], vocab_size=1000)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (FAKE, IMAGE, END)]
    )
    text = MistralConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        sliding_window=None,
        initializer_range=0.05,
        rms_norm_eps=1e-5,
        pad_token_id=tokenizer.token_to_id(UNK),
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
    )
    vision = Idefics2VisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=LONGEST,
        patch_size=PATCH_SIZE,
        initializer_range=0.05,
    )
    perceiver = Idefics2PerceiverConfig(
        hidden_size=128,
        rms_norm_eps=1e-5,
        resampler_n_latents=9,
        resampler_depth=2,
        resampler_n_heads=4,
        resampler_head_dim=32,
        num_key_value_heads=2,
        initializer_range=0.05,
    )
    config = Idefics2Config(
        vision_config=vision,
        perceiver_config=perceiver,
        text_config=text,
        image_token_id=whole_number(IMAGE, tokenizer.token_to_id(IMAGE)),
    )
    model = Idefics2ForConditionalGeneration(config)
    # transformers begins with latents of ones, all equal to each other.
    nn.init.normal_(model.model.connector.perceiver_resampler.latents, std=0.5)
    _begin_with_llama(model, tokenizer, llama)
    return TinyIdefics2(model, tokenizer)


def load_idefics2(folder: Path) -> TinyIdefics2:
    """Builds the model from a saved folder alone, its float16 weights widened to float32."""
    model = Idefics2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return TinyIdefics2(model, Tokenizer.from_file(str(folder / "tokenizer.json")))


def _begin_with_llama(
    model: Idefics2ForConditionalGeneration, tokenizer: Tokenizer, folder: Path
) -> None:
    """Copies the language model of a TinyLLaVA, and the embeddings of the pieces known to both.

    Without a sliding window Mistral is Llama, weight for weight.
    """
    begin = "language_model.model."
    stored = {
        name.removeprefix(begin): tensor.float()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(begin)
    }
    head = load_file(folder / "model.safetensors")["language_model.lm_head.weight"].float()
    old = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.no_grad():
        for name, parameter in model.model.text_model.named_parameters():
            if name != "embed_tokens.weight":
                parameter.copy_(stored[name])
        for piece, row in tokenizer.get_vocab(with_added_tokens=True).items():
            old_row = old.token_to_id(piece)
            if old_row is not None:
                model.get_input_embeddings().weight[row] = stored["embed_tokens.weight"][old_row]
                model.lm_head.weight[row] = head[old_row]
