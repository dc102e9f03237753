"""How far a value is from its reference, in sums over any amount of data that keep none of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Signal", "SignalSums", "decibels_of"]


@dataclass(frozen=True, slots=True)
class Signal:
    """A value beside its reference, over all that was seen of both.

    Attributes:
        snr_db: signal-to-noise ratio 10 log10(sum x^2 / sum (x - y)^2) in decibels, x the
            reference; None if both are equal, or if y holds NaN or Inf.
        gain_free_snr_db: the same after each channel of y has been multiplied by the number that
            brings it closest to x. It is far above `snr_db` where a quantizer has moved a scale of
            the channels from here into the next layer, which changes no answer, and also where a
            layer's scale is simply wrong. None as `snr_db`.
        gain: median over the channels of sum x y / sum x^2, by which y is larger than x; noise that
            x knows nothing of leaves it at 1. None as `cosine`, or if x is all zeros.
        gain_spread: 90th over 10th percentile of the channels' gains; 1 if all are alike. None as
            `gain`, or if some are not positive.
        cosine: of all elements as one vector; 1 if both are all zeros, 0 if one is; None if y
            holds NaN or Inf.
        max_abs: largest |x - y|; None if y holds NaN or Inf.
        reference_max_abs: largest |x|.
        elements: how many were compared.
        nonfinite: how many elements of y are NaN or Inf.
    """

    snr_db: float | None
    gain_free_snr_db: float | None
    gain: float | None
    gain_spread: float | None
    cosine: float | None
    max_abs: float | None
    reference_max_abs: float
    elements: int
    nonfinite: int

    @property
    def is_exact(self) -> bool:
        """Whether every element was the same."""
        return self.max_abs == 0.0


class SignalSums:
    """Float64 sums for each channel.

    Args:
        channel_axis: axis of the channels of the values to come.
    """

    def __init__(self, channel_axis: int) -> None:
        self._axis = channel_axis
        self._sums: NDArray[np.float64] | None = None  # [4, channels]: x x, y y, x y, (x-y)^2
        self._max_abs = self._reference_max_abs = 0.0
        self._elements = self._nonfinite = 0

    def add(self, found: NDArray[Any], reference: NDArray[Any]) -> None:
        """Takes in arrays of one shape, of any floating-point type.

        Raises:
            ValueError: if the shapes differ.
        """
        if found.shape != reference.shape:
            msg = f"found shape {list(found.shape)}; the reference has {list(reference.shape)}"
            raise ValueError(msg)
        channels = reference.shape[self._axis]
        x = np.moveaxis(reference, self._axis, -1).reshape(-1, channels).astype(np.float64)
        y = np.moveaxis(found, self._axis, -1).reshape(-1, channels).astype(np.float64)
        self._elements += x.size
        if not x.size:
            return
        self._reference_max_abs = max(self._reference_max_abs, float(np.abs(x).max()))
        nonfinite = y.size - int(np.isfinite(y).sum())
        self._nonfinite += nonfinite
        if nonfinite:
            return
        error = x - y
        self._max_abs = max(self._max_abs, float(np.abs(error).max()))
        sums = np.stack([np.einsum("nc,nc->c", a, b) for a, b in _pairs(x, y, error)])
        self._sums = sums if self._sums is None else self._sums + sums

    def signal(self) -> Signal:
        """What the sums say so far."""
        if self._nonfinite:
            return self._signal((None, None), (None, None), None, None)
        if self._sums is None or not self._max_abs:
            return self._signal((None, None), (1.0, 1.0), 1.0, 0.0)
        xx, yy, xy, noise = self._sums
        # |x - g y|^2 is least at g = xy / yy, where it is xx - xy^2 / yy.
        left = np.where(yy > 0, xx - np.square(xy) / np.where(yy > 0, yy, 1.0), xx)
        total_x, total_y = float(xx.sum()), float(yy.sum())
        norms = math.sqrt(total_x) * math.sqrt(total_y)
        cosine = float(xy.sum()) / norms if norms else float(total_x == total_y)
        return self._signal(
            (
                decibels_of(total_x, float(noise.sum())),
                decibels_of(total_x, max(0.0, float(left.sum()))),
            ),
            _gain(xx, xy),
            min(1.0, max(-1.0, cosine)),
            self._max_abs,
        )

    def _signal(
        self,
        ratios: tuple[float | None, float | None],
        gains: tuple[float | None, float | None],
        cosine: float | None,
        max_abs: float | None,
    ) -> Signal:
        return Signal(
            snr_db=ratios[0],
            gain_free_snr_db=ratios[1],
            gain=gains[0],
            gain_spread=gains[1],
            cosine=cosine,
            max_abs=max_abs,
            reference_max_abs=self._reference_max_abs,
            elements=self._elements,
            nonfinite=self._nonfinite,
        )


def _pairs(
    x: NDArray[np.float64], y: NDArray[np.float64], error: NDArray[np.float64]
) -> tuple[tuple[NDArray[np.float64], NDArray[np.float64]], ...]:
    return (x, x), (y, y), (x, y), (error, error)


def _gain(xx: NDArray[np.float64], xy: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Median and spread of the gains of the channels that are not silent."""
    gains = xy[xx > 0] / xx[xx > 0]
    if not gains.size:
        return None, None
    low, median, high = (float(value) for value in np.quantile(gains, (0.1, 0.5, 0.9)))
    return median, high / low if low > 0 else None


def decibels_of(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise) in decibels; None without noise, -3000 without signal."""
    if noise <= 0.0:
        return None
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -3000.0
