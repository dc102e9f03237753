"""Runs a bundle with a provider of ONNX Runtime that has a memory of its own: a GPU's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.runtime.backends.host import HostBackend
from vlmport.runtime.backends.onnxruntime_device_slots import DeviceSlots
from vlmport.runtime.backends.onnxruntime_memory import (
    array_of,
    empty_cache,
    host_value,
    told,
    write_,
)
from vlmport.runtime.backends.onnxruntime_provider import open_provider_session
from vlmport.runtime.prompt_pieces import longest_piece, prompt_pieces

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.runtime.backends.onnxruntime_memory import OrtMemory
    from vlmport.runtime.backends.onnxruntime_provider import OrtProvider

__all__ = ["DeviceDecoding", "OnnxRuntimeDeviceBackend"]


class OnnxRuntimeDeviceBackend(HostBackend):
    """The graphs of a bundle as sessions of one provider.

    Prompts are put together and tokens are chosen on the host; the cache, the embeddings of decode
    steps and their inputs stay in the provider's memory.

    Args:
        bundle: folder of the bundle.
        manifest: its manifest.
        provider: what runs the graphs.
        threads: worker threads for what the provider leaves to the CPU; None for all cores.
        elsewhere: graphs that are not opened.

    Raises:
        VlmportError: if the provider does not load.
        BundleError: if a graph cannot be loaded.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        provider: OrtProvider,
        threads: int | None = None,
        elsewhere: Collection[str] = (),
    ) -> None:
        super().__init__(manifest)
        self.name = provider.backend
        self._memory = provider.memory
        self._sessions = {
            graph.name: open_provider_session(bundle / graph.file, provider, threads)
            for graph in manifest.graphs
            if graph.name not in elsewhere
        }

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs a graph that has no cache; see `Backend.run`."""
        spec = self._manifest.graph(graph)
        session = self._sessions[graph]
        binding = session.io_binding()
        with told(f"{graph} on {self.name}"):
            for port in spec.inputs:
                array = np.ascontiguousarray(inputs[port.name])
                binding.bind_ortvalue_input(port.name, self._memory.copy_of(array))
            for port in spec.outputs:
                binding.bind_output(port.name, "cpu")
            session.run_with_iobinding(binding)
            values = binding.get_outputs()
            return {
                port.name: array_of(value, port.dtype)
                for port, value in zip(spec.outputs, values, strict=True)
            }

    def start(self, batch: int, max_length: int) -> DeviceDecoding:
        """Makes an empty cache; see `Backend.start`."""
        sessions = (self._sessions["embed_tokens"], self._sessions["decoder"])
        with told(f"a cache of {batch} rows x {max_length} tokens on {self.name}"):
            return DeviceDecoding(*sessions, self._manifest, self._memory, batch, max_length)

    def start_slots(self, num_slots: int, cache_tokens: int | None) -> DeviceSlots:
        """Preallocates a cache for sequences that join and leave; see `Backend.start_slots`."""
        sessions = (self._sessions["embed_tokens"], self._sessions["decoder"])
        if cache_tokens is None:
            cache_tokens = num_slots * self._manifest.dimensions.max_length
        with told(f"a cache of {cache_tokens} tokens on {self.name}"):
            return DeviceSlots(*sessions, self._manifest, self._memory, num_slots, cache_tokens)


class DeviceDecoding:
    """A batch of sequences; every value that a decode step reads or writes is bound once.

    The cache is made at once for `max_length` tokens: ONNX Runtime's Python API cannot copy a part
    of a value from device to device, so that a cache that grows would go through the host, and
    fixed addresses and shapes are what CUDA graphs need.

    Args:
        embed: session of the graph embed_tokens.
        decoder: session of the graph decoder.
        manifest: the bundle's.
        memory: of the sessions' provider.
        batch: rows.
        max_length: tokens that a row will hold at most.
    """

    def __init__(
        self,
        embed: Any,  # onnxruntime ships no types
        decoder: Any,
        manifest: Manifest,
        memory: OrtMemory,
        batch: int,
        max_length: int,
    ) -> None:
        self._embed = embed
        self._decoder = decoder
        self._memory = memory
        self._first_position = manifest.attention.first_position
        self._longest_piece = longest_piece(manifest.attention)
        spec = manifest.graph("decoder")
        self._past = manifest.past_ports
        self._present = manifest.present_ports
        self._cache = empty_cache(manifest.kv_layout, memory, batch, max_length)
        self._lengths = np.zeros(batch, np.int64)  # cache rows that each sequence has filled
        self._logits = np.empty((batch, manifest.dimensions.vocab_size), np.float32)
        self._step_inputs = {
            "position_ids": memory.zeros((batch, 1), "int64"),
            "write_indices": memory.zeros((batch,), "int64"),
            "valid_lengths": memory.zeros((batch,), "int64"),
        }
        self._token_ids = memory.zeros((batch, 1), "int64")
        hidden_size = manifest.dimensions.hidden_size
        embeds = memory.empty((batch, 1, hidden_size), spec.inputs[0].dtype)
        self._embed_binding = embed.io_binding()
        self._embed_binding.bind_ortvalue_input("input_ids", self._token_ids)
        self._embed_binding.bind_ortvalue_output("inputs_embeds", embeds)
        self._prefill_binding = self._bound_to_cache()
        self._step_binding = self._bound_to_cache()
        for name, value in {"inputs_embeds": embeds, **self._step_inputs}.items():
            self._step_binding.bind_ortvalue_input(name, value)

    def prefill(
        self, inputs_embeds: NDArray[np.floating[Any]], lengths: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Runs the prompts, causal ones in pieces; see `Decoding.prefill`."""
        chosen = np.empty_like(self._logits)
        for piece in prompt_pieces(lengths, self._first_position, self._longest_piece):
            embeds = np.ascontiguousarray(inputs_embeds[:, piece.start : piece.stop])
            inputs = {"inputs_embeds": embeds, **piece.inputs()}
            with told(f"decoder, tokens {piece.start} to {piece.stop} of the prompt"):
                for name, array in inputs.items():
                    value = self._memory.copy_of(array)
                    self._prefill_binding.bind_ortvalue_input(name, value)
                self._decoder.run_with_iobinding(self._prefill_binding)
            chosen[piece.ends_here] = self._logits[piece.ends_here]
        self._lengths[:] = lengths
        return chosen

    def step(self, token_ids: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Appends one token to the active rows; see `Decoding.step`."""
        self._lengths += active
        # A row that has ended overwrites its last cache row, which nobody reads any more.
        last_rows = self._lengths - 1
        with told("decoder, one step"):
            write_(self._token_ids, token_ids[:, None])
            write_(self._step_inputs["position_ids"], (last_rows + self._first_position)[:, None])
            write_(self._step_inputs["write_indices"], last_rows)
            write_(self._step_inputs["valid_lengths"], self._lengths)
            self._embed.run_with_iobinding(self._embed_binding)
            self._decoder.run_with_iobinding(self._step_binding)
        return self._logits

    def close(self) -> None:
        """Frees the cache; see `Decoding.close`."""
        for binding in (self._prefill_binding, self._step_binding):
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()
        self._cache.clear()

    def _bound_to_cache(self) -> Any:
        binding = self._decoder.io_binding()
        for past, present, value in zip(self._past, self._present, self._cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        # ONNX Runtime copies the logits to the host at the end of a run.
        binding.bind_ortvalue_output("logits", host_value(self._logits))
        return binding
