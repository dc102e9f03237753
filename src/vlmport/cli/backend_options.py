"""The options that choose what computes a bundle; several commands have them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmport.backend_names import BACKENDS, DEFAULT_BACKEND

__all__ = ["DEFAULT_BACKEND", "BackendOption", "EnginesOption"]

BackendOption = Annotated[
    str,
    typer.Option(
        "--backend", metavar="NAME", help=f"What computes the bundle: {', '.join(BACKENDS)}."
    ),
]
EnginesOption = Annotated[
    Path | None,
    typer.Option(
        "--engines",
        metavar="FOLDER",
        help="TensorRT engines of `vlmport build`; else those below BUNDLE.",
    ),
]
