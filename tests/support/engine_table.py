"""The tables of engines and attention kernels that a test run prints at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmport.contract_engines import EngineSet

__all__ = [
    "ENGINE_ROWS",
    "KERNEL_ROWS",
    "EngineRow",
    "KernelRow",
    "engine_row",
    "engine_table",
    "kernel_table",
]


@dataclass(frozen=True, slots=True)
class EngineRow:
    """All engines of one bundle.

    Attributes:
        family: name of the family.
        variant: precision of the bundle.
        engines: how many.
        megabytes: of all engines.
        seconds: of building them.
        fused: attention layers with one kernel.
        decomposed: attention layers without.
        masks: kinds of masks of the attention layers.
    """

    family: str
    variant: str
    engines: int
    megabytes: float
    seconds: float
    fused: int
    decomposed: int
    masks: str


@dataclass(frozen=True, slots=True)
class KernelRow:
    """Which attention of one head dimension TensorRT has a kernel for.

    Attributes:
        dtype: of queries, keys and values.
        head_dim: length of one head.
        found: kind of mask -> "fused", or why not.
    """

    dtype: str
    head_dim: int
    found: tuple[tuple[str, str], ...]


# Filled while tests run; conftest prints them.
ENGINE_ROWS: list[EngineRow] = []
KERNEL_ROWS: list[KernelRow] = []


def engine_row(family: str, variant: str, built: EngineSet) -> EngineRow:
    layers = [layer for engine in built.engines for layer in engine.attention]
    fused = sum(layer.fused for layer in layers)
    return EngineRow(
        family,
        variant,
        len(built.engines),
        sum(engine.size for engine in built.engines) / 1e6,
        sum(engine.build_seconds for engine in built.engines),
        fused,
        len(layers) - fused,
        ", ".join(sorted({layer.masking for layer in layers})),
    )


def engine_table(rows: Sequence[EngineRow]) -> list[str]:
    """The rows as lines of text."""
    head = f"{'family':10} {'bundle':16} engines      MB      s  fused decomposed  masks"
    lines = [
        f"{row.family:10} {row.variant:16} {row.engines:7} {row.megabytes:7.1f} {row.seconds:6.1f}"
        f"  {row.fused:5} {row.decomposed:10}  {row.masks}"
        for row in sorted(rows, key=lambda row: (row.family, row.variant))
    ]
    return [head, *lines]


def kernel_table(rows: Sequence[KernelRow]) -> list[str]:
    """The rows as lines of text."""
    lines = []
    for row in sorted(rows, key=lambda row: (row.dtype, row.head_dim)):
        found = "  ".join(f"{kind}: {what}" for kind, what in row.found)
        lines.append(f"{row.dtype:6} head_dim {row.head_dim:3}  {found}")
    return lines
