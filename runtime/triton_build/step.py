"""What a model repository says of the engines that are to be built of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict, TypeAdapter, ValidationError

from vlmport.contract_engines import AttentionNode, BuildOptions, EnginePort, EngineSource
from vlmport.errors import EngineError

if TYPE_CHECKING:
    from vlmport.contract_engines import TensorRTName

__all__ = ["STEP_NAME", "EngineStep", "StepGraph", "load_step", "save_step"]

STEP_NAME = "engine_step.json"  # in the folder of the main model's version
_SCHEMA_VERSION = 1
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class StepGraph:
    """One graph; paths are relative to the main model's version folder.

    Attributes:
        graph: the bundle's graph, or one that chooses the next token.
        model: path of the ONNX file that TensorRT is given.
        place: path where the graph would lie; its weights are found from there.
        inputs: in the graph's order.
        outputs: in the graph's order.
        attention: what its Attention nodes mean.
        cache_updates: number of its TensorScatter nodes.
        weight_files: names of the files with its weights.
        digest: SHA-256 over the model and the weights.
        version_folder: path of the version folder of the Triton model that runs the engine as
            model.plan; "" if there is none.
        is_own: whether the main model runs it.
    """

    __pydantic_config__ = _STRICT
    graph: str
    model: str
    place: str
    inputs: tuple[EnginePort, ...]
    outputs: tuple[EnginePort, ...]
    attention: tuple[AttentionNode, ...]
    cache_updates: int
    weight_files: tuple[str, ...]
    digest: str
    version_folder: str
    is_own: bool

    def source(self, home: Path) -> EngineSource:
        """The graph as the builder takes it.

        Args:
            home: the main model's version folder.
        """
        return EngineSource(
            graph=self.graph,
            model=(home / self.model).read_bytes(),
            path=home / self.place,
            inputs=self.inputs,
            outputs=self.outputs,
            attention=self.attention,
            cache_updates=self.cache_updates,
            weight_files=self.weight_files,
        )


@dataclass(frozen=True, slots=True)
class EngineStep:
    """All engines of a repository.

    Attributes:
        schema_version: of this structure.
        options: what the engines are for.
        graphs: in the order in which they are built.
    """

    __pydantic_config__ = _STRICT
    schema_version: int
    options: BuildOptions
    graphs: tuple[StepGraph, ...]

    def with_backend(self, backend: TensorRTName) -> EngineStep:
        """The same for the other TensorRT."""
        return replace(self, options=replace(self.options, backend=backend))


_STEP = TypeAdapter(EngineStep)


def save_step(home: Path, options: BuildOptions, graphs: tuple[StepGraph, ...]) -> None:
    """Writes the file into the main model's version folder."""
    step = EngineStep(_SCHEMA_VERSION, options, graphs)
    text = json.dumps(_STEP.dump_python(step, mode="json"), indent=2) + "\n"
    (home / STEP_NAME).write_text(text, encoding="utf-8")


def load_step(home: Path) -> EngineStep:
    """Reads the file of the main model's version folder.

    Raises:
        EngineError: if it is missing or damaged.
    """
    path = home / STEP_NAME
    again = "write the repository again with `vlmport triton --backend tensorrt`"
    try:
        step = _STEP.validate_json(path.read_bytes())
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); expected what engines to build; {again}"
        raise EngineError(msg) from error
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        msg = f"{path}: {found}; {again}"
        raise EngineError(msg) from error
    if step.schema_version != _SCHEMA_VERSION:
        msg = (
            f"{path}: found schema_version {step.schema_version}; this vlmport reads "
            f"{_SCHEMA_VERSION}; {again}"
        )
        raise EngineError(msg)
    return step
