"""The command `vlmport`: registers the verbs and turns errors into messages and exit codes.

Exit codes: 0 done, 1 an error with a message (or a parity verdict of FAIL), 2 wrong usage of the
command line, 130 interrupted. Results go to stdout; progress and errors to stderr.
"""

from __future__ import annotations

import errno
import sys
from typing import Annotated, NoReturn

import typer

import vlmport
from vlmport.api.extras import missing_module_message
from vlmport.cli.bench import bench_command
from vlmport.cli.build import build_command
from vlmport.cli.client import client_command
from vlmport.cli.doctor import doctor_command
from vlmport.cli.evaluate import evaluate_command
from vlmport.cli.export import export_command
from vlmport.cli.generate import generate_command
from vlmport.cli.inspect import inspect_command
from vlmport.cli.load import load_command
from vlmport.cli.parity import parity_command
from vlmport.cli.quantize import quantize_command
from vlmport.cli.triton import triton_command
from vlmport.errors import VlmportError

__all__ = ["app", "main"]

_OVERVIEW = """
Export vision-language models to ONNX and run them exactly as PyTorch does.

A [bold]checkpoint[/bold] becomes a [bold]bundle[/bold]: a folder of ONNX graphs, weights, tokenizer
and a manifest. A bundle answers questions about pictures without PyTorch.

[dim]$[/dim] vlmport export [cyan]checkpoint/ bundle/[/cyan]
[dim]$[/dim] vlmport parity [cyan]checkpoint/ bundle/[/cyan]
[dim]$[/dim] vlmport generate [cyan]bundle/[/cyan] --image photo.jpg --prompt "What is this?"
"""

# What the machine or the user can put right; any other OSError is a fault of ours and keeps its
# traceback.
_OUTSIDE_FAULTS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EMFILE,
    errno.ENOMEM,
)

app = typer.Typer(
    name="vlmport",
    help=_OVERVIEW,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("export", rich_help_panel="From a checkpoint")(export_command)
app.command("parity", rich_help_panel="From a checkpoint")(parity_command)
app.command("quantize", rich_help_panel="With a bundle")(quantize_command)
app.command("build", rich_help_panel="With a bundle")(build_command)
app.command("triton", rich_help_panel="With a bundle")(triton_command)
app.command("generate", rich_help_panel="With a bundle")(generate_command)
app.command("evaluate", rich_help_panel="With a bundle")(evaluate_command)
app.command("bench", rich_help_panel="With a bundle")(bench_command)
app.command("inspect", rich_help_panel="With a bundle")(inspect_command)
app.command("client", rich_help_panel="With a server")(client_command)
app.command("load", rich_help_panel="With a server")(load_command)
app.command("doctor", rich_help_panel="This machine")(doctor_command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: the verb and what follows it; None for those of the process.
    """
    try:
        app(args=arguments)
    except VlmportError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        message = missing_module_message(error.name)
        if message is None:
            raise
        _fail(message)
    except MemoryError:
        _fail("not enough memory for this; close other programs or use a smaller --max-length")
    except OSError as error:
        if error.errno not in _OUTSIDE_FAULTS:
            raise
        _fail(f"{error.filename or 'input/output'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(message, err=True)
    sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlmport {vlmport.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[  # read by its callback
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options before the verb; the help text of the app is its own."""
