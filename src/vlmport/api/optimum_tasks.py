"""Registers the families' model types with optimum's TasksManager."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["EXPORTER", "TASK", "BundleExporterConfig", "register_families"]

EXPORTER = "vlmport"
TASK = "image-text-to-text"


@dataclass(frozen=True, slots=True)
class BundleExporterConfig:
    """What TasksManager returns for a model type that vlmport exports.

    It says that there is an export, and describes no inputs as other exporters' configs do: a
    bundle has several graphs, whose inputs the family reads off the checkpoint.

    Attributes:
        config: the model's config.
        task: the task that was asked for.
    """

    config: PretrainedConfig
    task: str


def register_families() -> tuple[str, ...]:
    """Registers every model type of every family that is found, those from outside included.

    Returns:
        The model types.
    """
    # Both take seconds to import.
    from optimum.exporters.tasks import TasksManager

    from vlmport.export.family import discover_families

    # Its annotations say that it takes the tasks as one tuple; it takes them one by one.
    register: Any = TasksManager.create_register(EXPORTER, overwrite_existing=True)
    model_types = tuple(sorted(discover_families().entries))
    for model_type in model_types:
        register(model_type, TASK)(BundleExporterConfig)
    return model_types
