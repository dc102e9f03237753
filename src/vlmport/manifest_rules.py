"""What must hold in a manifest beyond its types: ranges, paths, and parts that agree.

Each rule yields lines "field.path: what was found; what was expected". Pure functions of the
manifest: no file is opened.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import PurePosixPath
from types import MappingProxyType

from vlmport.contract import (
    MANIFEST_NAME,
    MASK_DECODER,
    CoordinateAnswers,
    FileEntry,
    GraphSpec,
    Manifest,
    PatchImages,
    TensorSpec,
    TextAnswers,
)
from vlmport.manifest_image_rules import image_faults, too_small

__all__ = ["DTYPE_BYTES", "NEEDED_GRAPHS", "TOKENIZER_NAME", "manifest_faults"]

NEEDED_GRAPHS = ("projector", "embed_tokens", "decoder")
TOKENIZER_NAME = "tokenizer.json"

# Element types that ONNX graphs of a bundle may have at their borders -> bytes of one element.
DTYPE_BYTES = MappingProxyType(
    {
        "bool": 1,
        "int8": 1,
        "uint8": 1,
        "int16": 2,
        "uint16": 2,
        "float16": 2,
        "bfloat16": 2,
        "int32": 4,
        "uint32": 4,
        "float32": 4,
        "int64": 8,
        "uint64": 8,
        "float64": 8,
    }
)

_SHA256 = re.compile(r"[0-9a-f]{64}")


def manifest_faults(manifest: Manifest) -> list[str]:
    """All faults of a manifest whose types are right; empty if there is none."""
    return [
        *_number_faults(manifest),
        *_file_faults(manifest.files),
        *_graph_faults(manifest),
        *_precision_faults(manifest),
        *image_faults(manifest.image),
        *_text_faults(manifest),
        *_answer_faults(manifest),
        *_quantization_faults(manifest),
    ]


def _number_faults(manifest: Manifest) -> Iterator[str]:
    dimensions, cache = manifest.dimensions, manifest.kv_layout
    yield from too_small(
        {
            "schema_version": manifest.schema_version,
            "dimensions.hidden_size": dimensions.hidden_size,
            "dimensions.vocab_size": dimensions.vocab_size,
            "dimensions.max_length": dimensions.max_length,
            "prompt.image_tokens.count": manifest.prompt.image_tokens.count,
            "kv_layout.num_layers": cache.num_layers,
            "kv_layout.num_kv_heads": cache.num_kv_heads,
            "kv_layout.head_dim": cache.head_dim,
            "generation.max_new_tokens": manifest.generation.max_new_tokens,
        },
        least=1,
    )
    tokens = manifest.special_tokens
    ids = {f"eos_token_ids[{i}]": token for i, token in enumerate(tokens.eos_token_ids)}
    suppressed = manifest.generation.suppressed_token_ids
    ids |= {f"suppressed_token_ids[{i}]": token for i, token in enumerate(suppressed)}
    ids |= {"bos_token_id": tokens.bos_token_id or 0, "image_token_id": tokens.image_token_id or 0}
    yield from too_small({f"special_tokens.{name}": token for name, token in ids.items()}, least=0)
    first = manifest.attention.first_position
    yield from too_small({"attention.first_position": first}, least=0)
    yield from _dtype_faults("kv_layout.dtype", cache.dtype)


def _file_faults(files: tuple[FileEntry, ...]) -> Iterator[str]:
    for index, entry in enumerate(files):
        field = f"files[{index}]"
        fault = _path_fault(entry.path)
        if fault is not None:
            yield f"{field}.path: {fault}"
        if entry.path == MANIFEST_NAME:
            yield f"{field}.path: the manifest itself; expected every other file of the bundle"
        if _SHA256.fullmatch(entry.sha256) is None:
            yield f'{field}.sha256: found "{entry.sha256[:70]}"; expected 64 lower-case hex digits'
        yield from too_small({f"{field}.size": entry.size}, least=0)
    yield from _repeated("files", (entry.path for entry in files))
    if all(entry.path != TOKENIZER_NAME for entry in files):
        yield f"files: no {TOKENIZER_NAME} among them; expected one, the runtime reads it"


def _path_fault(path: str) -> str | None:
    """Why `path` is not a plain relative POSIX path that stays below its folder, or None."""
    found = f'found "{path[:200]}"'
    if not path or "\0" in path:
        return f"{found}; expected a relative path"
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return f"{found}, which is absolute; expected a path relative to the bundle"
    if "\\" in path:
        return f"{found}; expected / between folders, a backslash climbs out on other systems"
    if ".." in PurePosixPath(path).parts:
        return f"{found}, which climbs out of the bundle; expected a path inside it"
    if PurePosixPath(path).as_posix() != path or path == ".":
        return f"{found}; expected its plain form, {PurePosixPath(path).as_posix()}"
    return None


def _graph_faults(manifest: Manifest) -> Iterator[str]:
    listed = {entry.path for entry in manifest.files}
    names = [graph.name for graph in manifest.graphs]
    missing = [name for name in NEEDED_GRAPHS if name not in names]
    if missing:
        found = ", ".join(names) or "none"
        yield f"graphs: found {found}; expected also {', '.join(missing)}"
    yield from _repeated("graphs", names)
    for index, graph in enumerate(manifest.graphs):
        field = f"graphs[{index}]"
        if graph.file not in listed:
            yield f'{field}.file: found "{graph.file[:200]}"; expected one of the listed files'
        yield from too_small({f"{field}.opset": graph.opset}, least=1)
        yield from too_small({f"{field}.parameter_bytes": graph.parameter_bytes}, least=0)
        yield from too_small(
            {f"{field}.operators.{name}": count for name, count in graph.operators.items()}, least=1
        )
        yield from _port_faults(field, graph)


def _port_faults(field: str, graph: GraphSpec) -> Iterator[str]:
    for ports, specs in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        if not specs:
            yield f"{field}.{ports}: none; expected at least one"
        yield from _repeated(f"{field}.{ports}", (spec.name for spec in specs))
        for index, spec in enumerate(specs):
            yield from _tensor_faults(f"{field}.{ports}[{index}]", spec)


def _precision_faults(manifest: Manifest) -> Iterator[str]:
    """The decoder's ports must have the element types that the manifest names.

    A float32 bundle may keep its cache in float16; attention then casts.
    """
    precision, cache = manifest.precision, manifest.kv_layout.dtype
    allowed = ("float32", "float16") if precision == "float32" else (precision,)
    if cache not in allowed:
        expected = " or ".join(f'"{name}"' for name in allowed)
        yield (
            f'kv_layout.dtype: found "{cache[:60]}"; expected {expected}, as in precision '
            f'("{precision}")'
        )
    for index, graph in enumerate(manifest.graphs):
        if graph.name != "decoder":
            continue
        for ports, specs in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            for place, spec in enumerate(specs):
                wanted = _decoder_dtype(spec.name, precision, cache)
                if wanted is not None and spec.dtype != wanted:
                    yield (
                        f"graphs[{index}].{ports}[{place}].dtype: {spec.name[:60]} is "
                        f'"{spec.dtype[:60]}"; expected "{wanted}", as precision is '
                        f'"{precision}" and the cache "{cache}"'
                    )


def _decoder_dtype(port: str, precision: str, cache: str) -> str | None:
    """What a port of the decoder has to be; None for those that are no floats."""
    if "key_values." in port:
        return cache
    return {"inputs_embeds": precision, "logits": "float32"}.get(port)


def _tensor_faults(field: str, spec: TensorSpec) -> Iterator[str]:
    if not spec.name:
        yield f"{field}.name: empty; expected the name that the graph has"
    yield from _dtype_faults(f"{field}.dtype", spec.dtype)
    for axis, length in enumerate(spec.shape):
        if isinstance(length, int):
            yield from too_small({f"{field}.shape[{axis}]": length}, least=1)
        elif not length:
            yield f"{field}.shape[{axis}]: empty; expected a length or the name of an axis"


def _text_faults(manifest: Manifest) -> Iterator[str]:
    if (kept := manifest.prompt.kept_with_images) is not None:
        yield from too_small({"prompt.kept_with_images": kept}, least=1)
    if not manifest.prompt.image_placeholder:
        yield "prompt.image_placeholder: empty; expected the text that stands for an image"
    tokenization = manifest.prompt.tokenization
    if tokenization != "chunks":
        if manifest.special_tokens.image_token_id is None:
            yield (
                "special_tokens.image_token_id: null; expected an id, since prompt.tokenization "
                f'"{tokenization}" needs the image token to be one of the vocabulary'
            )
        if not manifest.prompt.image_tokens.token:
            yield (
                "prompt.image_tokens.token: empty; expected a text, as tokenization is "
                f'"{tokenization}"'
            )
    if tokenization == "image_first" and manifest.special_tokens.bos_token_id is None:
        yield (
            "special_tokens.bos_token_id: null; expected an id, since prompt.tokenization "
            '"image_first" puts it behind the first image'
        )
    if manifest.prompt.image_tokens.kind == "rows" and manifest.image.kind != "patches":
        yield (
            f'prompt.image_tokens.kind: found "rows" with images of kind "{manifest.image.kind}"; '
            'expected images of kind "patches", which have rows'
        )
    if (coordinates := manifest.prompt.coordinates) is not None:
        for field in fields(coordinates):
            if not getattr(coordinates, field.name):
                yield f"prompt.coordinates.{field.name}: empty; expected a token's text"
    if "" in manifest.generation.stop_strings:
        yield "generation.stop_strings: an empty text; it would end every answer at once"


def _answer_faults(manifest: Manifest) -> Iterator[str]:
    answers = manifest.answers
    decoder = next((graph for graph in manifest.graphs if graph.name == MASK_DECODER), None)
    if isinstance(answers, TextAnswers):
        if decoder is not None:
            yield f'graphs: found {MASK_DECODER}; expected none, since answers are of kind "text"'
        return
    if isinstance(answers, CoordinateAnswers):
        if manifest.prompt.coordinates is None or not isinstance(manifest.image, PatchImages):
            yield (
                'answers.kind: found "coordinate_tokens"; expected prompt.coordinates and images '
                'of kind "patches" with it, which say what a coordinate is'
            )
        if decoder is not None:
            yield f"graphs: found {MASK_DECODER}; expected none, boxes and points have no masks"
        return
    numbers = {
        "locations": answers.locations,
        "segment_codes": answers.segment_codes,
        "codes_per_mask": answers.codes_per_mask,
    }
    yield from too_small({f"answers.{name}": value for name, value in numbers.items()}, least=1)
    if decoder is None:
        return
    ports = [(spec.name, len(spec.shape)) for spec in (*decoder.inputs, *decoder.outputs)]
    if ports != [("codes", 2), ("mask", 3)]:
        yield f"graphs: {MASK_DECODER} has the ports {ports}; expected codes of 2 axes, mask of 3"
    elif decoder.inputs[0].shape[1] != answers.codes_per_mask:
        yield (
            f"graphs: {MASK_DECODER} takes {decoder.inputs[0].shape[1]} codes for a mask; expected "
            f"answers.codes_per_mask, {answers.codes_per_mask}"
        )


def _quantization_faults(manifest: Manifest) -> Iterator[str]:
    quantization = manifest.quantization
    if quantization is None:
        return
    listed = {entry.path for entry in manifest.files}
    for field, path in (("recipe", quantization.recipe), ("report", quantization.report)):
        if path not in listed:
            yield f'quantization.{field}: found "{path[:200]}"; expected one of the listed files'
    names = {graph.name for graph in manifest.graphs}
    for index, graph in enumerate(quantization.graphs):
        field = f"quantization.graphs[{index}]"
        if graph.graph not in names:
            yield f'{field}.graph: found "{graph.graph[:60]}"; expected a graph of the bundle'
        yield from too_small(
            {f"{field}.layers.{name}": count for name, count in graph.layers.items()}, least=0
        )
    yield from too_small({"quantization.samples": quantization.samples}, least=0)


def _dtype_faults(field: str, dtype: str) -> Iterator[str]:
    if dtype not in DTYPE_BYTES:
        yield f'{field}: found "{dtype[:60]}"; expected one of {", ".join(DTYPE_BYTES)}'


def _repeated(field: str, names: Iterable[str]) -> Iterator[str]:
    for name, count in Counter(names).items():
        if count > 1:
            yield f'{field}: "{name[:200]}" appears {count} times; expected once'
