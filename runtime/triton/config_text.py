"""Writes a ModelConfig as config.pbtxt, in protobuf's text format."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmport.runtime.triton.model_config import (
        EnsembleStep,
        ModelConfig,
        TritonTensor,
        WarmupInput,
    )

__all__ = ["MODEL_FILES", "config_text"]

# Platform -> file of a version's folder.
MODEL_FILES = {"python": "model.py", "onnxruntime": "model.onnx", "tensorrt": "model.plan"}
_PLATFORMS = {
    "onnxruntime": "onnxruntime_onnx",
    "tensorrt": "tensorrt_plan",
    "ensemble": "ensemble",
}


def config_text(config: ModelConfig) -> str:
    """The content of config.pbtxt; equal configurations have equal texts."""
    return "\n".join(_lines(config)) + "\n"


def _lines(config: ModelConfig) -> Iterator[str]:
    yield f"name: {_quoted(config.name)}"
    if config.platform in _PLATFORMS:
        yield f"platform: {_quoted(_PLATFORMS[config.platform])}"
    if config.platform != "ensemble":
        yield f"backend: {_quoted(config.platform)}"
        yield f"default_model_filename: {_quoted(MODEL_FILES[config.platform])}"
    yield f"max_batch_size: {config.max_batch_size}"
    for tensor in config.inputs:
        yield from _block("input", _tensor(tensor))
    for tensor in config.outputs:
        yield from _block("output", _tensor(tensor))
    yield from _block("version_policy", ["latest { num_versions: 1 }"])
    if config.instances:
        yield from _block("instance_group", _instances(config))
    if config.max_batch_size:
        yield "dynamic_batching { }"
    if config.is_decoupled:
        yield from _block("model_transaction_policy", ["decoupled: true"])
    for key, text in config.parameters:
        value = f"value {{ string_value: {_quoted(text)} }}"
        yield from _block("parameters", [f"key: {_quoted(key)}", value])
    if config.warmup:
        yield from _block("model_warmup", _warmup(config.warmup))
    if config.steps:
        yield from _block("ensemble_scheduling", _steps(config.steps))


def _block(name: str, lines: list[str]) -> Iterator[str]:
    yield f"{name} {{"
    for line in lines:
        yield f"  {line}"
    yield "}"


def _tensor(tensor: TritonTensor) -> list[str]:
    lines = [
        f"name: {_quoted(tensor.name)}",
        f"data_type: {tensor.data_type}",
        f"dims: {_dims(tensor)}",
    ]
    return [*lines, "optional: true"] if tensor.is_optional else lines


def _instances(config: ModelConfig) -> list[str]:
    kind = "KIND_GPU" if config.is_on_gpu else "KIND_CPU"
    lines = [f"count: {config.instances}", f"kind: {kind}"]
    # Without it there would be copies on every GPU; one server serves one (see the README).
    return [*lines, "gpus: [ 0 ]"] if config.is_on_gpu else lines


def _warmup(inputs: tuple[WarmupInput, ...]) -> list[str]:
    lines = ['name: "first request"', "batch_size: 1"]
    for entry in inputs:
        tensor = entry.tensor
        source = f"input_data_file: {_quoted(tensor.name)}" if entry.content else "zero_data: true"
        value = [f"data_type: {tensor.data_type}", f"dims: {_dims(tensor)}", source]
        field = [f"key: {_quoted(tensor.name)}", *_block("value", value)]
        lines += _block("inputs", field)
    return lines


def _steps(steps: tuple[EnsembleStep, ...]) -> list[str]:
    lines: list[str] = []
    for step in steps:
        content = [f"model_name: {_quoted(step.model)}", "model_version: -1"]
        for field, pairs in (("input_map", step.inputs), ("output_map", step.outputs)):
            for port, tensor in pairs:
                content.append(f"{field} {{ key: {_quoted(port)} value: {_quoted(tensor)} }}")
        lines += _block("step", content)
    return lines


def _dims(tensor: TritonTensor) -> str:
    return f"[ {', '.join(map(str, tensor.dims))} ]"


def _quoted(text: str) -> str:
    """A string literal: protobuf's escapes are C's."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
