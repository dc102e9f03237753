"""How far a value of a graph is from its reference, as a share of what tolerances allow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.api.parity_measure import compare_arrays, limits_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmport.api.tolerances import Tolerance

__all__ = ["Deviation", "deviation"]

# From 1 to the next number.
_UNITS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclass(frozen=True, slots=True)
class Deviation:
    """A value of one run beside its reference.

    Attributes:
        ratio: the difference over what is allowed, the larger one of the largest and the mean
            difference; infinite if the shape is wrong, NaN or Inf differ, or nothing is allowed.
        max_abs: largest difference; None if the shape is wrong.
        limit: of `max_abs`; None likewise.
        reference_max_abs: largest magnitude of the reference; None likewise.
        words: what is out of tolerance; "" if nothing is.
        shape: of what the candidate gave.
    """

    ratio: float
    max_abs: float | None
    limit: float | None
    reference_max_abs: float | None
    words: str
    shape: tuple[int, ...]

    @property
    def is_fault(self) -> bool:
        """Whether it is out of tolerance."""
        return self.ratio > 1.0


def deviation(
    found: NDArray[Any],
    reference: NDArray[Any],
    exact: NDArray[Any] | None,
    tolerance: Tolerance,
) -> Deviation:
    """Judges one array.

    NaN and Inf of the reference are expected in the same places: a mask may well hold them.

    Args:
        found: the candidate's.
        reference: of the same precision.
        exact: computed in float32; needed where the tolerance is in multiples of rounding.
        tolerance: its row. Integers and truth values must be equal whatever it says.
    """
    if found.shape != reference.shape:
        words = f"shape {list(found.shape)}; the reference has {list(reference.shape)}"
        return Deviation(math.inf, None, None, None, words, found.shape)
    if reference.dtype.kind in "biu":
        return _equality(found, reference)
    ours, theirs = found.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(theirs)
    with np.errstate(invalid="ignore"):
        same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    strange = int((~np.isfinite(ours) & finite).sum() + (~same & ~finite).sum())
    if strange:
        words = f"{strange} of {found.size} values are NaN or Inf on one side alone"
        return Deviation(math.inf, None, None, None, words, found.shape)
    wide = None if exact is None else exact.astype(np.float64)[finite]
    judged = _difference(ours[finite], theirs[finite], wide, tolerance)
    return replace(judged, shape=found.shape)


def _equality(found: NDArray[Any], reference: NDArray[Any]) -> Deviation:
    wrong = int((found.astype(np.int64) != reference.astype(np.int64)).sum())
    words = f"{wrong} of {found.size} integers differ" if wrong else ""
    return Deviation(math.inf if wrong else 0.0, None, None, None, words, found.shape)


def _difference(
    found: NDArray[np.float64],
    reference: NDArray[np.float64],
    exact: NDArray[np.float64] | None,
    tolerance: Tolerance,
) -> Deviation:
    comparison = compare_arrays(found, reference)
    rounding = None if exact is None else compare_arrays(reference, exact)
    max_limit, mean_limit = limits_of(comparison, tolerance, rounding)
    assert comparison.max_abs is not None
    assert comparison.mean_abs is not None
    assert max_limit is not None  # nothing here is NaN or Inf
    if tolerance.basis == "rounding":
        # A value that one side holds exactly by chance may be rounded once on the other.
        unit = _UNITS[tolerance.precision]
        max_limit = max(max_limit, unit * (comparison.reference_max_abs or 0.0))
        mean_limit = max(mean_limit or 0.0, unit * (comparison.reference_mean_abs or 0.0))
    ratios = [_ratio(comparison.max_abs, max_limit)]
    if mean_limit is not None:
        ratios.append(_ratio(comparison.mean_abs, mean_limit))
    ratio = max(ratios)
    words = (
        f"max_abs {comparison.max_abs:.3g} (tolerance {max_limit:.3g}), mean_abs "
        f"{comparison.mean_abs:.3g}"
        + ("" if mean_limit is None else f" (tolerance {mean_limit:.3g})")
        + f", of magnitudes up to {comparison.reference_max_abs:.3g}"
    )
    return Deviation(
        ratio=ratio,
        max_abs=comparison.max_abs,
        limit=max_limit,
        reference_max_abs=comparison.reference_max_abs,
        words=words if ratio > 1.0 else "",
        shape=found.shape,
    )


def _ratio(found: float, limit: float) -> float:
    if limit > 0.0:
        return found / limit
    return math.inf if found > 0.0 else 0.0
