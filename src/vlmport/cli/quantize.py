"""`vlmport quantize`: a bundle becomes one of lower precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlmport.cli.progress import RichProgress

if TYPE_CHECKING:
    from vlmport.api.float_budget import BudgetReport
    from vlmport.api.quantize_report import QuantizeReport
    from vlmport.calibration.default_recipes import TargetPrecision

__all__ = ["quantize_command"]

_Precision = Literal["fp16", "bf16", "int8", "int8-weight-only", "int4"]
_GraphPrecision = Literal["float", "fp16", "bf16", "int8", "int8-weight-only", "int4"]
_ONE_GRAPH = "One graph"
_AUTO_BUDGET = 1.0  # percent


def quantize_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that was exported.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    precision: Annotated[
        _Precision | None, typer.Option(help="Of every graph that is not named below.")
    ] = None,
    vision_encoder: Annotated[
        _GraphPrecision | None, typer.Option(help="Its own.", rich_help_panel=_ONE_GRAPH)
    ] = None,
    projector: Annotated[
        _GraphPrecision | None, typer.Option(help="Its own.", rich_help_panel=_ONE_GRAPH)
    ] = None,
    decoder: Annotated[
        _GraphPrecision | None, typer.Option(help="Its own.", rich_help_panel=_ONE_GRAPH)
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A folder of pictures, or JSON lines with image and prompt; else a default set.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Most of them to run; else all.")
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keeps the calibration; a stopped one goes on where it was."
        ),
    ] = None,
    rounding: Annotated[
        Literal["nearest", "awq", "gptq", "awq+gptq"],
        typer.Option(help="Of INT4 weights."),
    ] = "gptq",
    block_size: Annotated[
        Literal["32", "64", "128"], typer.Option(help="INT4 weights that share a scale.")
    ] = "32",
    observer: Annotated[
        Literal["min_max", "percentile", "entropy", "mse"],
        typer.Option(help="How INT8 activations get their range."),
    ] = "min_max",
    smoothing: Annotated[
        float,
        typer.Option(
            min=-1,
            max=1,
            help="SmoothQuant's alpha, for INT8 activations: 0 to 1, or -1 for none.",
        ),
    ] = 0.8,
    kv_cache: Annotated[
        Literal["keep", "fp16"],
        typer.Option(help="Element type of keys and values of a decoder that computes in float32."),
    ] = "keep",
    keep_float: Annotated[
        str | None,
        typer.Option(
            metavar="auto|FILE",
            help="Patterns of modules that stay in float, one a line; auto finds them.",
        ),
    ] = None,
    accuracy_budget: Annotated[
        float | None,
        typer.Option(
            metavar="PCT",
            help="Keep as few layers in float as it takes for this share of next tokens to be the "
            "only ones that change; 1 if --keep-float auto is given alone.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A recipe in JSON in place of the options above."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Turn a [bold]bundle[/bold] into one of lower precision.

    Runs calibration data through the bundle, then rounds weights (INT4,
    INT8), weights and activations (INT8), or converts the graphs (FP16,
    BF16) where their values allow it. Whatever fails leaves nothing behind.

    [dim]$[/dim] vlmport quantize [cyan]bundle/ bundle-int8/[/cyan] --precision int8
    """
    from vlmport.api.quantize import QuantizeOptions, quantize
    from vlmport.api.quantize_recipe import RecipeOptions
    from vlmport.calibration.recipe import ActivationMethod, WeightMethod

    named: dict[str, TargetPrecision | None] = {
        "vision_encoder": vision_encoder,
        "projector": projector,
        "decoder": decoder,
    }
    if keep_float == "auto" and accuracy_budget is None:
        accuracy_budget = _AUTO_BUDGET
    options = QuantizeOptions(
        bundle,
        out,
        RecipeOptions(
            precision,
            tuple((graph, wanted) for graph, wanted in named.items() if wanted is not None),
            WeightMethod(rounding, int(block_size)),  # type: ignore[arg-type]  # one of the choices
            ActivationMethod(observer, smoothing=None if smoothing < 0 else smoothing),
            kv_cache,
            recipe,
        ),
        calibration=calibration,
        max_samples=samples,
        state_file=statistics,
        keep_float=None if keep_float in (None, "auto") else Path(keep_float),
        accuracy_budget=_AUTO_BUDGET
        if keep_float == "auto" and not accuracy_budget
        else accuracy_budget,
        overwrite=overwrite,
    )
    with RichProgress() as progress:
        report = quantize(options, progress)
    _show(report)


def _show(report: QuantizeReport) -> None:
    assert report.manifest.quantization is not None
    before = {graph.name: graph.parameter_bytes for graph in report.source.graphs}
    typer.echo(f"{report.bundle}: {report.manifest.quantization.name}")
    changed = {graph.graph: graph for graph in report.graphs}
    for graph in report.manifest.graphs:
        share = graph.parameter_bytes / before[graph.name] if before[graph.name] else 1.0
        what = "unchanged"
        if (found := changed.get(graph.name)) is not None:
            counts = ", ".join(f"{count} {name}" for name, count in found.counts.items())
            compute = "" if found.compute == "keep" else f"; {found.compute}"
            what = f"layers: {counts or 'none'}{compute}"
        size = f"{graph.parameter_bytes / 1e6:>8.1f} MB ({share:>6.1%})"
        typer.echo(f"  {graph.file:<22} {size}  {what}")
    if report.budget is not None:
        _show_budget(report.budget)
    typer.echo(f"  written in {report.seconds:.1f} s")


def _show_budget(report: BudgetReport) -> None:
    budget = report.budget
    typer.echo(
        f"  {budget.lost_percent:.2f} % of next tokens change (budget {budget.budget_percent:g} %) "
        f"with {len(budget.kept)} of {len(report.ranking)} groups of layers in float; most harmful:"
    )
    for damage in report.ranking[:10]:
        kept = "kept in float" if damage.group in budget.kept else ""
        kl = "not finite" if damage.kl_mean is None else f"{damage.kl_mean:.2e}"
        typer.echo(f"    {damage.group.name:<60} KL {kl:<10} {kept}")
