"""`vlmport triton`: a bundle becomes a model repository of Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmport.cli.progress import RichProgress

__all__ = ["triton_command"]


def triton_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Its folder.")],
    repository: Annotated[Path, typer.Argument(metavar="REPOSITORY", help="Folder to write.")],
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What runs the image graphs: python (ONNX Runtime in Python models, on any "
            "server), onnxruntime or tensorrt (Triton's own, in the vendor's container).",
        ),
    ] = "python",
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the main model, and in front of the others' names; else vlm and no prefix.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|gpu", help="Where graphs run; else cpu for python, gpu for the others."
        ),
    ] = None,
    instances: Annotated[
        int,
        typer.Option(
            metavar="N", help="Copies of each model but the main one, which batches in one."
        ),
    ] = 1,
    max_batch: Annotated[
        int,
        typer.Option(
            metavar="N", help="Requests decoded together, and pictures in one call of a graph."
        ),
    ] = 8,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a repository that vlmport wrote.")
    ] = False,
) -> None:
    """Write a model repository of a [bold]bundle[/bold] for Triton Inference Server.

    It has everything inside and may be moved; its README.md says how to
    start a server and how to ask it. Whatever fails leaves nothing behind.

    [dim]$[/dim] vlmport triton [cyan]bundle/ repository/[/cyan] --backend python
    """
    from vlmport.api.triton import TritonOptions, write_repository

    options = TritonOptions(
        bundle,
        repository,
        backend=backend,
        name=name,
        device=device,
        instances=instances,
        max_batch=max_batch,
        overwrite=overwrite,
    )
    with RichProgress() as progress:
        report = write_repository(options, progress)
    typer.echo(f"{report.repository}: {len(report.models)} models")
    for model, platform, batch in report.models:
        typer.echo(
            f"  {model:<32} {platform:<12} {f'batch {batch}' if batch else 'one by one':>10}"
        )
    typer.echo(f"  {report.size / 1e6:.1f} MB, written in {report.seconds:.1f} s")
    if report.needs_engines:
        typer.echo(f"next, where the server will run: {report.repository}/build_engines.sh")
