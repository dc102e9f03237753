"""What a parity run needs of an opened bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from vlmport.api.builtin_cases import Case

__all__ = ["ComparedModel", "TokensAndText"]


@dataclass(frozen=True, slots=True)
class TokensAndText:
    """An answer of the bundle; its logits were handed out step by step."""

    token_ids: tuple[int, ...]
    text: str


class ComparedModel(Protocol):
    """What is needed of an opened bundle; numpy in, numpy out."""

    @property
    def max_length(self) -> int:
        """Most tokens, prompt and answer, of one sequence."""
        ...

    @property
    def image_graphs(self) -> tuple[str, ...]:
        """The graphs from a picture to its image features, in their order."""
        ...

    def image_inputs(self, image: Path | Image) -> dict[str, NDArray[Any]]:
        """Preprocesses one picture of any mode: inputs of the image graphs by name."""
        ...

    def encode(self, case: Case) -> NDArray[np.int64]:
        """Renders and tokenizes a chat: [prompt_length], `IMAGE_TOKEN` at image tokens."""
        ...

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs a graph before the decoder; inputs that it does not have are passed over."""
        ...

    def greedy(
        self,
        cases: Sequence[Case],
        max_new_tokens: int,
        on_logits: Callable[[NDArray[np.float32]], None],
    ) -> list[TokensAndText]:
        """Answers cases in one batch; `on_logits` gets float32 [batch, vocab_size] of each step."""
        ...
