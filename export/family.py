"""What a family of models provides, and how the family of a checkpoint is found."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import vlmport.export.families as families_package
from vlmport.contract import AnswerFormat, TextAnswers
from vlmport.errors import CheckpointError, close_matches
from vlmport.export.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tokenizers import Tokenizer

    from vlmport.contract import (
        AttentionForm,
        GenerationDefaults,
        ImagePreprocessing,
        KVLayout,
        ModelDimensions,
        PromptFormat,
        SpecialTokens,
    )
    from vlmport.export.checkpoint import Checkpoint
    from vlmport.export.reference import Reference
    from vlmport.export.tensor_store import TensorStore
    from vlmport.export.tracing import TracedModule

__all__ = ["ExportPlan", "Family", "discover_families", "load_reference", "plan_checkpoint"]


_TEXT_ANSWERS = TextAnswers("text")


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """A checkpoint that was read and checked; nothing is traced and no weight is held yet.

    Attributes:
        variant: the parts, for people.
        layout: the checkpoint layout that was found.
        graphs: what to trace, in the order of the manifest.
        store: the checkpoint's tensors under the graphs' parameter names.
        dimensions: sizes; `max_length` is the most that the model supports.
        kv_layout: form of the cache.
        attention: which tokens see each other.
        image: image preprocessing.
        prompt: prompt form.
        special_tokens: ids with a meaning.
        generation: defaults of generation.
        tokenizer: written as tokenizer.json.
        source_files: files of the checkpoint that the bundle depends on.
        reference: loads the PyTorch model with its weights.
        answers: what an answer is made of.
    """

    variant: str
    layout: str
    graphs: tuple[TracedModule, ...]
    store: TensorStore
    dimensions: ModelDimensions
    kv_layout: KVLayout
    attention: AttentionForm
    image: ImagePreprocessing
    prompt: PromptFormat
    special_tokens: SpecialTokens
    generation: GenerationDefaults
    tokenizer: Tokenizer
    source_files: tuple[Path, ...]
    reference: Callable[[], Reference]
    answers: AnswerFormat = _TEXT_ANSWERS


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models.

    Attributes:
        name: name in manifests.
        model_types: values of config.json's model_type that belong to it.
        plan: reads and checks a checkpoint of the family.
    """

    name: str
    model_types: tuple[str, ...]
    plan: Callable[[Checkpoint], ExportPlan]


def discover_families() -> dict[str, Family]:
    """All families by model_type, from the files of `vlmport.export.families`."""
    found: dict[str, Family] = {}
    for module_info in pkgutil.iter_modules(families_package.__path__):
        module = importlib.import_module(f"{families_package.__name__}.{module_info.name}")
        family: Family = module.FAMILY
        found.update(dict.fromkeys(family.model_types, family))
    return found


def plan_checkpoint(path: Path) -> tuple[Family, ExportPlan]:
    """Reads and checks a checkpoint of any known family.

    Raises:
        CheckpointError: if the folder, its model_type or its weights cannot be used.
    """
    checkpoint = open_checkpoint(path)
    families = discover_families()
    family = families.get(checkpoint.model_type)
    if family is None:
        found = (
            f"model_type {checkpoint.model_type!r}" if checkpoint.model_type else "no model_type"
        )
        hint = close_matches(checkpoint.model_type, families)
        msg = f"{path}/config.json: {found}; {hint}"
        raise CheckpointError(msg)
    return family, family.plan(checkpoint)


def load_reference(path: Path) -> Reference:
    """Loads the PyTorch model of a checkpoint, with its weights, in float32 on the CPU."""
    _, plan = plan_checkpoint(path)
    return plan.reference()
