"""How the models of a repository are called."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlmport.errors import InputError

__all__ = ["FEATURES", "MAIN", "PREPROCESS", "ModelNames"]

MAIN = "vlm"
PREPROCESS = "preprocess"
FEATURES = "features"
# A folder's name that is also a part of an address (/v2/models/NAME/generate) as it is.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class ModelNames:
    """The names of one repository's models.

    Attributes:
        name: of the main model, in front of the others' names; None for "vlm" and no such prefix.

    Raises:
        InputError: if it cannot be a model's name.
    """

    name: str | None = None

    def __post_init__(self) -> None:
        """Checks the name."""
        if self.name is not None and not _NAME.fullmatch(self.name):
            msg = (
                f"name: found {self.name!r}; expected at most 128 letters, digits, '_', '-' or "
                "'.', the first a letter, a digit or '_', as it is a folder's name and a part of "
                "addresses; choose another one"
            )
            raise InputError(msg)

    @property
    def main(self) -> str:
        """The model that answers."""
        return self.name or MAIN

    def of(self, part: str) -> str:
        """The model of a graph, of the preprocessing or of the ensemble."""
        return part if self.name is None else f"{self.name}_{part}"
