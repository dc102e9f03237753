"""What a bundle is compared with: the PyTorch model of the same checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["IMAGE_TOKEN", "DecodingReference", "Reference", "ReferenceAnswer", "WholeModel"]

# Stands in a reference's prompt_ids where an image feature takes the embedding's place.
IMAGE_TOKEN = -1


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceAnswer:
    """A greedy answer of the PyTorch model.

    Attributes:
        prompt_ids: int64 [prompt_length], text and image tokens; `IMAGE_TOKEN` at image tokens.
        token_ids: int64 [generated_tokens], the end-of-sequence token included if it came.
        logits: float32 [generated_tokens, vocab_size], from which each token was chosen.
        text: the decoded answer without special tokens.
    """

    prompt_ids: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    text: str


class Reference(Protocol):
    """A PyTorch model with its transformers processors, on the CPU.

    Whatever the model's dtype, floating-point arrays come out as float32, which holds all values of
    the half-precision types, and go in as float32, to be cast where transformers casts them.
    """

    def image_inputs(self, image: Image) -> dict[str, NDArray[Any]]:
        """Preprocesses one RGB picture with transformers: inputs of the image graphs by name."""
        ...

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What a graph before the decoder computes, by transformers' own modules.

        Args:
            graph: "vision_encoder", "projector" or "embed_tokens".
            inputs: by name; those that the graph does not have are passed over.

        Returns:
            The graph's outputs by name.
        """
        ...

    def greedy(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image], max_new_tokens: int
    ) -> ReferenceAnswer:
        """Answers a chat with transformers' own `generate`.

        Args:
            messages: chat in transformers' form (role, content parts of type text or image).
            images: RGB, in the order of the image parts.
            max_new_tokens: most tokens to generate.
        """
        ...


@runtime_checkable
class DecodingReference(Reference, Protocol):
    """A reference whose language model can be driven step by step, and on a GPU."""

    @property
    def causal_model(self) -> Any:
        """The transformers model that takes input_ids and a cache and gives logits."""
        ...

    def move_to(self, device: str) -> None:
        """Moves the weights to a device of torch; `greedy` works there, `run` on the CPU alone."""
        ...


class WholeModel:
    """What `DecodingReference` asks of a reference that is one model of transformers.

    Attributes:
        model: the model.
    """

    __slots__ = ()
    model: Any

    @property
    def causal_model(self) -> Any:
        """See `DecodingReference.causal_model`."""
        return self.model

    def move_to(self, device: str) -> None:
        """See `DecodingReference.move_to`."""
        self.model.to(device)
