"""An opened bundle in the form that `vlmport.api.parity_model` asks for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.api.linked_bundle import folder_beside
from vlmport.api.parity_emulation import EMULATION, emulated_bundle
from vlmport.api.parity_model import TokensAndText
from vlmport.backend_names import DEFAULT_BACKEND
from vlmport.export.reference import IMAGE_TOKEN
from vlmport.manifest import load_manifest, verify_files
from vlmport.runtime import Request, VisionLanguageModel
from vlmport.runtime.messages import parse_messages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from vlmport.api.builtin_cases import Case

__all__ = ["OpenedBundle", "open_bundle"]


def open_bundle(
    bundle: Path, backend: str = DEFAULT_BACKEND, engines: Path | None = None
) -> OpenedBundle:
    """Opens a bundle and checks all of its files.

    ONNX Runtime's CPU provider lacks bfloat16 kernels, so it opens a bfloat16 bundle as one that
    computes each operator in float32 and rounds; `OpenedBundle.backend` says so.

    Args:
        bundle: its folder.
        backend: what computes it; see `VisionLanguageModel.load`.
        engines: folder of TensorRT engines; None for the one below the bundle that fits.

    Raises:
        BundleError: if the bundle is missing, damaged, unsafe or newer than this vlmport.
        VlmportError: if the backend cannot be used here.
    """
    manifest = load_manifest(bundle)
    if manifest.precision != "bfloat16" or backend != DEFAULT_BACKEND:
        return OpenedBundle(VisionLanguageModel.load(bundle, backend=backend, engines=engines))
    verify_files(bundle, manifest, hashes=True)
    # The sessions hold what they need of the files; beside the bundle, weights can be linked.
    with tempfile.TemporaryDirectory(prefix=".vlmport.", dir=folder_beside(bundle)) as folder:
        emulated_bundle(bundle, Path(folder))
        model = VisionLanguageModel.load(folder, verify=False)
    return OpenedBundle(model, f"{model.backend}, {EMULATION}")


class OpenedBundle:
    """A `ComparedModel` that runs a bundle through its public API, as a user's program would."""

    def __init__(self, model: VisionLanguageModel, backend: str = "") -> None:
        self._model = model
        self._backend = backend or model.backend

    @property
    def model(self) -> VisionLanguageModel:
        """The opened bundle itself."""
        return self._model

    @property
    def backend(self) -> str:
        """What computes the graphs, and how if not as the bundle says."""
        return self._backend

    @property
    def max_length(self) -> int:
        """Most tokens, prompt and answer, of one sequence."""
        return self._model.manifest.dimensions.max_length

    @property
    def image_graphs(self) -> tuple[str, ...]:
        """The graphs from a picture to its image features, in their order."""
        return self._model.manifest.image_graphs

    def image_inputs(self, image: Path | Image) -> dict[str, NDArray[Any]]:
        """Preprocesses one picture of any mode: inputs of the image graphs by name."""
        return self._model.prepare(image).inputs

    def encode(self, case: Case) -> NDArray[np.int64]:
        """Renders and tokenizes a chat: [prompt_length], `IMAGE_TOKEN` at image tokens."""
        layouts = [self._model.prepare(image).layout for image in case.images]
        prompt = self._model.encode(parse_messages(case.messages), layouts)
        return np.where(prompt.image_mask, IMAGE_TOKEN, prompt.input_ids)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs a graph before the decoder; inputs that it does not have are passed over.

        PyTorch's values come as float32 whatever its dtype, so they are cast to that of the port,
        which loses nothing.
        """
        ports = self._model.manifest.graph(graph).inputs
        cast = {port.name: inputs[port.name].astype(port.dtype, copy=False) for port in ports}
        return self._model.run(graph, cast)

    def greedy(
        self,
        cases: Sequence[Case],
        max_new_tokens: int,
        on_logits: Callable[[NDArray[np.float32]], None],
    ) -> list[TokensAndText]:
        """Answers cases in one batch; `on_logits` gets float32 [batch, vocab_size] of each step."""
        requests = [
            Request(
                messages=parse_messages(case.messages),
                images=case.images,
                max_new_tokens=max_new_tokens,
            )
            for case in cases
        ]
        results = self._model.generate_batch(requests, on_logits=on_logits)
        return [TokensAndText(result.token_ids, result.text) for result in results]
