"""Adds `optimum-cli export vlmport`: optimum-cli reads REGISTER_COMMANDS of every file beside it.

`optimum` and the folders below it are namespace packages (PEP 420) that several distributions fill;
an __init__.py in one of them would hide the others. Without optimum this file is never imported.
"""

from __future__ import annotations

from optimum.commands.export.base import ExportCommand

from vlmport.cli.optimum import OptimumExportCommand

__all__ = ["REGISTER_COMMANDS"]

REGISTER_COMMANDS = [(OptimumExportCommand, ExportCommand)]
