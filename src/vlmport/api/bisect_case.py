"""A bundle and the inputs that its own graphs get while it answers questions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from vlmport.api.bisect_values import inner_values
from vlmport.api.graph_inputs import GraphInputs
from vlmport.export.reference import IMAGE_TOKEN
from vlmport.manifest import load_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.api.bisect import Side
    from vlmport.api.bisect_values import InnerValue
    from vlmport.api.builtin_cases import Case
    from vlmport.api.parity_bundle import OpenedBundle
    from vlmport.api.reference_answers import GreedyAnswer

    Feed = Mapping[str, NDArray[Any]]

__all__ = ["BundleCase"]

_DECODER, _EMBEDDING = "decoder", "embed_tokens"


class BundleCase:
    """What a search looks at; see `vlmport.api.bisect.BisectCase`.

    Args:
        folder: of the bundle.
        opened: the same on the CPU, which makes the inputs.
        reference: runs the decoder that fills the cache.
        answers: questions, and the tokens that the decoder is led along.
        cases: the same questions.
        decode_steps: most steps behind each prompt.
    """

    def __init__(
        self,
        folder: Path,
        opened: OpenedBundle,
        reference: Side,
        answers: Sequence[GreedyAnswer],
        cases: Sequence[Case],
        decode_steps: int,
    ) -> None:
        manifest = opened.model.manifest
        self.bundle = str(folder)
        self.precision: str = load_manifest(folder).precision  # bfloat16 is opened emulated
        self.graphs = (*manifest.image_graphs, _EMBEDDING, _DECODER)
        self._folder = folder
        self._manifest = manifest
        self._opened = opened
        self._reference = reference
        self._asked = tuple(zip(cases, answers, strict=True))
        self._inputs = GraphInputs(opened.model, decode_steps)

    def outputs(self, graph: str) -> tuple[str, ...]:
        """Names of the graph's outputs."""
        return tuple(port.name for port in self._manifest.graph(graph).outputs)

    def values(self, graph: str) -> tuple[InnerValue, ...]:
        """What can be looked at inside of a graph."""
        return inner_values(ir.load(self._folder / self._manifest.graph(graph).file))

    def axes(self, graph: str, feed: Feed) -> dict[str, int]:
        """Lengths of the named axes of the graph's inputs."""
        return {
            axis: length
            for port in self._manifest.graph(graph).inputs
            for axis, length in zip(port.shape, feed[port.name].shape, strict=True)
            if isinstance(axis, str)
        }

    def feeds(self, graph: str) -> Iterator[tuple[str, Feed]]:
        """(What it is, the reference's inputs) of each run of a graph, question by question."""
        if graph == _EMBEDDING:
            yield from self._tokens()
            return
        with self._reference.open(graph, ()) as run:
            for case, answer in self._asked:
                for index, (feed, _) in enumerate(self._inputs.run(graph, run, [], answer)):
                    yield f"case {case.name!r}, {_which(graph, feed, index)}", feed

    def _tokens(self) -> Iterator[tuple[str, Feed]]:
        for case, answer in self._asked:
            prompt = self._opened.encode(case)
            ids = [*prompt[prompt != IMAGE_TOKEN], *answer.token_ids]
            yield f"case {case.name!r}, all tokens", {"input_ids": np.array([ids], np.int64)}


def _which(graph: str, feed: Feed, index: int) -> str:
    if graph != _DECODER:
        return f"run {index + 1} of its pictures"
    length, start = feed["inputs_embeds"].shape[1], int(feed["write_indices"][0])
    if length > 1:
        return f"prompt, tokens {start + 1} to {start + length}"
    return f"token {start + 1} alone"
