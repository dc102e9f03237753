"""The README of a model repository, for whoever starts the server and whoever asks it."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

import vlmport
from vlmport.api.build_options import build_options
from vlmport.runtime.triton.answer_model import INPUTS, OUTPUTS
from vlmport.runtime.triton.names import FEATURES, PREPROCESS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.triton_models import Layout
    from vlmport.contract import Manifest
    from vlmport.runtime.triton.model_config import ModelConfig, TritonTensor

__all__ = ["readme"]

_TEMPLATE = "triton_readme.md.j2"
_MEANINGS = {
    "text_input": "a question; pictures take its placeholders' places, or come first",
    "messages": "in place of `text_input`: a chat as JSON, whose image parts take the pictures "
    "in their order",
    "image": "pictures: the bytes of files, base64, or data URLs",
    "stop": "texts that end the answer and are not part of it",
    "stream": "whether each piece of text is a response of its own; else one with all of it",
    "text_output": "the answer, or when streaming what is new of it",
    "token_ids": "of the same",
    "finish_reason": "empty until the last response; then `stop` or `length`",
    "prompt_tokens": "of the prompt, images included",
    "image_tokens": "of these, those of images",
    "generated_tokens": "so far",
    "regions": "parts of the picture that the answer names, as JSON; in the last response, if the "
    "model names any",
}
_PARTS = {
    PREPROCESS: "a picture's bytes -> inputs of the image graphs",
    "vision_encoder": "image graph: pixels -> features",
    "projector": "image graph: features (or pixels) -> image tokens of the language model",
    "embed_tokens": "token ids -> embeddings",
    FEATURES: "a picture's bytes -> image features, by the models above",
}
_PLATFORMS = {
    "python": "Python backend",
    "onnxruntime": "ONNX Runtime backend",
    "tensorrt": "TensorRT backend",
    "ensemble": "ensemble",
}
# What was tried, and where.
_VERSIONS = {
    "Triton": "2.51, which runs what `--backend python` writes; the protobuf of tritonclient 2.73 "
    "(container 26.09) reads every config.pbtxt",
    "ONNX Runtime": "1.31 in Python models; the onnxruntime backend needs one that knows opset 24: "
    "1.24.4 and 1.27.0, that of container 26.09, open such graphs",
    "TensorRT": "11; engines were built with TensorRT-RTX 1.7 by the same code, none has run on a "
    "GPU",
    "numpy": "1.26, which the vendor's container has; a Python model refuses to start where arrays "
    "do not reach it whole, as with numpy 2 on Triton 2.51",
}


def readme(manifest: Manifest, layout: Layout, configs: Sequence[ModelConfig]) -> str:
    """The content of README.md.

    Args:
        manifest: of the bundle.
        layout: of the repository.
        configs: of its models.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    source = files("vlmport.api").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        main=layout.names.main,
        vlmport=vlmport.__version__,
        family=manifest.family,
        variant=manifest.variant,
        precision=manifest.precision_words,
        backend=layout.backend,
        is_on_gpu=layout.is_on_gpu,
        models=[_model(layout, config) for config in configs],
        homeless=[
            config.name
            for config in configs
            if config.platform == "python" and config.name != layout.names.main
        ],
        inputs=[_tensor(tensor) for tensor in INPUTS],
        outputs=[_tensor(tensor) for tensor in OUTPUTS],
        max_length=_max_length(manifest, layout),
        num_slots=layout.serving.num_slots,
        max_queue=layout.serving.max_queue,
        versions=_VERSIONS.items(),
    )


def _max_length(manifest: Manifest, layout: Layout) -> int:
    """Most tokens of a sequence; engines are built for a cache of one size."""
    if layout.backend == "tensorrt":
        return build_options(manifest, "tensorrt").max_length
    return manifest.dimensions.max_length


def _model(layout: Layout, config: ModelConfig) -> dict[str, str]:
    place = "GPU" if config.is_on_gpu else "CPU"
    where = _PLATFORMS[config.platform] + (f", {place}" if config.instances else "")
    what = next(
        (words for part, words in _PARTS.items() if config.name == layout.names.of(part)),
        "answers: text and pictures in, text out",
    )
    return {"name": config.name, "what": what, "runs_on": where}


def _tensor(tensor: TritonTensor) -> dict[str, str]:
    length = "any number" if tensor.dims == (-1,) else "1"
    kind = tensor.data_type.removeprefix("TYPE_")
    return {
        "name": tensor.name,
        "words": f"{kind}, {length}",
        "meaning": _MEANINGS[tensor.name],
    }
