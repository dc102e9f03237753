"""What preprocessing makes of one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ImageLayout", "PreparedImage"]


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """How an image lies in the prompt.

    Attributes:
        tiles: pieces that the picture was cut into; 1 if it was not cut.
        rows: rows of patches of one tile.
        columns: patches of a row.
        scale: height of the resized picture over that of the user's; boxes and points of the prompt
            follow it.
    """

    tiles: int
    rows: int
    columns: int
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """One picture as the first image graph takes it.

    Attributes:
        inputs: graph input name -> array; the leading axis counts tiles, or patches where the
            graph takes patches.
        layout: how the image lies in the prompt.
        size: (height, width) of the picture before preprocessing, in pixels.
    """

    inputs: dict[str, NDArray[Any]]
    layout: ImageLayout
    size: tuple[int, int]

    def tiles(self) -> list[dict[str, NDArray[Any]]]:
        """The inputs tile by tile: attention among a large tile's patches needs GiB as it is."""
        if self.layout.tiles == 1:
            return [self.inputs]
        return [
            {name: array[index : index + 1] for name, array in self.inputs.items()}
            for index in range(self.layout.tiles)
        ]
