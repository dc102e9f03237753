"""`vlmport inspect`: what is in a bundle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmport.contract import IMAGE_GRAPHS, MASK_DECODER

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vlmport.api.inspect import Inspection
    from vlmport.contract import GraphSpec, ImageTokens, Manifest, TensorSpec

__all__ = ["inspect_command"]


def inspect_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Its folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a bundle's graphs, sizes, cache, preprocessing and origin.

    Reads the manifest alone, so it is quick however large the bundle is.

    [dim]$[/dim] vlmport inspect [cyan]bundle/[/cyan]
    """
    from rich.console import Console

    from vlmport.api.inspect import inspect, inspection_json

    inspection = inspect(bundle)
    if as_json:
        typer.echo(inspection_json(inspection))
        return
    console = Console(highlight=False)
    console.print(_table(list(_facts(inspection).items()), indent=0))
    for graph in inspection.manifest.graphs:
        weights = f"{_bytes(graph.parameter_bytes)} of weights"
        console.print(f"\n[bold]{graph.name}[/bold]: {graph.file}, opset {graph.opset}, {weights}")
        console.print(_table(_graph_rows(graph), indent=2))


def _table(rows: list[tuple[str, str]], *, indent: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(" " * indent + name, "bold"), Text(value))
    return table


def _facts(inspection: Inspection) -> dict[str, str]:
    from vlmport.api.inspect import image_steps

    manifest = inspection.manifest
    sizes, cache, tokens = manifest.dimensions, manifest.kv_layout, manifest.special_tokens
    source_bytes = sum(entry.size for entry in manifest.source.files)
    return {
        "bundle": f"{inspection.bundle}, {_bytes(inspection.file_bytes)} in all files",
        "model": f"{manifest.family}: {manifest.variant}, {manifest.precision}",
        "source": f"{manifest.source.name} ({manifest.source.layout}), {_bytes(source_bytes)}",
        "quantized": _quantized(manifest),
        "sizes": f"hidden {sizes.hidden_size}, vocabulary {sizes.vocab_size}, "
        f"{_image_tokens(manifest.prompt.image_tokens)}, at most {sizes.max_length} tokens",
        "weights": _bytes(inspection.parameter_bytes),
        "KV cache": f"{cache.num_layers} layers x {cache.num_kv_heads} heads x {cache.head_dim}, "
        f"{cache.dtype}: {_bytes(inspection.kv_bytes_per_token)} a token, "
        f"{_bytes(inspection.kv_bytes_at_max_length)} at {sizes.max_length} tokens",
        "image graphs": _image_graphs(manifest),
        "images": " > ".join(image_steps(manifest.image)),
        "prompt": f"placeholder {manifest.prompt.image_placeholder!r}, "
        f"tokenized as {manifest.prompt.tokenization}; "
        f"{len(manifest.prompt.chat_template)} characters of template (--json shows it)",
        "tokens": f"bos {tokens.bos_token!r} ({tokens.bos_token_id}), "
        f"eos {tokens.eos_token!r} {list(tokens.eos_token_ids)}, image {tokens.image_token_id}",
        "generation": f"at most {manifest.generation.max_new_tokens} new tokens, "
        f"stop strings {list(manifest.generation.stop_strings)}",
        "answers": _answers(manifest),
        "made with": ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items()),
    }


def _image_tokens(form: ImageTokens) -> str:
    if form.kind == "rows":
        return f"{form.count} token a patch and {form.after!r} a row"
    return f"{form.count} tokens an image"


def _image_graphs(manifest: Manifest) -> str:
    absent = [name for name in IMAGE_GRAPHS if name not in manifest.image_graphs]
    note = f" (no {', '.join(absent)} graph)" if absent else ""
    return " > ".join(manifest.image_graphs) + note


def _quantized(manifest: Manifest) -> str:
    quantization = manifest.quantization
    if quantization is None:
        return "no"
    graphs = (
        f"{graph.graph} ({graph.compute}; "
        + ", ".join(f"{count} {name}" for name, count in graph.layers.items())
        + ")"
        for graph in quantization.graphs
    )
    data = f"; {quantization.samples} samples of {quantization.calibration}"
    return f"{quantization.name}: {', '.join(graphs)}{data if quantization.samples else ''}"


def _answers(manifest: Manifest) -> str:
    if manifest.answers.kind == "text":
        return "text"
    if manifest.answers.kind == "coordinate_tokens":
        return "text, boxes and points by coordinate tokens"
    has_masks = manifest.has_graph(MASK_DECODER)
    masks = f"masks by the graph {MASK_DECODER}" if has_masks else "no masks"
    return f"text, regions by location tokens, {masks}"


def _graph_rows(graph: GraphSpec) -> list[tuple[str, str]]:
    most_first = sorted(graph.operators.items(), key=lambda pair: (-pair[1], pair[0]))
    return [
        ("inputs", _ports(graph.inputs)),
        ("outputs", _ports(graph.outputs)),
        ("operators", ", ".join(f"{operator}:{count}" for operator, count in most_first)),
    ]


def _ports(specs: tuple[TensorSpec, ...]) -> str:
    """One line a tensor; tensors that differ only in the number of their layer share a line."""
    layers: dict[tuple[str, str, str], list[int]] = {}
    for spec in specs:
        form = f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"
        numbered = re.fullmatch(r"(.+\.)(\d+)(\..+)", spec.name)
        head, number, tail = numbered.groups() if numbered else (spec.name, "-1", "")
        layers.setdefault((head, tail, form), []).append(int(number))
    return "\n".join(
        f"{head}{_span(numbers)}{tail} {form}" for (head, tail, form), numbers in layers.items()
    )


def _span(numbers: list[int]) -> str:
    """[0, 1, 2] -> "{0..2}", one number as it is, and [-1], no number, as nothing."""
    if len(numbers) > 1:
        return f"{{{min(numbers)}..{max(numbers)}}}"
    return str(numbers[0]) if numbers[0] >= 0 else ""


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
