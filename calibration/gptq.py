"""GPTQ: rounds a weight row by row and lets later rows make up for the error of earlier ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmport.calibration.rounding import QuantizedWeight, round_with, searched_scale

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from vlmport.calibration.rounding import IntegerRange

__all__ = ["compensated", "damped", "error_feedback", "output_error"]

# Share of the mean of the second moment's diagonal that is added to the diagonal (Frantar et al.
# 2022, section 3.3, step 3).
DAMPING = 0.01


def damped(second_moment: NDArray[np.float32], damping: float = DAMPING) -> NDArray[np.float32]:
    """The second moment with a share of its diagonal's mean added to the diagonal; a new array."""
    result = second_moment.copy()
    mean = float(np.diagonal(second_moment).mean(dtype=np.float64))
    result[np.diag_indices_from(result)] += np.float32(mean * damping)
    return result


def error_feedback(
    second_moment: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factors H = M diag(d) M^T with a unit upper triangular M.

    For a rounding error E [in_channels, out_channels] the output's squared error is

        tr(E^T H E) = sum over k of d_k |E_k + sum over j < k of M_jk E_j|^2,

    so row k is best rounded after adding what the rows before it ask of it, and d_k weighs what
    remains. This is GPTQ's update by the Cholesky factor of the inverse (Frantar et al. 2022,
    algorithm 1) without the inverse (Chee et al. 2023, "QuIP", theorem 6).

    Args:
        second_moment: float32 [in_channels, in_channels], H, positive definite (damped).

    Returns:
        M, float32 [in_channels, in_channels], and d, float32 [in_channels].
    """
    # Both axes turned round, the lower factor of LAPACK becomes an upper one.
    turned = second_moment[::-1, ::-1].astype(np.float64)
    factor = np.linalg.cholesky(turned)[::-1, ::-1]
    roots = np.diagonal(factor).copy()
    return (factor / roots).astype(np.float32), np.square(roots).astype(np.float32)


def compensated(
    weight: NDArray[np.float32],
    feedback: tuple[NDArray[np.float32], NDArray[np.float32]],
    block_size: int,
    limits: IntegerRange,
    dtype: DTypeLike,
) -> QuantizedWeight:
    """Rounds a weight with error feedback; the scale of a block is chosen when it is reached.

    Args:
        weight: float32 [in_channels, out_channels].
        feedback: M and d of `error_feedback`.
        block_size: input channels that share a scale; divides in_channels.
        limits: the integers to use.
        dtype: element type of the scales.

    Returns:
        The rounded weight.
    """
    matrix, remaining = feedback
    values = np.empty(weight.shape, np.int8)
    scale = np.empty((weight.shape[0] // block_size, weight.shape[1]), dtype)
    error = np.zeros_like(weight)
    for index in range(len(scale)):
        start = index * block_size
        block = slice(start, start + block_size)
        target = np.asarray(weight[block] + matrix[:start, block].T @ error[:start], np.float32)
        scale[index] = searched_scale(target, limits, dtype, remaining[block])
        step = scale[index].astype(np.float32)
        for row in range(start, start + block_size):
            asked = target[row - start] + matrix[start:row, row] @ error[start:row]
            values[row] = round_with(asked, scale[index], limits)
            error[row] = weight[row] - values[row] * step
    return QuantizedWeight(values, scale)


def output_error(
    weight: NDArray[np.float32],
    rounded: NDArray[np.float32],
    second_moment: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Squared error of each output channel, summed over the positions of the second moment.

    Output channels are independent of each other, here and in `compensated`, so a caller may give
    a few at a time.

    Args:
        weight: float32 [in_channels, out_channels].
        rounded: the same, after rounding.
        second_moment: float32 [in_channels, in_channels].

    Returns:
        float64 [out_channels], the diagonal of E^T H E.
    """
    error = weight - rounded
    squares: NDArray[np.float64] = np.einsum(
        "io,io->o", error, second_moment @ error, dtype=np.float64
    )
    return squares
