"""The vocabulary that the stages share: what a bundle's manifest says.

Every value is frozen. Nothing here imports torch, onnx or onnxruntime, so that a deployed runtime
can read a manifest with the standard library, numpy and pydantic alone. `vlmport.manifest` reads
and writes these values as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from vlmport.contract_answers import (
    AnswerFormat,
    CoordinateAnswers,
    CoordinateTokens,
    LocationTokenAnswers,
    TextAnswers,
)
from vlmport.contract_images import (
    FixedSizeImages,
    ImagePreprocessing,
    NativeSizeImages,
    PatchImages,
    Resize,
)
from vlmport.contract_quantization import Quantization, QuantizedGraph

__all__ = [
    "IMAGE_GRAPHS",
    "MANIFEST_NAME",
    "MASK_DECODER",
    "SCHEMA_VERSION",
    "AnswerFormat",
    "AttentionForm",
    "CoordinateAnswers",
    "CoordinateTokens",
    "FileEntry",
    "FixedSizeImages",
    "GenerationDefaults",
    "GraphSpec",
    "ImagePreprocessing",
    "ImageTokens",
    "KVLayout",
    "LocationTokenAnswers",
    "Manifest",
    "ModelDimensions",
    "NativeSizeImages",
    "PatchImages",
    "Precision",
    "PromptFormat",
    "Quantization",
    "QuantizedGraph",
    "Resize",
    "SourceCheckpoint",
    "SpecialTokens",
    "TensorSpec",
    "TextAnswers",
]

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
IMAGE_GRAPHS = ("vision_encoder", "projector")
# Optional: codes int64 [num_masks, codes_per_mask] -> mask float32 [num_masks, height, width].
MASK_DECODER = "mask_decoder"
# numpy's names; ml_dtypes' for bfloat16, which numpy has not.
Precision = Literal["float32", "float16", "bfloat16"]

# An unknown key in a manifest is a fault: a newer writer meant something that we would ignore.
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a bundle.

    Attributes:
        path: POSIX path relative to the bundle; never absolute, never upwards.
        size: bytes.
        sha256: lower-case hexadecimal digest of the content.
    """

    __pydantic_config__ = _STRICT
    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: name in the graph.
        dtype: numpy's name of the element type ("float32", "int64").
        shape: one entry an axis: a fixed length, or the name of a dynamic axis.
    """

    __pydantic_config__ = _STRICT
    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One ONNX graph of a bundle.

    Attributes:
        name: what the runtime asks for: "vision_encoder" (absent where pixels go straight into the
            projector), "projector", "embed_tokens", "decoder", "mask_decoder" (optional).
        file: path of the .onnx file, listed in the manifest's files.
        inputs: in the graph's order.
        outputs: in the graph's order.
        opset: version of the default operator set.
        operators: operator type -> number of nodes.
        parameter_bytes: bytes of the weights that the graph reads.
    """

    __pydantic_config__ = _STRICT
    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    operators: dict[str, int]
    parameter_bytes: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The cache: for each layer a key and a value [batch, num_kv_heads, capacity, head_dim].

    Attributes:
        num_layers: decoder layers.
        num_kv_heads: heads of keys and values.
        head_dim: length of one head.
        dtype: numpy's name of the element type.
    """

    __pydantic_config__ = _STRICT
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def bytes_per_token(self, itemsize: int) -> int:
        """Cache bytes that one token of one row takes, keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


