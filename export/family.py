"""What a family of models provides, and how the family of a checkpoint is found."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import vlmport.export.families as families_package
from vlmport.contract import AnswerFormat, TextAnswers
from vlmport.errors import CheckpointError, ExportError, close_matches
from vlmport.export.checkpoint import open_checkpoint
from vlmport.export.outside_families import family_of_file, installed_objects
from vlmport.export.precision import TORCH_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from tokenizers import Tokenizer

    from vlmport.contract import (
        AttentionForm,
        GenerationDefaults,
        ImagePreprocessing,
        KVLayout,
        ModelDimensions,
        Precision,
        PromptFormat,
        SpecialTokens,
    )
    from vlmport.export.checkpoint import Checkpoint
    from vlmport.export.reference import Reference
    from vlmport.export.tensor_store import TensorStore
    from vlmport.export.tracing import TracedModule

__all__ = [
    "ExportPlan",
    "Family",
    "FoundFamilies",
    "discover_families",
    "load_reference",
    "plan_checkpoint",
]

_LOGGER = logging.getLogger(__name__)


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
        reference: loads the PyTorch model with its weights, in a dtype.
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
    reference: Callable[[torch.dtype], Reference]
    answers: AnswerFormat = _TEXT_ANSWERS


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models.

    Attributes:
        name: name in manifests.
        model_types: values of config.json's model_type that belong to it.
        plan: reads and checks a checkpoint of the family.
        prompt_templates: names of prompt forms that a user may choose from, where checkpoints do
            not carry their own.
    """

    name: str
    model_types: tuple[str, ...]
    plan: Callable[[Checkpoint], ExportPlan]
    prompt_templates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundFamilies:
    """All families that are known, and what was meant to be one.

    Attributes:
        entries: model_type -> every family that claims it, with the words for where it is from.
        broken: one message for each entry point that gives no family.
    """

    entries: dict[str, tuple[tuple[Family, str], ...]]
    broken: tuple[str, ...]

    def family_of(self, model_type: str) -> Family | None:
        """The family of a model_type, None if there is none.

        Raises:
            ExportError: if two families claim it.
        """
        claims = self.entries.get(model_type, ())
        if len(claims) > 1:
            owners = " and ".join(f"{family.name!r} ({origin})" for family, origin in claims)
            msg = (
                f"model_type {model_type!r}: found {len(claims)} families: {owners}; expected "
                "one; uninstall the other, or give the checkpoint a model_type of its own"
            )
            raise ExportError(msg)
        return claims[0][0] if claims else None


def discover_families(family_file: Path | None = None) -> FoundFamilies:
    """Finds the families of the package, of installed distributions and of one file.

    Args:
        family_file: Python file that defines FAMILY; it is run.

    Raises:
        ExportError: if the file does not give a family. An entry point that does not is logged
            and kept among the broken ones: the other families stay usable.
    """
    found: list[tuple[Family, str]] = []
    broken: list[str] = []
    for module_info in pkgutil.iter_modules(families_package.__path__):
        module = importlib.import_module(f"{families_package.__name__}.{module_info.name}")
        found.append((module.FAMILY, f"vlmport's own {module_info.name}.py"))
    for item in installed_objects():
        fault = item.fault or _not_a_family(item.value)
        if fault:
            broken.append(f"{item.origin}: {fault}")
            _LOGGER.warning("%s: %s; update or uninstall the distribution", item.origin, fault)
        else:
            found.append((item.value, item.origin))
    if family_file is not None:
        family = family_of_file(family_file)
        fault = _not_a_family(family)
        if fault:
            msg = f"{family_file}: FAMILY {fault}"
            raise ExportError(msg)
        found.append((family, str(family_file)))
    return FoundFamilies(_by_model_type(found), tuple(broken))


def plan_checkpoint(
    path: Path, family_file: Path | None = None, prompt_template: str | None = None
) -> tuple[Family, ExportPlan]:
    """Reads and checks a checkpoint of any known family.

    Args:
        path: folder of the checkpoint.
        family_file: Python file that defines one more family; it is run.
        prompt_template: one of the family's `prompt_templates`; None to let the family choose.

    Raises:
        CheckpointError: if the folder, its model_type or its weights cannot be used.
        ExportError: if the family file cannot be used, two families claim the model_type, or the
            family has no such prompt template.
    """
    checkpoint = open_checkpoint(path)
    families = discover_families(family_file)
    family = families.family_of(checkpoint.model_type)
    if family is None:
        found = (
            f"model_type {checkpoint.model_type!r}" if checkpoint.model_type else "no model_type"
        )
        hint = close_matches(checkpoint.model_type, families.entries)
        faults = f"; families that cannot be used: {'; '.join(families.broken)}"
        msg = f"{path}/config.json: {found}; {hint}{faults if families.broken else ''}"
        raise CheckpointError(msg)
    if prompt_template is not None:
        _check_prompt_template(path, family, prompt_template)
        checkpoint = replace(checkpoint, prompt_template=prompt_template)
    return family, family.plan(checkpoint)


def load_reference(
    path: Path,
    precision: Precision = "float32",
    family_file: Path | None = None,
    prompt_template: str | None = None,
) -> Reference:
    """Loads the PyTorch model of a checkpoint, with its weights, on the CPU.

    Args:
        path: folder of the checkpoint.
        precision: element type of the weights and of the computation.
        family_file: as `plan_checkpoint` takes it.
        prompt_template: as `plan_checkpoint` takes it.
    """
    _, plan = plan_checkpoint(path, family_file, prompt_template)
    return plan.reference(TORCH_DTYPES[precision])


def _not_a_family(value: Any) -> str:
    """Why a foreign object cannot be used as a family; "" if it can."""
    if not isinstance(value, Family):
        return f"is a {type(value).__name__}; expected a vlmport.export.family.Family"
    if isinstance(value.model_types, str) or not value.model_types:
        return f"has the model_types {value.model_types!r}; expected a tuple of names"
    return ""


def _by_model_type(
    found: list[tuple[Family, str]],
) -> dict[str, tuple[tuple[Family, str], ...]]:
    entries: dict[str, tuple[tuple[Family, str], ...]] = {}
    for family, origin in found:
        for model_type in family.model_types:
            claims = entries.get(model_type, ())
            # Two entry points may name one object.
            if not any(family is other for other, _ in claims):
                entries[model_type] = (*claims, (family, origin))
    return entries


def _check_prompt_template(path: Path, family: Family, name: str) -> None:
    if name in family.prompt_templates:
        return
    hint = (
        close_matches(name, family.prompt_templates)
        if family.prompt_templates
        else f"checkpoints of the family {family.name} carry their own; leave it out"
    )
    msg = f"{path}: prompt template {name!r}; {hint}"
    raise ExportError(msg)
