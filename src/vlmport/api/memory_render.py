"""Shows a memory plan on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from vlmport.api.memory_plan import in_gib

if TYPE_CHECKING:
    from rich.console import Console

    from vlmport.api.memory_plan import MemoryPlan

__all__ = ["print_memory_plan"]


def print_memory_plan(plan: MemoryPlan, console: Console) -> None:
    """Prints what each engine needs, then the sum and what the GPU has."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("engine", "profile"):
        table.add_column(heading, no_wrap=True)
    for heading in ("weights", "activations, at most", "of them attention scores"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("most is alive at", overflow="fold")
    for graph in plan.graphs:
        for place, one in enumerate(graph.profiles):
            first = place == 0
            table.add_row(
                graph.graph if first else "",
                one.name,
                in_gib(graph.weight_bytes) if first else "",
                in_gib(one.size),
                in_gib(one.score_bytes) if one.score_bytes else "",
                Text(one.at),
            )
    console.print(table)
    for line in _sum(plan):
        console.print(Text(line), soft_wrap=True)


def _sum(plan: MemoryPlan) -> list[str]:
    options = plan.options
    cache = (
        f"{plan.cache_bytes_per_token} bytes a token, max_batch {options.max_batch} x max_length "
        f"{options.max_length}"
    )
    estimate = "an upper estimate: nothing is fused; engines take turns in one block"
    rest = "the CUDA context and the engines' kernels come on top"
    lines = [
        f"weights       {in_gib(plan.weight_bytes)} ({plan.precision})",
        f"cache         {in_gib(plan.cache_bytes)} ({cache})",
        f"activations   {in_gib(plan.activation_bytes)} ({estimate})",
        f"buffers       {in_gib(plan.buffer_bytes)} (logits, embeddings, choosing tokens)",
        f"in all        {in_gib(plan.total_bytes)}; {rest}",
    ]
    if plan.available is None:
        return [*lines, "GPU           none at hand; say its memory with --device-memory GIB"]
    words = "fits" if plan.fits else "does not fit"
    return [*lines, f"GPU           {in_gib(plan.available.size)} {plan.available.source}: {words}"]
