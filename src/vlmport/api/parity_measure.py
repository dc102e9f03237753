"""Compares two arrays and judges the difference: pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.api.parity_report import Comparison

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmport.api.tolerances import Tolerance

__all__ = ["compare_arrays", "fault_of", "limits_of"]


def compare_arrays(found: NDArray[Any], reference: NDArray[Any]) -> Comparison:
    """Measures in float64 how far an array is from its reference; any shapes, any values."""
    finite, reference_finite = np.isfinite(found), np.isfinite(reference)
    nonfinite = found.size - int(finite.sum())
    reference_nonfinite = reference.size - int(reference_finite.sum())
    shapes = found.shape, reference.shape
    if found.shape != reference.shape or nonfinite or reference_nonfinite:
        return Comparison(*shapes, None, None, None, None, None, nonfinite, reference_nonfinite)
    if found.size == 0:
        return Comparison(*shapes, 0.0, 0.0, None, 0.0, 0.0, 0, 0)
    ours, theirs = found.astype(np.float64), reference.astype(np.float64)
    error, magnitude = np.abs(ours - theirs), np.abs(theirs)
    return Comparison(
        shape=found.shape,
        reference_shape=reference.shape,
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        cosine=_cosine(ours.ravel(), theirs.ravel()),
        reference_max_abs=float(magnitude.max()),
        reference_mean_abs=float(magnitude.mean()),
        nonfinite=0,
        reference_nonfinite=0,
    )


def limits_of(
    comparison: Comparison, tolerance: Tolerance, rounding: Comparison | None = None
) -> tuple[float | None, float | None]:
    """The greatest max_abs and mean_abs that pass, or None where they hang on missing numbers.

    Args:
        comparison: of the two arrays.
        tolerance: its limits.
        rounding: PyTorch in the bundle's precision beside PyTorch in float32.
    """
    if tolerance.basis == "absolute":
        return tolerance.max_abs, tolerance.mean_abs
    largest, mean = comparison.reference_max_abs, comparison.reference_mean_abs
    if tolerance.basis == "rounding":
        largest, mean = (rounding.max_abs, rounding.mean_abs) if rounding else (None, None)
    if largest is None or mean is None:
        return None, None
    mean_limit = None if tolerance.mean_abs is None else tolerance.mean_abs * mean
    return tolerance.max_abs * largest, mean_limit


def fault_of(
    comparison: Comparison,
    tolerance: Tolerance | None,
    other: str,
    rounding: Comparison | None = None,
) -> str | None:
    """What is wrong, as the end of a message, or None.

    Args:
        comparison: of the two arrays.
        tolerance: its limits; None judges only shape, NaN and Inf.
        other: name of the side that the bundle is compared with.
        rounding: PyTorch in the bundle's precision beside PyTorch in float32.
    """
    if comparison.shape != comparison.reference_shape:
        shape, wanted = list(comparison.shape), list(comparison.reference_shape)
        return f"shape {shape}; {other} has {wanted}"
    if comparison.nonfinite:
        return f"{comparison.nonfinite} values are NaN or Inf; expected finite ones"
    if comparison.reference_nonfinite:
        return f"{other} itself has {comparison.reference_nonfinite} values that are NaN or Inf"
    if tolerance is None:
        return None
    max_limit, mean_limit = limits_of(comparison, tolerance, rounding)
    if max_limit is None:
        return f"no tolerance: PyTorch's {tolerance.basis} is not known, its float32 side is faulty"
    faults = (
        _excess("max_abs", comparison.max_abs, max_limit, tolerance.max_abs, tolerance.basis),
        _excess("mean_abs", comparison.mean_abs, mean_limit, tolerance.mean_abs, tolerance.basis),
    )
    return "; ".join(fault for fault in faults if fault) or None


def _excess(
    name: str, value: float | None, limit: float | None, share: float | None, basis: str
) -> str | None:
    if value is None or limit is None or share is None or value <= limit:
        return None
    whole = limit / share if share else 0.0
    words = {
        "absolute": "",
        "magnitude": f" ({share:.0e} of {whole:.3g})",
        "rounding": f" ({share:g} times PyTorch's own rounding of {whole:.3g})",
    }
    return f"{name} {value:.3g}; tolerance {limit:.3g}{words[basis]}"


def _cosine(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    norms = float(np.linalg.norm(ours)), float(np.linalg.norm(theirs))
    if 0.0 in norms:
        return 1.0 if norms[0] == norms[1] else 0.0
    cosine = float(np.dot(ours / norms[0], theirs / norms[1]))
    return min(1.0, max(-1.0, cosine))
