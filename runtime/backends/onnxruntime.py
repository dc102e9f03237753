"""Runs a bundle with ONNX Runtime on the CPU, the cache bound in place."""

from __future__ import annotations

import copy
import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import BundleError, VlmportError
from vlmport.machine.memory import free_memory
from vlmport.runtime.backends.host import HostBackend
from vlmport.runtime.backends.onnxruntime_memory import host_value
from vlmport.runtime.backends.onnxruntime_slots import OnnxRuntimeSlots
from vlmport.runtime.kv_cache import GrowingCache
from vlmport.runtime.prompt_pieces import longest_piece, prompt_pieces

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray

    from vlmport.contract import Manifest

__all__ = ["OnnxRuntimeBackend", "open_session", "session_options"]


class OnnxRuntimeBackend(HostBackend):
    """The graphs of a bundle as ONNX Runtime sessions.

    Args:
        bundle: folder of the bundle.
        manifest: its manifest.
        threads: worker threads of each session; None for the cores that this process may use.
        elsewhere: graphs that are not opened.

    Raises:
        VlmportError: if onnxruntime is not installed.
        BundleError: if a graph cannot be loaded.
    """

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        threads: int | None = None,
        elsewhere: Collection[str] = (),
    ) -> None:
        super().__init__(manifest)
        self._threads = threads
        self._sessions = {
            graph.name: open_session(
                bundle / graph.file, self._threads_of(graph.name), manifest.precision
            )
            for graph in manifest.graphs
            if graph.name not in elsewhere
        }

    def with_graph(self, graph: str, path: Path) -> Self:
        """A backend with one graph replaced by another of the same ports; the others are shared.

        Raises:
            BundleError: if the graph cannot be loaded.
        """
        changed = copy.copy(self)
        session = open_session(path, self._threads_of(graph), self._manifest.precision)
        changed._sessions = {**self._sessions, graph: session}
        return changed

    def _threads_of(self, graph: str) -> int | None:
        # A lookup needs no pool of threads, and one that spins beside the decoder's takes its cores
        # (a decode step of 12 layers x 768 took 14.7 ms in place of 13.3).
        return 1 if graph == "embed_tokens" else self._threads

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs a graph that has no cache; see `Backend.run`."""
        spec = self._manifest.graph(graph)
        fed = {port.name: inputs[port.name] for port in spec.inputs}
        results: list[NDArray[Any]] = self._sessions[graph].run(None, fed)
        return {port.name: result for port, result in zip(spec.outputs, results, strict=True)}

    def start(self, batch: int, max_length: int) -> OnnxRuntimeDecoding:
        """Makes an empty cache for `batch` rows that will hold at most `max_length` tokens."""
        return OnnxRuntimeDecoding(
            self._sessions["embed_tokens"],
            self._sessions["decoder"],
            self._manifest,
            batch,
            max_length,
        )

    def start_slots(self, num_slots: int, cache_tokens: int | None) -> OnnxRuntimeSlots:
        """Preallocates a cache for sequences that join and leave; see `Backend.start_slots`."""
        sessions = (self._sessions["embed_tokens"], self._sessions["decoder"])
        if cache_tokens is None:
            cache_tokens = self._affordable_tokens(num_slots)
        return OnnxRuntimeSlots(*sessions, self._manifest, num_slots, cache_tokens)

    def _affordable_tokens(self, num_slots: int) -> int:
        layout, longest = self._manifest.kv_layout, self._manifest.dimensions.max_length
        token_bytes = layout.bytes_per_token(np.dtype(layout.dtype).itemsize)
        # The cache is written at once, and prompts, features and prefixes want memory, too.
        return max(longest, min(num_slots * longest, free_memory() // 2 // token_bytes))


class OnnxRuntimeDecoding:
    """A batch of sequences; its decode step binds once and then only overwrites its inputs."""

    def __init__(
        self, embed: Any, decoder: Any, manifest: Manifest, batch: int, max_length: int
    ) -> None:
        self._embed = embed
        self._decoder = decoder
        self._binding = decoder.io_binding()
        self._cache = GrowingCache(manifest.kv_layout, batch, max_length)
        self._first_position = manifest.attention.first_position
        self._longest_piece = longest_piece(manifest.attention)
        self._past = manifest.past_ports
        self._present = manifest.present_ports
        self._lengths = np.zeros(batch, np.int64)  # cache rows that each sequence has filled
        self._logits = np.empty((batch, manifest.dimensions.vocab_size), np.float32)
        # Arrays that the decode step's bindings point into.
        self._token_ids = np.zeros((batch, 1), np.int64)
        dtype = manifest.graph("decoder").inputs[0].dtype
        self._embeds = np.empty((batch, 1, manifest.dimensions.hidden_size), dtype)
        self._positions = np.zeros((batch, 1), np.int64)
        self._write_indices = np.zeros(batch, np.int64)
        self._valid_lengths = np.zeros(batch, np.int64)
        self._embed_binding = embed.io_binding()
        self._embed_binding.bind_ortvalue_input("input_ids", host_value(self._token_ids))
        self._embed_binding.bind_ortvalue_output("inputs_embeds", host_value(self._embeds))
        self._step_is_bound = False

    def prefill(
        self, inputs_embeds: NDArray[np.floating[Any]], lengths: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Runs the prompts, causal ones in pieces; see `Decoding.prefill`."""
        self._reserve(inputs_embeds.shape[1], filled=0)
        chosen = np.empty_like(self._logits)
        for piece in prompt_pieces(lengths, self._first_position, self._longest_piece):
            self._run(
                np.ascontiguousarray(inputs_embeds[:, piece.start : piece.stop]),
                piece.position_ids,
                piece.write_indices,
                piece.valid_lengths,
            )
            chosen[piece.ends_here] = self._logits[piece.ends_here]
        self._lengths[:] = lengths
        return chosen

    def step(self, token_ids: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Appends one token to the active rows; see `Decoding.step`."""
        filled = int(self._lengths.max())
        self._lengths += active
        grown = self._reserve(int(self._lengths.max()), filled)
        self._token_ids[:, 0] = token_ids
        # A row that has ended overwrites its last cache row, which nobody reads any more.
        self._write_indices[:] = self._lengths - 1
        self._positions[:, 0] = self._write_indices + self._first_position
        self._valid_lengths[:] = self._lengths
        self._embed.run_with_iobinding(self._embed_binding)
        if grown or not self._step_is_bound:
            self._bind(self._embeds, self._positions, self._write_indices, self._valid_lengths)
            self._step_is_bound = True
        self._decoder.run_with_iobinding(self._binding)
        return self._logits

    def close(self) -> None:
        """Frees the cache; see `Decoding.close`."""
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._cache.arrays.clear()

    def _reserve(self, rows: int, filled: int) -> bool:
        if not self._cache.reserve(rows, filled):
            return False
        for past, present, array in zip(self._past, self._present, self._cache.arrays, strict=True):
            value = host_value(array)
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        return True

    def _run(
        self,
        inputs_embeds: NDArray[np.floating[Any]],
        position_ids: NDArray[np.int64],
        write_indices: NDArray[np.int64],
        valid_lengths: NDArray[np.int64],
    ) -> None:
        self._step_is_bound = False
        self._bind(inputs_embeds, position_ids, write_indices, valid_lengths)
        self._decoder.run_with_iobinding(self._binding)

    def _bind(self, *arrays: NDArray[Any]) -> None:
        names = ("inputs_embeds", "position_ids", "write_indices", "valid_lengths")
        for name, array in zip(names, arrays, strict=True):
            self._binding.bind_ortvalue_input(name, host_value(array))
        self._binding.bind_ortvalue_output("logits", host_value(self._logits))


def open_session(
    path: Path, threads: int | None, precision: str, content: bytes | None = None
) -> Any:  # onnxruntime ships no types
    """Opens one graph on the CPU, set up for a loop that alternates sessions.

    Args:
        path: the .onnx file.
        threads: worker threads; None for the cores that this process may use.
        precision: the bundle's, for the message where kernels are missing.
        content: serialized graph that takes the file's place; its weights are still those beside
            the file.

    Raises:
        VlmportError: if onnxruntime is not installed.
        BundleError: if the graph cannot be loaded.
    """
    options = session_options(threads)
    import onnxruntime

    if content is not None:
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, str(path.parent))
    source = str(path) if content is None else content
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own, untyped exceptions
        missing = re.search(r"implementation for (\w+)", str(error))
        if precision != "float32" and missing:
            msg = (
                f"{path}: found a {precision} graph; ONNX Runtime's CPU provider lacks {precision} "
                f"kernels ({missing[1]} is the first); run it on a GPU, or export the checkpoint "
                "with --precision fp16 or fp32"
            )
            raise BundleError(msg) from error
        msg = f"{path}: ONNX Runtime cannot load it ({error}); export the bundle again"
        raise BundleError(msg) from error


def session_options(threads: int | None) -> Any:
    """Options of a session in a loop that alternates sessions; worker threads as in `open_session`.

    Raises:
        VlmportError: if onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        msg = (
            "onnxruntime: not installed; expected for running a bundle; "
            'pip install "vlmport[cpu]" (or "vlmport[gpu]")'
        )
        raise VlmportError(msg) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    # The loop alternates sessions; a session that spins while another computes takes its cores
    # (a step of 35 ms took 69 ms). This stops the spinning when a run ends.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
