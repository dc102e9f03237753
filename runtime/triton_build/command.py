"""The command line of a repository's build_engines.py."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vlmport.errors import VlmportError
from vlmport.runtime.triton_build.building import build_engines, check_engines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["main"]


def main(home: Path, arguments: Sequence[str] | None = None) -> int:
    """Builds or checks the engines.

    Args:
        home: the main model's version folder.
        arguments: of the command line; None for those of the process.

    Returns:
        0 if engines that run here are there; 1 with a message if not, 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="build_engines.py",
        description="Builds the TensorRT engines of this model repository with the TensorRT and on "
        "the GPU of this container; does nothing if they are there.",
    )
    parser.add_argument("--check", action="store_true", help="Build nothing; say what is missing.")
    parser.add_argument(
        "--backend",
        choices=("tensorrt", "tensorrt-rtx"),
        default="tensorrt",
        help="tensorrt-rtx builds without a GPU what Triton's tensorrt backend cannot run; it "
        "proves that the graphs build.",
    )
    options = parser.parse_args(arguments)
    try:
        if options.check:
            check_engines(home, options.backend)
        else:
            build_engines(home, options.backend, tell=lambda line: print(line, flush=True))
    except VlmportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