@dataclass(frozen=True, slots=True)
class ModelDimensions:
    """Sizes that the runtime checks requests against.

    Attributes:
        hidden_size: length of an embedding.
        vocab_size: rows of the logits.
        max_length: most tokens (text and image) that one sequence may hold.
    """

    __pydantic_config__ = _STRICT
    hidden_size: int
    vocab_size: int
    max_length: int


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """Which tokens of the prompt see each other, and where positions begin.

    Attributes:
        prompt: "causal", or "bidirectional": every token of the prompt sees the whole prompt, so
            that it must run in one piece; generated tokens are causal either way.
        first_position: position id of a sequence's first token.
    """

    __pydantic_config__ = _STRICT
    prompt: Literal["causal", "bidirectional"]
    first_position: int


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """What an image becomes in the prompt, in place of its placeholder.

    Attributes:
        kind: "repeat": `count` image tokens for each tile of the image. "rows": `count` image
            tokens for each patch, in rows of patches.
        token: the image token's text; "" if it is no token of the vocabulary.
        count: image tokens of one tile, or of one patch.
        before: text in front of each tile, or of each row.
        after: text behind each tile, or each row.
        merged: a text of which two in a row become one, after all images are in place; "" for none.
        merged_is_spaced: whether a space is put behind that text where a character follows that is
            neither whitespace nor "<".
    """

    __pydantic_config__ = _STRICT
    kind: Literal["repeat", "rows"]
    token: str
    count: int
    before: str
    after: str
    merged: str
    merged_is_spaced: bool = False


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How a chat becomes token ids.

    Attributes:
        chat_template: Jinja source; gets `messages` (role, content parts of type text or image),
            `add_generation_prompt`, `bos_token`, `eos_token`.
        image_placeholder: the text that stands for one image in the rendered prompt.
        image_tokens: what takes the placeholder's place.
        tokenization: "whole" tokenizes the prompt once, with the images' text in it; "chunks"
            tokenizes the text around each placeholder for itself and keeps the
            beginning-of-sequence token of the first chunk alone. "image_first" tokenizes a prompt
            without images whole; one with images begins with an image and the
            beginning-of-sequence token, and the text behind these, further images in place, is
            tokenized for itself and without the post-processor.
        add_special_tokens: whether the tokenizer's post-processor runs.
        coordinates: how boxes and points are written, or None if the model has no tokens for them.
        kept_with_images: tokens of a prompt with images that the model sees, counted from the
            first, images included; the rest is cut off. None for all.
    """

    __pydantic_config__ = _STRICT
    chat_template: str
    image_placeholder: str
    image_tokens: ImageTokens
    tokenization: Literal["whole", "chunks", "image_first"]
    add_special_tokens: bool
    coordinates: CoordinateTokens | None = None
    kept_with_images: int | None = None


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids and texts with a meaning of their own.

    Attributes:
        bos_token_id: None if the tokenizer has none.
        eos_token_ids: any of them ends an answer.
        image_token_id: id of the image token in the vocabulary, or None if it is not in it.
        bos_token: text of bos_token_id, "" if there is none.
        eos_token: text of the tokenizer's end-of-sequence token, "" if there is none.
    """

    __pydantic_config__ = _STRICT
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    image_token_id: int | None
    bos_token: str
    eos_token: str


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a request that says nothing gets.

    Attributes:
        max_new_tokens: most tokens that an answer may have.
        stop_strings: texts that end an answer and are not part of it.
        suppressed_token_ids: tokens that are never chosen.
    """

    __pydantic_config__ = _STRICT
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    suppressed_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceCheckpoint:
    """Where the weights came from.

    Attributes:
        name: folder name of the checkpoint, without its path.
        layout: the layout in which it was found.
        files: the files that were read, with their digests.
        prompt_template: name of the prompt form that the export was told to take; "" for the one
            that follows from the checkpoint.
    """

    __pydantic_config__ = _STRICT
    name: str
    layout: str
    files: tuple[FileEntry, ...]
    prompt_template: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that the runtime needs to know of a bundle.

    Attributes:
        schema_version: version of this structure; a reader rejects a newer one.
        family: name of the family that wrote the bundle; for people, the runtime does not use it.
        variant: the parts that were combined, for people ("llama + siglip, mlp2x_gelu, square").
        precision: element type of the graphs' weights and computation, of what they hand on to
            each other and of the cache; pixels enter and logits leave in float32.
        dimensions: sizes.
        graphs: the ONNX graphs.
        kv_layout: form of the cache.
        attention: which tokens see each other.
        image: image preprocessing.
        prompt: prompt form.
        special_tokens: ids with a meaning.
        generation: defaults of generation.
        answers: what an answer is made of.
        source: the checkpoint.
        tools: tool name -> version, of the export.
        files: every file of the bundle but the manifest.
        quantization: how it was made from a bundle of higher precision; None if it was exported.
    """

    __pydantic_config__ = _STRICT
    schema_version: int
    family: str
    variant: str
    precision: Precision
    dimensions: ModelDimensions
    graphs: tuple[GraphSpec, ...]
    kv_layout: KVLayout
    attention: AttentionForm
    image: Annotated[ImagePreprocessing, Field(discriminator="kind")]
    prompt: PromptFormat
    special_tokens: SpecialTokens
    generation: GenerationDefaults
    answers: Annotated[AnswerFormat, Field(discriminator="kind")]
    source: SourceCheckpoint
    tools: dict[str, str]
    files: tuple[FileEntry, ...]
    quantization: Quantization | None = None

    def graph(self, name: str) -> GraphSpec:
        """The graph of that name; the manifest reader has checked that the needed ones exist."""
        return next(graph for graph in self.graphs if graph.name == name)

    def has_graph(self, name: str) -> bool:
        """Whether the bundle has an optional graph."""
        return any(graph.name == name for graph in self.graphs)

    @property
    def precision_words(self) -> str:
        """For people: the element type of the ports, and what was quantized behind them."""
        if self.quantization is None or not self.quantization.has_integer_layers:
            return self.precision
        return f"{self.precision}, {self.quantization.name}"

    @property
    def past_ports(self) -> tuple[str, ...]:
        """Names of the decoder's inputs that are the cache: each layer's key, then its value."""
        return tuple(port.name for port in self.graph("decoder").inputs[4:])

    @property
    def present_ports(self) -> tuple[str, ...]:
        """Names of the decoder's outputs that are the cache, in the order of `past_ports`."""
        return tuple(port.name for port in self.graph("decoder").outputs[1:])

    @property
    def image_graphs(self) -> tuple[str, ...]:
        """The graphs that turn a prepared image into image features, in their order."""
        names = {graph.name for graph in self.graphs}
        return tuple(name for name in IMAGE_GRAPHS if name in names)
