"""`optimum-cli export vlmport`: the command `vlmport export` on optimum's command line.

optimum-cli imports this module at every start, so it imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import typer
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from vlmport.cli.main import app, main

if TYPE_CHECKING:
    from argparse import ArgumentParser

__all__ = ["OptimumExportCommand"]


class OptimumExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """Hands its arguments to `vlmport export`, whose options it has, and ends as that ends.

    optimum names the source --model, so that one argument is called differently.
    """

    COMMAND = CommandInfo(
        name="vlmport", help="Export a vision-language model to ONNX graphs that vlmport runs."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Adds the arguments; their values are checked by vlmport."""
        parser.add_argument(
            *("-m", "--model"), required=True, metavar="CHECKPOINT", help="Its folder."
        )
        parser.add_argument("bundle", metavar="BUNDLE", help="Folder to write.")
        for option in _export_options():
            form: dict[str, Any] = {"action": "store_true"} if option.is_flag else {}
            if option.metavar:
                form["metavar"] = option.metavar
            help_text = option.help.replace("%", "%%")
            parser.add_argument(option.opts[0], dest=option.name, help=help_text, **form)

    def run(self) -> None:
        """Exports, and ends the process with vlmport's exit code."""
        given = vars(self.args)
        options = []
        for option in _export_options():
            value = given[option.name]
            if option.is_flag:
                options += [option.opts[0]] * bool(value)
            elif value is not None:
                options.append(f"{option.opts[0]}={value}")
        main(["export", *options, "--", given["model"], given["bundle"]])


def _export_options() -> list[Any]:
    """The options of `vlmport export`, as typer made them of the function's signature.

    They are read from there so that a new option cannot be forgotten here.
    """
    command = cast("Any", typer.main.get_command(app)).commands["export"]
    return [option for option in command.params if option.param_type_name == "option"]
