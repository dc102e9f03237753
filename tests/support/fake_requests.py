"""Requests for the fake slots, and what each of them answers alone."""

from __future__ import annotations

import hashlib
import time
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from support.fake_slots import EOS, VOCAB, next_logits
from tokenizers import Tokenizer, decoders, models

from vlmport.errors import VlmportError
from vlmport.runtime.generate import Row
from vlmport.runtime.host_prompt import HostRows
from vlmport.runtime.prompt import EncodedPrompt
from vlmport.runtime.sampling import SamplingOptions, TokenSampler
from vlmport.runtime.serving.prefix_key import PrefixKey
from vlmport.runtime.serving.sequence import Sequence
from vlmport.runtime.text_stream import TextStream

if TYPE_CHECKING:
    from vlmport.contract import Manifest

__all__ = ["SUPPRESSED", "FakeRequest", "serving_manifest"]

GREEDY = SamplingOptions()
SUPPRESSED = 3
_TOKENIZER = Tokenizer(models.WordLevel({f"{i:02d}": i for i in range(VOCAB)}, unk_token="00"))
_TOKENIZER.decoder = decoders.Fuse()


def serving_manifest(manifest: Manifest, *, sees_whole_prompt: bool = False) -> Manifest:
    """A manifest of the fake model."""
    prompt: Literal["causal", "bidirectional"]
    prompt = "bidirectional" if sees_whole_prompt else "causal"
    return replace(
        manifest,
        dimensions=replace(manifest.dimensions, vocab_size=VOCAB, hidden_size=1),
        attention=replace(manifest.attention, prompt=prompt),
        special_tokens=replace(manifest.special_tokens, eos_token_ids=(EOS,)),
        generation=replace(manifest.generation, suppressed_token_ids=(SUPPRESSED,)),
    )


@dataclass(frozen=True)
class FakeRequest:
    """A prompt and how it is answered.

    Attributes:
        tokens: values of its tokens; -1 - n is a place of the n-th image.
        images: content of its images.
        max_new_tokens: of the answer.
        sampling: how tokens are chosen.
        stop: a text that ends the answer; tokens are two digits each.
    """

    tokens: tuple[float, ...]
    images: tuple[int, ...] = ()
    max_new_tokens: int = 8
    sampling: SamplingOptions = GREEDY
    stop: str = ""

    def row(self) -> Row:
        ids = np.array([max(0, token) % VOCAB for token in self.tokens], np.int64)
        sampler = TokenSampler(self.sampling, VOCAB)
        sampler.start(ids)
        return Row(
            prompt=EncodedPrompt("", ids, np.array(self.tokens) < 0, len(self.images)),
            inputs_embeds=HostRows(np.array(self.values())[:, None]),
            sampler=sampler,
            stream=TextStream(_TOKENIZER, (self.stop,) if self.stop else ()),
            max_new_tokens=self.max_new_tokens,
            started=time.perf_counter(),
            image_sizes=(),
        )

    def values(self) -> list[float]:
        """What is embedded: image places by content and by where they are in the image."""
        found = list(self.tokens)
        for number, image in enumerate(self.images):
            places = [at for at, token in enumerate(self.tokens) if token == -1 - number]
            for index, place in enumerate(places):
                found[place] = 1000.0 * (image + 1) + index
        return found

    def key(self) -> PrefixKey:
        digests = tuple(hashlib.sha256(str(image).encode()).digest() for image in self.images)
        return PrefixKey(np.array(self.tokens, np.int64), digests)

    def sequence(
        self, ticket: int, *, priority: int = 0, deadline: float | None = None
    ) -> Sequence:
        return Sequence(ticket, self.row(), self.key(), priority, deadline)

    def alone(self, *, sees_whole_prompt: bool = False) -> Row:
        """Its row after it was answered by a loop of its own, or as far as numbers go."""
        row, values = self.row(), self.values()
        seen = zlib.crc32(repr(values).encode()) if sees_whole_prompt else 0
        items = [(value, seen) for value in values]
        while row.finish_reason is None:
            logits = next_logits(items)
            logits[SUPPRESSED] = np.finfo(np.float32).min
            try:
                token_id = row.sampler.select(logits)
            except VlmportError:
                break
            row.append(token_id, (EOS,))
            items.append((float(token_id), 0))
        return row
