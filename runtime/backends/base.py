"""What the generation loop asks of a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from vlmport.runtime.sampling import TokenSampler

__all__ = [
    "Backend",
    "Decoding",
    "ImageFeatures",
    "PromptEmbeddings",
    "SlotDecoding",
    "StoredTokens",
    "TokenDecoding",
]


class ImageFeatures(Protocol):
    """One picture as the language model sees it, wherever the backend keeps it."""

    def __len__(self) -> int:
        """Image tokens."""
        ...

    def numpy(self) -> NDArray[np.floating[Any]]:
        """[num_image_tokens, hidden_size] in the bundle's precision."""
        ...


class PromptEmbeddings(Protocol):
    """A prompt's embeddings with image features in place, wherever the backend keeps them."""

    def __len__(self) -> int:
        """Tokens."""
        ...

    def numpy(self) -> NDArray[np.floating[Any]]:
        """[sequence_length, hidden_size] in the bundle's precision."""
        ...


class TokenDecoding(Protocol):
    """A batch of sequences whose tokens are chosen where their logits are.

    Each row chooses as its `TokenSampler` would, whatever its neighbours do.
    """

    def prefill(self, prompts: Sequence[PromptEmbeddings]) -> NDArray[np.int64]:
        """Runs the prompts.

        Args:
            prompts: one for each row, of different lengths; from the same backend.

        Returns:
            The first token of each row, int64 [batch].

        Raises:
            VlmportError: if the model's numbers overflowed.
        """
        ...

    def step(self, active: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Appends the token that was chosen last to every active row and chooses the next.

        Args:
            active: bool [batch]; rows that have ended do not grow and choose nothing.

        Returns:
            int64 [batch]; without meaning in rows that have ended.

        Raises:
            VlmportError: if the model's numbers overflowed in an active row.
        """
        ...

    def close(self) -> None:
        """Gives back what the batch holds; nothing may be asked of it any more."""
        ...


class Decoding(Protocol):
    """A batch of sequences with their cache. Token embeddings and cache stay in the backend."""

    def prefill(
        self, inputs_embeds: NDArray[np.floating[Any]], lengths: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Runs the prompts.

        Args:
            inputs_embeds: [batch, sequence_length, hidden_size] in the bundle's precision, padded
                on the right.
            lengths: int64 [batch], valid tokens of each row, 1 to sequence_length.

        Returns:
            logits float32 [batch, vocab_size] after each row's last valid token.
        """
        ...

    def step(self, token_ids: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Appends one token to every active row.

        Args:
            token_ids: int64 [batch].
            active: bool [batch]; rows that have ended do not grow, and their logits mean nothing.

        Returns:
            logits float32 [batch, vocab_size]; valid until the next call.
        """
        ...

    def close(self) -> None:
        """Gives back what the batch holds; nothing may be asked of it any more."""
        ...


class StoredTokens(Protocol):
    """Keys and values of the first tokens of a sequence, outside of the cache that ran them."""

    def __len__(self) -> int:
        """Tokens."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        ...


class SlotDecoding(Protocol):
    """Sequences that join and leave between steps, in the slots of one preallocated cache.

    A slot is a row of the cache. The caller says which tokens go where; slots that it decodes
    together are always the first ones. What a slot answers depends on nothing in the other ones.
    """

    @property
    def num_slots(self) -> int:
        """Sequences that the cache holds at most."""
        ...

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values that one token of one sequence takes."""
        ...

    def fits(self, num_slots: int, longest: int) -> bool:
        """Whether the first `num_slots` slots may grow to `longest` tokens each."""
        ...

    def prefill(
        self, slot: int, prompt: PromptEmbeddings, start: int, stop: int
    ) -> NDArray[np.float32]:
        """Runs a piece of a prompt in a slot whose first `start` tokens are there.

        Args:
            slot: its index.
            prompt: from the same backend.
            start: first token of the piece; what the slot held from there on is forgotten.
            stop: behind the last one. A prompt whose tokens all see each other is run to its end:
                whole, or only its last tokens, if the others are there from a run of the whole.

        Returns:
            logits float32 [vocab_size] after the last token of the piece; valid until the next
            call.
        """
        ...

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token to each of the first slots.

        Args:
            token_ids: int64 [num_decoded], for slots 0 to num_decoded - 1.

        Returns:
            logits float32 [num_decoded, vocab_size]; valid until the next call.
        """
        ...

    def move(self, source: int, target: int) -> None:
        """Gives a sequence another slot; what that held is forgotten, and `source` is empty."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Begins the sequence in `target` with the first `length` tokens of that in `source`."""
        ...

    def save(self, slot: int, length: int) -> StoredTokens:
        """Copies the first `length` tokens of a slot out of the cache.

        Raises:
            EngineError: if there is no memory left for them on the GPU.
            MemoryError: if there is none on the host.
        """
        ...

    def load(self, slot: int, stored: StoredTokens, length: int) -> None:
        """Begins the sequence in a slot with the first `length` tokens of stored ones."""
        ...

    def release(self, slot: int, *, is_faulty: bool = False) -> None:
        """Empties a slot.

        Args:
            slot: its index.
            is_faulty: its numbers overflowed, so that they are overwritten by zeros: an infinite
                value would harm the next sequence even where its weight is 0.
        """
        ...

    def close(self) -> None:
        """Gives back the cache; nothing may be asked of it any more."""
        ...


class Backend(Protocol):
    """An opened bundle."""

    name: str

    @property
    def max_length(self) -> int:
        """Most tokens, prompt and answer, of one sequence: the bundle's limit, or a smaller one."""
        ...

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs a graph that has no cache.

        Args:
            graph: its name.
            inputs: by name; those that the graph does not have are passed over.

        Returns:
            The graph's outputs by name.
        """
        ...

    def image_features(self, tiles: Sequence[Mapping[str, NDArray[Any]]]) -> ImageFeatures:
        """Runs the bundle's image graphs, one tile at a time.

        Args:
            tiles: of one picture, one or more: inputs of the image graphs by name.

        Returns:
            All tiles' features, one after the other.
        """
        ...

    def adopt_features(self, features: NDArray[np.floating[Any]]) -> ImageFeatures:
        """Takes a picture's features that were computed elsewhere.

        Args:
            features: [num_image_tokens, hidden_size] in the bundle's precision, or another that is
                rounded to it; may be kept, so that it must not change any more.
        """
        ...

    def embed_prompt(
        self,
        text_ids: NDArray[np.int64],
        image_mask: NDArray[np.bool_],
        features: Sequence[ImageFeatures],
    ) -> PromptEmbeddings:
        """Embeds a prompt and puts image features in place, in reading order.

        Args:
            text_ids: int64 [sequence_length]; 0 where an image feature takes the place.
            image_mask: bool [sequence_length], True where an image feature takes the place.
            features: one for each image of the prompt, from this backend; their last ones go
                unused where the prompt was cut and has fewer places.
        """
        ...

    def start_tokens(
        self, samplers: Sequence[TokenSampler], max_length: int, suppressed: Sequence[int]
    ) -> TokenDecoding:
        """Makes an empty cache whose next tokens are chosen by the backend.

        Args:
            samplers: one for each row; each says how its row chooses.
            max_length: tokens that a row will hold at most, prompt and answer.
            suppressed: token ids that are never chosen.
        """
        ...

    def start(self, batch: int, max_length: int) -> Decoding:
        """Makes an empty cache whose logits come to the host, for those who need them.

        Args:
            batch: rows.
            max_length: tokens that a row will hold at most.
        """
        ...

    def start_slots(self, num_slots: int, cache_tokens: int | None) -> SlotDecoding:
        """Preallocates a cache for sequences that join and leave.

        Args:
            num_slots: sequences that it holds at most.
            cache_tokens: tokens that all slots hold together at most; a slot takes as many as the
                longest sequence that is there with it. On a device a slot's share is fixed: an
                equal part of them, or with TensorRT the max_length of its engines, which must fit.
                None for max_length of each slot, on the host for no more than fits into half of
                the free memory.

        Raises:
            InputError: if the backend cannot hold as many, or a slot's fixed share does not fit.
        """
        ...
