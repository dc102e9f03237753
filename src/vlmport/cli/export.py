"""`vlmport export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmport.cli.progress import RichProgress

__all__ = ["export_command"]


def export_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Its folder.")],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder to write.")],
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most tokens, of text and images, in one sequence; else what the model supports.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle.")] = False,
    mask_decoder: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights (.npz) that turn segmentation answers into masks; one more graph.",
        ),
    ] = None,
) -> None:
    """Turn a [bold]checkpoint[/bold] into a [bold]bundle[/bold] of ONNX graphs.

    Weights are streamed from the checkpoint's safetensors into the graphs,
    so little memory is needed. Whatever fails leaves nothing behind.

    [dim]$[/dim] vlmport export [cyan]checkpoint/ bundle/[/cyan] --max-length 2048
    """
    from vlmport.api.export import ExportOptions, export

    options = ExportOptions(checkpoint, bundle, max_length, overwrite, mask_decoder)
    with RichProgress() as progress:
        report = export(options, progress)
    size = sum(entry.size for entry in report.manifest.files)
    typer.echo(f"{report.bundle}: {report.manifest.variant}")
    for graph in report.manifest.graphs:
        typer.echo(f"  {graph.file:<24} {graph.parameter_bytes / 1e6:>10.1f} MB of weights")
    typer.echo(f"  {'all files':<24} {size / 1e6:>10.1f} MB, written in {report.seconds:.1f} s")
