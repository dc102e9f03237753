"""`vlmport build`: a bundle becomes TensorRT engines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlmport.cli.progress import RichProgress

if TYPE_CHECKING:
    from vlmport.api.build import BuildReport
    from vlmport.contract_engines import Engine

__all__ = ["build_command"]

_SHAPES, _ENGINES, _WORK = "What requests may hold", "What engines are", "The build itself"


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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Build TensorRT engines of a [bold]bundle[/bold].

    Engines that are there and unchanged are taken over. Whatever fails
    leaves nothing behind.

    [dim]$[/dim] vlmport build [cyan]bundle/[/cyan] --max-length 2048
    """
    from vlmport.api.build import build
    from vlmport.api.build_options import build_options
    from vlmport.manifest import load_manifest

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
    with RichProgress() as progress:
        report = build(bundle, options, progress, output, timing_cache=timing_cache, jobs=jobs)
    for remark in report.remarks:
        typer.echo(f"note: {remark}", err=True)
    if as_json:
        content = {"folder": str(report.folder), "seconds": report.seconds}
        typer.echo(json.dumps({**content, "reused": report.reused, **asdict(report.engines)}))
        return
    _show(report)


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
    maskings = sorted({layer.masking for layer in engine.attention})
    return (
        f"attention: {fused} fused, {len(engine.attention) - fused} decomposed; "
        f"mask: {', '.join(maskings)}"
    )
