"""`vlmport build`: a bundle becomes TensorRT engines."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlmport.cli.progress import RichProgress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.build import BuildReport
    from vlmport.api.explain_report import GraphExplanation
    from vlmport.api.memory_plan import MemoryPlan
    from vlmport.contract_engines import Engine

__all__ = ["build_command"]

_SHAPES, _ENGINES, _WORK = "What requests may hold", "What engines are", "The build itself"
_MEMORY = "Memory of the GPU"


def build_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Its folder.")],
    backend: Annotated[
        Literal["tensorrt", "tensorrt-rtx"],
        typer.Option(help="tensorrt-rtx needs no GPU to build; tensorrt builds for the one here."),
    ] = "tensorrt-rtx",
    max_batch: Annotated[
        int | None,
        typer.Option(metavar="N", rich_help_panel=_SHAPES, help="Most requests at a time; else 4."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_SHAPES,
            help="Most tokens of a sequence; else the bundle's, at most 4096.",
        ),
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_SHAPES,
            help="Tokens of a prompt that run at once; else 512, or all where they must.",
        ),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option(
            metavar="N", rich_help_panel=_SHAPES, help="Pictures or tiles at once; else 4."
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X.Y",
            rich_help_panel=_ENGINES,
            help="A GPU to build for; repeat it for more. Else every one from 8.0 on.",
        ),
    ] = None,
    masking: Annotated[
        Literal["lengths", "mask"],
        typer.Option(rich_help_panel=_ENGINES, help="How attention learns which keys are valid."),
    ] = "lengths",
    refit: Annotated[
        bool,
        typer.Option("--refit", rich_help_panel=_ENGINES, help="Weights can be replaced later."),
    ] = False,
    strip_weights: Annotated[
        bool,
        typer.Option(
            "--strip-weights", rich_help_panel=_ENGINES, help="Leave the weights in the bundle."
        ),
    ] = False,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_WORK, help="Measurements to read and to add to."
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            metavar="N",
            rich_help_panel=_WORK,
            help="Engines that are built at the same time, each with its weights in memory.",
        ),
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where they go; else BUNDLE/engines/..."),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", rich_help_panel=_MEMORY, help="Say what they will need, and build nothing."
        ),
    ] = False,
    device_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            rich_help_panel=_MEMORY,
            help="Memory of the GPU that they are for; else what is free on the one here.",
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show each layer with its ONNX nodes, PyTorch modules and precision; with a GPU "
            "also what is fused, and the kernels.",
        ),
    ] = False,
    inspector_json: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="With --explain: what the engine inspector said elsewhere, named after its graph "
            "(decoder.json); repeat it for more.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Build TensorRT engines of a [bold]bundle[/bold].

    Engines that are there and unchanged are taken over. Whatever fails
    leaves nothing behind. Engines that the GPU has no room for are refused
    before they are built, with what would fit.

    [dim]$[/dim] vlmport build [cyan]bundle/[/cyan] --max-length 2048
    """
    if inspector_json and not explain:
        raise typer.BadParameter(
            "it explains nothing without --explain", param_hint="--inspector-json"
        )
    if plan and explain:
        raise typer.BadParameter(
            "it explains engines, of which --plan builds none", param_hint="--explain"
        )
    from vlmport.api.build import build
    from vlmport.api.build_options import build_options
    from vlmport.api.memory_advice import available_memory, plan_memory
    from vlmport.api.memory_plan import check_fits
    from vlmport.manifest import load_manifest

    inspected = _inspected(bundle, inspector_json or [])

    options = build_options(
        load_manifest(bundle),
        backend,
        max_batch=max_batch,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
        max_images=max_images,
        compute_capabilities=compute_capability or (),
        masking=masking,
        refit=refit,
        strip_weights=strip_weights,
    )
    available = available_memory(device_memory)
    if plan:
        _plan(plan_memory(bundle, options, available), as_json=as_json)
        return
    if available is not None:
        check_fits(plan_memory(bundle, options, available))
    with RichProgress() as progress:
        report = build(bundle, options, progress, output, timing_cache=timing_cache, jobs=jobs)
    for remark in report.remarks:
        typer.echo(f"note: {remark}", err=True)
    graphs = _explained(bundle, report, inspected) if explain else ()
    if as_json:
        content: dict[str, Any] = {"folder": str(report.folder), "seconds": report.seconds}
        content |= {"reused": report.reused, **asdict(report.engines)}
        if explain:
            from vlmport.api.explain_report import explanation_json

            content["explanation"] = explanation_json(graphs)
        typer.echo(json.dumps(content))
        return
    _show(report)
    _show_explained(graphs)


def _inspected(bundle: Path, files: list[Path]) -> dict[str, str]:
    """Read before anything is built: a file that cannot be used is told at once."""
    if not files:
        return {}
    from vlmport.api.explain_engines import check_inspector_files

    return check_inspector_files(bundle, files)


def _explained(
    bundle: Path, report: BuildReport, inspected: dict[str, str]
) -> tuple[GraphExplanation, ...]:
    from vlmport.api.explain_engines import explain_engines

    return explain_engines(bundle, report, inspected)


def _show_explained(graphs: Sequence[GraphExplanation]) -> None:
    if not graphs:
        return
    from rich.console import Console

    from vlmport.api.explain_report import print_explanations

    # Without a terminal rich assumes 80 columns, which would cut names off in a log.
    print_explanations(graphs, Console(width=None if sys.stdout.isatty() else 160))


def _plan(plan: MemoryPlan, *, as_json: bool) -> None:
    from rich.console import Console

    from vlmport.api.memory_plan import check_fits, memory_plan_json
    from vlmport.api.memory_render import print_memory_plan

    if as_json:
        typer.echo(memory_plan_json(plan))
    else:
        print_memory_plan(plan, Console(width=None if sys.stdout.isatty() else 120))
    check_fits(plan)


def _show(report: BuildReport) -> None:
    engines = report.engines
    device = f", {engines.device}" if engines.device else ""
    name = f"{engines.options.backend} {engines.version}"
    typer.echo(f"{report.folder}: {name}, {engines.capability}{device}")
    for engine in engines.engines:
        took = "unchanged" if engine.graph in report.reused else f"{engine.build_seconds:.1f} s"
        size = f"{engine.size / 1e6:>9.1f} MB"
        typer.echo(f"  {engine.graph:<16} {size} {took:>9}  {_attention(engine)}".rstrip())
        for reason in sorted({layer.reason for layer in engine.attention if layer.reason}):
            typer.echo(f"    decomposed: {reason}")
        for warning in engine.warnings:
            typer.echo(f"    TensorRT: {warning}")
    typer.echo(f"  in {report.seconds:.1f} s")


def _attention(engine: Engine) -> str:
    if not engine.attention:
        return ""
    fused = sum(layer.fused for layer in engine.attention)
    maskings: set[str] = {layer.masking for layer in engine.attention}
    if any(layer.lengths for layer in engine.attention):
        maskings.add("valid lengths")
    return (
        f"attention: {fused} fused, {len(engine.attention) - fused} decomposed; "
        f"mask: {', '.join(sorted(maskings - {'none'})) or 'none'}"
    )
