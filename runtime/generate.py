"""The loop: prompts and image features -> prefill -> decode steps until every row has ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlmport.errors import InputError
from vlmport.runtime.host_tokens import HostTokenDecoding
from vlmport.runtime.request import GenerationResult, Piece
from vlmport.runtime.sampling import TokenSampler
from vlmport.runtime.text_stream import TextStream

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.base import Backend, PromptEmbeddings, TokenDecoding
    from vlmport.runtime.prompt import EncodedPrompt
    from vlmport.runtime.request import Request

__all__ = ["Row", "check_length", "decode_rows", "make_row"]


@dataclass(slots=True)
class Row:
    """One sequence of a batch while it is generated.

    Attributes:
        prompt: the encoded prompt.
        inputs_embeds: of the prompt, image features in place; wherever the backend keeps them.
        sampler: chooses tokens.
        stream: turns tokens into text.
        max_new_tokens: most tokens to generate.
        started: time.perf_counter() of the request.
        image_sizes: (height, width) of the request's pictures before preprocessing, in pixels.
        token_ids: generated so far.
        finish_reason: None while the row goes on.
        first_token: time.perf_counter() of the first token.
        last_token: of the last one.
    """

    prompt: EncodedPrompt
    inputs_embeds: PromptEmbeddings
    sampler: TokenSampler
    stream: TextStream
    max_new_tokens: int
    started: float
    image_sizes: tuple[tuple[int, int], ...]
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    first_token: float = 0.0
    last_token: float = 0.0

    def append(self, token_id: int, eos_token_ids: Sequence[int]) -> Piece:
        """Takes the next token in and returns what can be shown of it."""
        self.last_token = time.perf_counter()
        if not self.token_ids:
            self.first_token = self.last_token
        self.token_ids.append(token_id)
        is_end = token_id in eos_token_ids
        emitted = "" if is_end else self.stream.push(token_id)
        if is_end or self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            emitted += self.stream.finish()
        return Piece(emitted, token_id)

    def result(self, backend: str) -> GenerationResult:
        """The whole answer, once the row has ended."""
        assert self.finish_reason is not None
        decode_seconds = self.last_token - self.first_token
        rate = (len(self.token_ids) - 1) / decode_seconds if decode_seconds > 0 else 0.0
        return GenerationResult(
            text=self.stream.text(),
            token_ids=tuple(self.token_ids),
            prompt_tokens=len(self.prompt.input_ids),
            image_tokens=int(self.prompt.image_mask.sum()),
            finish_reason=self.finish_reason,
            ttft_ms=(self.first_token - self.started) * 1000.0,
            tokens_per_second=rate,
            backend=backend,
        )


def check_length(prompt: EncodedPrompt, max_length: int) -> None:
    """Checks that a prompt leaves room for an answer.

    Raises:
        InputError: if it does not.
    """
    length = len(prompt.input_ids)
    if length >= max_length:
        msg = (
            f"prompt: found {length} tokens ({int(prompt.image_mask.sum())} of images); the "
            f"bundle's max_length of {max_length} leaves no room for an answer; shorten the "
            "prompt, or export with a larger --max-length"
        )
        raise InputError(msg)


def make_row(
    request: Request,
    prompt: EncodedPrompt,
    inputs_embeds: PromptEmbeddings,
    manifest: Manifest,
    tokenizer: Tokenizer,
    started: float,
    image_sizes: tuple[tuple[int, int], ...],
) -> Row:
    """Prepares a request whose prompt is checked, encoded and embedded."""
    room = manifest.dimensions.max_length - len(prompt.input_ids)
    wanted = request.max_new_tokens or manifest.generation.max_new_tokens
    sampler = TokenSampler(request.sampling, manifest.dimensions.vocab_size)
    sampler.start(prompt.text_ids)
    return Row(
        prompt=prompt,
        inputs_embeds=inputs_embeds,
        sampler=sampler,
        stream=TextStream(tokenizer, (*manifest.generation.stop_strings, *request.stop_strings)),
        max_new_tokens=min(wanted, room),
        started=started,
        image_sizes=image_sizes,
    )


def decode_rows(
    backend: Backend,
    rows: Sequence[Row],
    manifest: Manifest,
    on_logits: Callable[[NDArray[np.float32]], None] | None = None,
) -> Generator[tuple[int, Piece]]:
    """Generates until every row has ended, or the caller closes the iterator.

    Args:
        backend: an opened bundle.
        rows: prepared by `make_row`; their state is updated.
        manifest: the bundle's; names the tokens that end a row, and those that are never chosen.
        on_logits: is called with the logits [batch, vocab_size] of every step; rows that have
            ended hold values without meaning, and suppressed tokens the lowest float32. Logits
            come to the host only if it is given.

    Yields:
        (index of the row, its new piece), rows in order within a step.
    """
    decoding = _start(backend, rows, manifest, on_logits)
    eos_token_ids = manifest.special_tokens.eos_token_ids
    active = np.ones(len(rows), np.bool_)
    # A caller that stops in the middle gives the cache back, too.
    try:
        token_ids = decoding.prefill([row.inputs_embeds for row in rows])
        while True:
            for index, row in enumerate(rows):
                if active[index]:
                    yield index, row.append(int(token_ids[index]), eos_token_ids)
            active = np.array([row.finish_reason is None for row in rows])
            if not active.any():
                return
            token_ids = decoding.step(active)
    finally:
        decoding.close()


def _start(
    backend: Backend,
    rows: Sequence[Row],
    manifest: Manifest,
    on_logits: Callable[[NDArray[np.float32]], None] | None,
) -> TokenDecoding:
    max_length = max(len(row.inputs_embeds) + row.max_new_tokens for row in rows)
    samplers = [row.sampler for row in rows]
    suppressed = manifest.generation.suppressed_token_ids
    if on_logits is None:
        return backend.start_tokens(samplers, max_length, suppressed)
    decoding = backend.start(len(rows), max_length)
    return HostTokenDecoding(decoding, samplers, suppressed, on_logits)
