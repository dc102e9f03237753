"""The inputs that a bundle feeds to its own graphs while it answers a question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.runtime.kv_cache import GrowingCache

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from vlmport.api.reference_answers import GreedyAnswer
    from vlmport.runtime import VisionLanguageModel

__all__ = ["GraphInputs"]

# As the runtime cuts prompts: attention of a piece needs heads x piece x capacity floats.
_PIECE = 512
_Feed = dict[str, "NDArray[Any]"]


class GraphInputs:
    """Runs one graph of a bundle on the inputs that the bundle itself would give it.

    Args:
        model: the opened bundle.
        decode_steps: most steps of the decoder behind each prompt.
    """

    def __init__(self, model: VisionLanguageModel, decode_steps: int) -> None:
        self._model = model
        self._decode_steps = decode_steps

    def run(
        self, graph: str, session: Any, values: Sequence[str], answer: GreedyAnswer
    ) -> Iterator[tuple[_Feed, _Feed]]:
        """Runs a graph wherever an answer passes through it.

        Args:
            graph: its name.
            session: of the bundle's own graph, with `values` among its outputs.
            values: names of what is returned.
            answer: the question, and the tokens that the decoder is led along.

        Yields:
            (inputs, the wanted values) of each run, arrays by name; one run a tile of an image, one
            a piece of the prompt, one a decode step.
        """
        if graph == "decoder":
            yield from self._run_decoder(session, values, answer)
        elif graph in self._model.manifest.image_graphs:
            for feed in self._image_inputs(graph, answer):
                yield feed, _run(session, values, feed)

    def _image_inputs(self, graph: str, answer: GreedyAnswer) -> Iterator[_Feed]:
        graphs = self._model.manifest.image_graphs
        wanted = [port.name for port in self._model.manifest.graph(graph).inputs]
        for image in answer.request.images:
            for tile in self._model.prepare(image).tiles():
                arrays = dict(tile)
                for before in graphs[: graphs.index(graph)]:
                    arrays |= self._model.run(before, arrays)
                yield {name: arrays[name] for name in wanted}

    def _run_decoder(
        self, session: Any, values: Sequence[str], answer: GreedyAnswer
    ) -> Iterator[tuple[_Feed, _Feed]]:
        manifest = self._model.manifest
        past, present = manifest.past_ports, manifest.present_ports
        prompt = self._model.prompt_embeddings(answer.request)[None]
        followers = np.array(answer.token_ids[:-1], np.int64)[: self._decode_steps]
        capacity = prompt.shape[1] + len(followers)
        cache = GrowingCache(manifest.kv_layout, 1, capacity)
        cache.reserve(capacity, 0)
        arrays: Sequence[NDArray[Any]] = cache.arrays
        whole = manifest.attention.prompt == "bidirectional"
        start = 0
        for embeds in self._pieces(prompt, followers, whole=whole):
            feed = {
                **_positions(embeds, start, manifest.attention.first_position),
                **dict(zip(past, arrays, strict=True)),
            }
            results = _run(session, [*values, *present], feed)
            arrays = [results.pop(name) for name in present]
            start += embeds.shape[1]
            yield feed, results

    def _pieces(
        self, prompt: NDArray[Any], followers: NDArray[np.int64], *, whole: bool
    ) -> Iterator[NDArray[Any]]:
        """Embeddings [1, piece_length, hidden_size]: of the prompt, then of one token each."""
        length = prompt.shape[1]
        step = length if whole else _PIECE
        for start in range(0, length, step):
            yield np.ascontiguousarray(prompt[:, start : start + step])
        for token in followers:
            yield self._model.inputs_embeds(np.array([[token]], np.int64))


def _positions(embeds: NDArray[Any], start: int, first_position: int) -> _Feed:
    stop = start + embeds.shape[1]
    return {
        "inputs_embeds": embeds,
        "position_ids": np.arange(start, stop, dtype=np.int64)[None] + first_position,
        "write_indices": np.array([start], np.int64),
        "valid_lengths": np.array([stop], np.int64),
    }


def _run(session: Any, names: Sequence[str], feed: _Feed) -> _Feed:
    return dict(zip(names, session.run(list(names), feed), strict=True))
