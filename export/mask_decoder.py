"""Adds the decoder of segmentation masks to a plan; its weights come in a file of their own."""

from __future__ import annotations

import math
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.contract import LocationTokenAnswers
from vlmport.errors import CheckpointError, ExportError
from vlmport.export.tensor_store import StoredTensor, TensorStore
from vlmport.export.tracing import build_on_meta
from vlmport.export.wrappers.mask_decoder import (
    CODES_PER_MASK,
    NUM_CODES,
    MaskDecoder,
    mask_decoder_module,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.export.family import ExportPlan

__all__ = ["ArrayFile", "with_mask_decoder"]

# A .npy member is its values and a header of at most this many bytes (numpy pads it to 64).
_MOST_HEADER_BYTES = 4096


class ArrayFile:
    """Arrays of one file, held in memory.

    Attributes:
        path: the file.
        tensors: all arrays by key.
    """

    def __init__(self, path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.path = path
        self._arrays = arrays
        self.tensors = {
            name: StoredTensor(name, array.dtype, array.shape) for name, array in arrays.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start:stop of the first axis."""
        return self._arrays[name][start:stop]


def with_mask_decoder(plan: ExportPlan, path: Path) -> ExportPlan:
    """The plan with one more graph, "mask_decoder".

    Args:
        plan: of a checkpoint whose answers have segment codes.
        path: vae-oid.npz as big_vision publishes it; see docs/families.

    Raises:
        ExportError: if the checkpoint's answers have no such codes.
        CheckpointError: if the file is not readable, or does not hold the decoder's weights.
    """
    answers = plan.answers
    wanted = (NUM_CODES, CODES_PER_MASK)
    if not isinstance(answers, LocationTokenAnswers):
        msg = (
            f"mask_decoder: found {path} for a checkpoint whose answers are of kind "
            f"{answers.kind!r}; expected one that answers with segment tokens; leave it out"
        )
        raise ExportError(msg)
    if (answers.segment_codes, answers.codes_per_mask) != wanted:
        msg = (
            f"mask_decoder: the checkpoint has {answers.segment_codes} codes and "
            f"{answers.codes_per_mask} of them for a mask; expected {wanted[0]} and {wanted[1]}"
        )
        raise ExportError(msg)
    file = ArrayFile(path, _read(path))
    entries = {name: (file, name) for name in file.tensors}
    return replace(
        plan,
        graphs=(*plan.graphs, mask_decoder_module()),
        store=TensorStore({**plan.store.entries, **entries}),
    )


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """The decoder's arrays; others in the file, such as the encoder's, are not read."""
    module = build_on_meta(MaskDecoder)
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            # A few packed bytes may announce terabytes; no double of the right shape is larger.
            oversized = [
                name
                for name, shape in shapes.items()
                if name in sizes
                and sizes[name].file_size > 8 * math.prod(shape) + _MOST_HEADER_BYTES
            ]
        with np.load(path, allow_pickle=False) as content:
            known = [name for name in shapes if name in content.files and name not in oversized]
            arrays = {name: content[name] for name in known}
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror or error}); expected a .npz of weights"
        raise CheckpointError(msg) from error
    except Exception as error:  # a damaged archive: BadZipFile, ValueError, zlib.error, EOFError
        msg = f"{path}: not a readable .npz of plain arrays ({error}); download it again"
        raise CheckpointError(msg) from error
    _check(path, shapes, arrays, oversized)
    return arrays


def _check(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Mapping[str, NDArray[Any]],
    oversized: list[str],
) -> None:
    faults = [f"no {name}" for name in shapes if name not in arrays and name not in oversized]
    faults += [f"{name} is too large" for name in oversized]
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            faults.append(f"{name} has shape {array.shape}, expected {shapes[name]}")
        elif not np.issubdtype(array.dtype, np.floating):
            faults.append(f"{name} has type {array.dtype}, expected floating point")
    if faults:
        msg = (
            f"{path}: not the weights of the mask decoder: {'; '.join(faults)}; expected the file "
            "vae-oid.npz that big_vision publishes"
        )
        raise CheckpointError(msg)
