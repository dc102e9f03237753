"""`vlmport export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"],
        typer.Option(
            help="Element type of weights and computation. ONNX Runtime on a CPU has no bf16."
        ),
    ] = "fp32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle.")] = False,
    family_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A Python file with one more family of models. Its code is run."
        ),
    ] = None,
    mask_decoder: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights (.npz) that turn segmentation answers into masks; one more graph.",
        ),
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Form of prompts that the model was trained on; else it follows from the "
            "checkpoint. An unknown name lists those that there are.",
        ),
    ] = None,
) -> None:
    """Turn a [bold]checkpoint[/bold] into a [bold]bundle[/bold] of ONNX graphs.

    Weights are streamed from the checkpoint's safetensors into the graphs,
    so little memory is needed. Whatever fails leaves nothing behind.

    [dim]$[/dim] vlmport export [cyan]checkpoint/ bundle/[/cyan] --max-length 2048
    """
    from vlmport.api.export import ExportOptions, export

    options = ExportOptions(
        checkpoint,
        bundle,
        max_length=max_length,
        overwrite=overwrite,
        family_file=family_file,
        mask_decoder=mask_decoder,
        prompt_template=prompt_template,
        precision=precision,
    )
    with RichProgress() as progress:
        report = export(options, progress)
    size = sum(entry.size for entry in report.manifest.files)
    typer.echo(f"{report.bundle}: {report.manifest.variant}, {report.manifest.precision}")
    for graph in report.manifest.graphs:
        typer.echo(f"  {graph.file:<24} {graph.parameter_bytes / 1e6:>10.1f} MB of weights")
    typer.echo(f"  {'all files':<24} {size / 1e6:>10.1f} MB, written in {report.seconds:.1f} s")
