"""The public face of the runtime: a bundle that answers questions about pictures."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from vlmport.backend_names import DEFAULT_BACKEND
from vlmport.contract import MASK_DECODER
from vlmport.errors import BundleError, InputError
from vlmport.machine.requirements import require_backend
from vlmport.manifest import load_manifest, verify_files
from vlmport.runtime.answer_regions import with_regions
from vlmport.runtime.backends.onnxruntime import OnnxRuntimeBackend
from vlmport.runtime.backends.opening import open_backend
from vlmport.runtime.generate import decode_rows, make_row
from vlmport.runtime.image_file import load_image
from vlmport.runtime.preparation import RequestImage, chat_of, check_features, check_prompt
from vlmport.runtime.preprocessing import prepare_image
from vlmport.runtime.prompt import PromptEncoder
from vlmport.runtime.request import Request
from vlmport.runtime.sampling import SamplingOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.base import (
        Backend,
        Decoding,
        ImageFeatures,
        PromptEmbeddings,
        SlotDecoding,
    )
    from vlmport.runtime.generate import Row
    from vlmport.runtime.image_file import ImageSource
    from vlmport.runtime.messages import Message
    from vlmport.runtime.preparation import ComputeFeatures
    from vlmport.runtime.preprocessing.prepared import ImageLayout, PreparedImage
    from vlmport.runtime.prompt import EncodedPrompt
    from vlmport.runtime.request import GenerationResult, Piece

__all__ = ["VisionLanguageModel"]


class VisionLanguageModel:
    """An opened bundle. Make one with `VisionLanguageModel.load`.

    Attributes:
        manifest: the bundle's manifest; its max_length is the backend's, if that is smaller.
        tokenizer: the bundle's tokenizer.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        backend: Backend,
        compute_features: ComputeFeatures | None = None,
    ) -> None:
        # A backend may be built for shorter sequences than the bundle.
        limited = replace(manifest.dimensions, max_length=backend.max_length)
        self.manifest = replace(manifest, dimensions=limited)
        self.tokenizer = tokenizer
        self._backend = backend
        self._compute_features = compute_features
        self._encoder = PromptEncoder(tokenizer, manifest.prompt, manifest.special_tokens)

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        *,
        backend: str = DEFAULT_BACKEND,
        engines: str | os.PathLike[str] | None = None,
        verify: bool = True,
        threads: int | None = None,
        image_features: ComputeFeatures | None = None,
    ) -> VisionLanguageModel:
        """Opens a bundle.

        Args:
            bundle: folder that `vlmport export` wrote.
            backend: what computes: "onnxruntime" (on the CPU), "onnxruntime-cuda",
                "onnxruntime-tensorrt-rtx", "tensorrt" or "tensorrt-rtx".
            engines: folder of TensorRT engines that `vlmport build` wrote; None for the one below
                the bundle that fits this machine.
            verify: whether every file's digest is checked, which reads the whole bundle once.
            threads: worker threads of ONNX Runtime; None for the cores that this process may use.
            image_features: computes a picture's features [num_image_tokens, hidden_size] in place
                of the bundle's image graphs, which then are not opened and may be missing in the
                folder. It gets the picture's tiles, each as inputs of these graphs by name, may be
                called by several threads at once, and must not change what it has returned.

        Raises:
            BundleError: if the bundle is missing, damaged, unsafe or newer than this vlmport.
            InputError: if there is no such backend, or an option is not one of its own.
            VlmportError: if this machine lacks what the backend needs.
            EngineError: if an engine cannot be used.
        """
        folder = Path(bundle)
        engine_folder = None if engines is None else Path(engines)
        manifest = load_manifest(folder)
        require_backend(backend, folder, engine_folder)  # told before everything is hashed
        elsewhere = () if image_features is None else manifest.image_graphs
        verify_files(folder, manifest, hashes=verify, elsewhere=elsewhere)
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises plain Exception
            msg = f"{folder}/tokenizer.json: cannot be read ({error}); export the bundle again"
            raise BundleError(msg) from error
        opened = open_backend(
            backend,
            folder,
            manifest,
            threads=threads,
            engines=engine_folder,
            verify=verify,
            elsewhere=elsewhere,
        )
        return cls(manifest, tokenizer, opened, image_features)

    @property
    def backend(self) -> str:
        """Name of what computes the graphs."""
        return self._backend.name

    def stream(
        self,
        *,
        prompt: str | None = None,
        messages: tuple[Message, ...] | None = None,
        images: Sequence[ImageSource] = (),
        max_new_tokens: int | None = None,
        sampling: SamplingOptions | None = None,
        stop_strings: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Answers one request and yields the text as it is decoded; arguments as in `Request`.

        Raises:
            InputError: if an image, the prompt or an option cannot be used; before the first piece.
        """
        options = sampling or SamplingOptions()
        request = Request(
            prompt, messages, tuple(images), max_new_tokens, options, tuple(stop_strings)
        )
        row = self._row(request, time.perf_counter())
        return self._pieces(row)

    def _pieces(self, row: Row) -> Iterator[Piece]:
        with closing(decode_rows(self._backend, [row], self.manifest)) as steps:
            for _, piece in steps:
                yield piece

    def generate(
        self,
        *,
        prompt: str | None = None,
        messages: tuple[Message, ...] | None = None,
        images: Sequence[ImageSource] = (),
        max_new_tokens: int | None = None,
        sampling: SamplingOptions | None = None,
        stop_strings: Sequence[str] = (),
        on_logits: Callable[[NDArray[np.float32]], None] | None = None,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> GenerationResult:
        """Answers one request; arguments as in `Request`.

        Args:
            prompt: see `Request`.
            messages: see `Request`.
            images: see `Request`.
            max_new_tokens: see `Request`.
            sampling: see `Request`.
            stop_strings: see `Request`.
            on_logits: is called with the logits float32 [1, vocab_size] of every step.
            on_piece: is called with every piece of text as it is decoded.

        Raises:
            InputError: if an image, the prompt or an option cannot be used.
        """
        options = sampling or SamplingOptions()
        request = Request(
            prompt, messages, tuple(images), max_new_tokens, options, tuple(stop_strings)
        )
        return self.generate_batch([request], on_logits=on_logits, on_piece=on_piece)[0]

    def generate_batch(
        self,
        requests: Sequence[Request],
        *,
        on_logits: Callable[[NDArray[np.float32]], None] | None = None,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> list[GenerationResult]:
        """Answers several requests in one batch; each as it would be answered alone.

        Args:
            requests: prompts may differ in length and number of images.
            on_logits: is called with the logits float32 [batch, vocab_size] of every step.
            on_piece: is called with every piece of text, rows mixed.

        Raises:
            InputError: if there are none, or one of them cannot be used.
        """
        if not requests:
            msg = "requests: found none; expected one or more"
            raise InputError(msg)
        started = time.perf_counter()
        rows = [self._row(request, started) for request in requests]
        # Closed at once where on_piece raises: a traceback would keep the cache.
        with closing(decode_rows(self._backend, rows, self.manifest, on_logits)) as steps:
            for _, piece in steps:
                if on_piece is not None:
                    on_piece(piece)
        return [self.result_of(row) for row in rows]

    def forced_logits(
        self, request: Request, token_ids: Sequence[int]
    ) -> Iterator[NDArray[np.float32]]:
        """The logits from which each token of a given answer would have been chosen.

        Args:
            request: its prompt and images; how it samples and ends does not matter.
            token_ids: the answer, whatever this bundle itself would have said.

        Yields:
            float32 [vocab_size] before each token, suppressed tokens included; valid until the next
            one is asked for.

        Raises:
            InputError: if the request cannot be used, or leaves no room for the answer.
        """
        embeds = self.prompt_embeddings(request)
        length, limit = len(embeds) + len(token_ids), self.manifest.dimensions.max_length
        if length > limit:
            msg = (
                f"answer: found {len(embeds)} tokens of the prompt and {len(token_ids)} of the "
                f"answer; the bundle's max_length is {limit}; give a shorter one"
            )
            raise InputError(msg)
        with closing(self._backend.start(1, length)) as decoding:
            logits = decoding.prefill(embeds[None], np.array([len(embeds)], np.int64))
            for index in range(len(token_ids)):
                if index:
                    last = np.array([token_ids[index - 1]], np.int64)
                    logits = decoding.step(last, np.ones(1, np.bool_))
                yield logits[0]

    def prompt_embeddings(self, request: Request) -> NDArray[np.floating[Any]]:
        """What the decoder gets for a request: [sequence_length, hidden_size], images in place.

        Raises:
            InputError: if an image or the prompt cannot be used.
        """
        return self._row(request, time.perf_counter()).inputs_embeds.numpy()

    def with_graph(self, graph: str, path: Path) -> VisionLanguageModel:
        """A model with one graph replaced by another of the same ports; the others are shared.

        Raises:
            BundleError: if the graph cannot be loaded.
            InputError: if the backend is not "onnxruntime".
        """
        if not isinstance(self._backend, OnnxRuntimeBackend):
            msg = (
                f"backend: found {self.backend!r}, which cannot replace a graph; expected "
                f"{DEFAULT_BACKEND!r}; open the bundle with that"
            )
            raise InputError(msg)
        changed = self._backend.with_graph(graph, path)
        return VisionLanguageModel(self.manifest, self.tokenizer, changed, self._compute_features)

    def prepare(self, image: ImageSource) -> PreparedImage:
        """Loads and preprocesses one picture.

        Raises:
            InputError: if it cannot be read, or not be brought to the form that the graphs take.
        """
        return prepare_image(load_image(image), self.manifest.image)

    def encode(
        self, messages: tuple[Message, ...], layouts: Sequence[ImageLayout]
    ) -> EncodedPrompt:
        """Renders and tokenizes a chat whose images lie in the prompt as `layouts` say."""
        return self._encoder.encode(messages, layouts)

    def image_features(self, image: PreparedImage) -> NDArray[np.floating[Any]]:
        """One picture's embeddings: [num_image_tokens, hidden_size] in the bundle's precision."""
        return self.encode_image(image).numpy()

    def encode_image(self, image: PreparedImage) -> ImageFeatures:
        """One picture's embeddings, left where the backend keeps them.

        Raises:
            VlmportError: if they are computed elsewhere and are of another shape than expected.
        """
        if self._compute_features is None:
            return self._backend.image_features(image.tiles())
        features = self._compute_features(image.tiles())
        check_features(features, image, self.manifest)
        return self._backend.adopt_features(features)

    def embed_prompt(
        self, prompt: EncodedPrompt, features: Sequence[ImageFeatures]
    ) -> PromptEmbeddings:
        """What the decoder gets for a prompt, left where the backend keeps it.

        Args:
            prompt: of `encode`.
            features: one for each image of the prompt, of `encode_image`.
        """
        # An image token's own embedding is replaced; its id may lie outside of the table.
        text_ids = np.where(prompt.image_mask, 0, prompt.input_ids)
        return self._backend.embed_prompt(text_ids, prompt.image_mask, features)

    def inputs_embeds(self, input_ids: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        """The token embedding of int64 [batch, sequence_length]: [.., .., hidden_size]."""
        return self.run("embed_tokens", {"input_ids": input_ids})["inputs_embeds"]

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs one of the graphs before the decoder; the manifest names their inputs and outputs.

        Args:
            graph: its name.
            inputs: by name; those that the graph does not have are passed over.
        """
        return self._backend.run(graph, inputs)

    def start_decoding(self, batch: int, max_length: int) -> Decoding:
        """Makes an empty cache for sequences that the caller prompts and continues.

        Args:
            batch: sequences.
            max_length: tokens that each will hold at most.
        """
        return self._backend.start(batch, max_length)

    def start_slots(self, num_slots: int, cache_tokens: int) -> SlotDecoding:
        """Preallocates a cache for sequences that join and leave; see `Backend.start_slots`.

        Raises:
            InputError: if the backend cannot hold as many.
        """
        return self._backend.start_slots(num_slots, cache_tokens)

    def prepare_row(
        self,
        request: Request,
        messages: tuple[Message, ...],
        images: Sequence[RequestImage],
        started: float,
    ) -> Row:
        """Tokenizes and embeds a request.

        Args:
            request: says how tokens are chosen and when the answer ends.
            messages: its chat, of `chat_of`.
            images: one for each of its pictures; asked for features if the prompt can be used.
            started: time.perf_counter() of the request.

        Raises:
            InputError: if the prompt cannot be used.
        """
        prompt = self.encode(messages, [image.layout for image in images])
        check_prompt(prompt, self.manifest)
        # One image at a time: the result of an image does not depend on its neighbours.
        embeds = self.embed_prompt(prompt, [image.features() for image in images])
        sizes = tuple(image.size for image in images)
        return make_row(request, prompt, embeds, self.manifest, self.tokenizer, started, sizes)

    def result_of(self, row: Row) -> GenerationResult:
        """The whole answer of a row that has ended, with the regions that it names."""
        result, sizes = row.result(self._backend.name), row.image_sizes
        return with_regions(result, self.tokenizer, self.manifest, sizes, self._decode_masks)

    def _row(self, request: Request, started: float) -> Row:
        messages = chat_of(request, self.manifest)
        prepared = [self.prepare(image) for image in request.images]
        images = [
            RequestImage(image.layout, image.size, partial(self.encode_image, image))
            for image in prepared
        ]
        return self.prepare_row(request, messages, images, started)

    def _decode_masks(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.run(MASK_DECODER, {"codes": codes})["mask"]
