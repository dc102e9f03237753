"""Streams activations into `ValueStatistics`, so that no activation has to be kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.calibration.statistics import Histogram, Probe, ValueStatistics
from vlmport.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["NUM_BINS", "HistogramAccumulator", "ValueAccumulator", "merged_probes"]

# The range is at most twice the largest magnitude, so at least half of the bins are in use.
NUM_BINS = 4096
_BIN_BITS = 12
# float32 has the reciprocals of bin widths down to here; smaller magnitudes share the first bin.
_LEAST_EXPONENT = -100
_BLOCK = 1 << 20  # elements whose bin indices exist at a time
# Rows gathered for one product x^T x; decode steps have one row each, and a product with one row
# reads and writes the whole sum.
_ROWS = 512


def merged_probes(probes: Iterable[Probe]) -> tuple[Probe, ...]:
    """One probe a value that asks for all that any of them asks for.

    Raises:
        CalibrationError: if two see the channels of one value on different axes.
    """
    merged: dict[str, Probe] = {}
    for probe in probes:
        other = merged.setdefault(probe.value, probe)
        if other.channel_axis != probe.channel_axis:
            msg = (
                f"{probe.value}: probes name the channel axes {other.channel_axis} and "
                f"{probe.channel_axis}; expected one"
            )
            raise CalibrationError(msg)
        merged[probe.value] = Probe(
            probe.value,
            probe.channel_axis,
            channels=probe.channels or other.channels,
            histogram=probe.histogram or other.histogram,
            second_moment=probe.second_moment or other.second_moment,
            first_position_weight=max(probe.first_position_weight, other.first_position_weight),
        )
    return tuple(merged.values())


class ValueAccumulator:
    """Statistics of one value while they are gathered.

    Whatever the order and the grouping of the data, all but the second moment come out exactly the
    same; the second moment is a float32 sum and follows the order in its last bits.

    Args:
        probe: what to gather.
        name: the value in words, for messages.
        start: statistics to go on from; their arrays are taken over and changed.
    """

    def __init__(self, probe: Probe, name: str, start: ValueStatistics | None = None) -> None:
        self.probe = probe
        self._name = name
        self._positions = start.positions if start else 0
        self._minimum = start.minimum if start else math.inf
        self._maximum = start.maximum if start else -math.inf
        self._smallest = start.smallest_magnitude if start else math.inf
        self._channel_amax = start.channel_amax if start else None
        self._histogram = HistogramAccumulator(start.histogram if start else None)
        self._second_moment = start.second_moment if start else None
        self._rows: list[NDArray[np.float32]] = []

    def update(
        self,
        array: NDArray[Any],
        valid: NDArray[np.bool_] | None = None,
        *,
        begins: bool = False,
    ) -> None:
        """Takes in one computed value.

        Args:
            array: floating; the channels lie on the probe's axis.
            valid: bool, of the array's shape without the channels' axis: positions that count.
            begins: whether the first position is that of a sequence.

        Raises:
            CalibrationError: if the value is not floating, or holds NaN or infinity.
        """
        rows = self._as_rows(array)
        if valid is not None:
            rows = rows[valid.reshape(-1)]
        if not rows.size:
            return
        self._take_range(rows)
        magnitudes = np.abs(rows)
        # Magnitudes compare as their bits do; 0 - 1 wraps to the largest, so that the least left
        # is the smallest positive one. A masked minimum took four times as long.
        bits = (magnitudes.reshape(-1).view(np.uint32) - np.uint32(1)).min()
        if bits != np.uint32(0xFFFFFFFF):
            smallest = float((bits + np.uint32(1)).view(np.float32))
            self._smallest = min(self._smallest, smallest)
        if self.probe.channels:
            amax = magnitudes.max(axis=0)
            before = self._channel_amax
            self._channel_amax = amax if before is None else np.maximum(before, amax)
        if self.probe.histogram:
            self._histogram.update(magnitudes.reshape(-1))
        self._positions += len(rows)
        if self.probe.second_moment:
            # A view would keep the whole output of the run alive.
            weight = self.probe.first_position_weight if begins else 1.0
            kept = rows.copy() if len(rows) < _ROWS or weight != 1.0 else rows
            if weight != 1.0:
                kept[0] *= np.float32(math.sqrt(weight))
            self._rows.append(kept)
            if sum(map(len, self._rows)) >= _ROWS:
                self.flush()

    def flush(self) -> None:
        """Adds the gathered rows to the second moment; call it where data may be cut in two.

        Raises:
            CalibrationError: if the sum leaves the range of float32.
        """
        if not self._rows:
            return
        rows = np.concatenate(self._rows) if len(self._rows) > 1 else self._rows[0]
        self._rows.clear()
        with np.errstate(over="ignore"):
            product = rows.T @ rows
            if self._second_moment is None:
                self._second_moment = product
            else:
                self._second_moment += product
        if not np.isfinite(self._second_moment.diagonal()).all():  # no other element is larger
            msg = (
                f"{self._name}: found activations up to {max(-self._minimum, self._maximum):.3g}, "
                "whose squares leave the range of float32; expected smaller ones; run `vlmport "
                "parity` on the bundle, or choose a method that needs no second moments (nearest)"
            )
            raise CalibrationError(msg)

    def statistics(self) -> ValueStatistics:
        """What was gathered so far; arrays are shared, not copied."""
        self.flush()
        probe = self.probe
        return ValueStatistics(
            positions=self._positions,
            minimum=self._minimum,
            maximum=self._maximum,
            smallest_magnitude=self._smallest,
            channel_amax=self._channel_amax if probe.channels else None,
            histogram=self._histogram.histogram() if probe.histogram else None,
            second_moment=self._second_moment if probe.second_moment else None,
        )

    def _as_rows(self, array: NDArray[Any]) -> NDArray[np.float32]:
        if not np.issubdtype(array.dtype, np.floating):
            msg = f"{self._name}: found {array.dtype} values; expected a floating-point value"
            raise CalibrationError(msg)
        with_channels = array if array.ndim else array.reshape(1)
        moved = np.moveaxis(with_channels, self.probe.channel_axis, -1)
        return np.ascontiguousarray(moved.reshape(-1, moved.shape[-1]), np.float32)

    def _take_range(self, rows: NDArray[np.float32]) -> None:
        minimum, maximum = float(rows.min()), float(rows.max())  # NaN is the minimum of its array
        if not (math.isfinite(minimum) and math.isfinite(maximum)):
            kind = "NaN" if math.isnan(minimum) else "infinity"
            msg = (
                f"{self._name}: found {kind} in its activations; expected finite numbers; run "
                "`vlmport parity` on the bundle, or quantize a float32 bundle if this one is half"
            )
            raise CalibrationError(msg)
        self._minimum = min(self._minimum, minimum)
        self._maximum = max(self._maximum, maximum)


class HistogramAccumulator:
    """Counts magnitudes in `NUM_BINS` bins whose width is a power of two.

    The width is the least that holds the largest magnitude, and the bin of x is floor(x / width),
    which is exact for powers of two. A wider range merges pairs of bins, and
    floor(floor(y) / 2) = floor(y / 2): the counts are those of all data at the last width,
    whatever came first.
    """

    def __init__(self, start: Histogram | None = None) -> None:
        self._counts = start.counts if start else np.zeros(NUM_BINS, np.int64)
        width = start.bin_width if start else 2.0**_LEAST_EXPONENT
        self._exponent = math.frexp(width)[1] - 1

    def update(self, magnitudes: NDArray[np.float32]) -> None:
        """Counts finite float32 magnitudes [elements]."""
        self._widen(math.frexp(float(magnitudes.max()))[1] - _BIN_BITS)
        factor = np.float32(2.0**-self._exponent)
        for start in range(0, len(magnitudes), _BLOCK):
            bins = (magnitudes[start : start + _BLOCK] * factor).astype(np.int64)
            self._counts += np.bincount(bins, minlength=NUM_BINS)

    def histogram(self) -> Histogram:
        """The counts so far."""
        return Histogram(self._counts, 2.0**self._exponent)

    def _widen(self, exponent: int) -> None:
        doublings = exponent - self._exponent
        if doublings <= 0:
            return
        group = 1 << min(doublings, _BIN_BITS)
        merged = self._counts.reshape(-1, group).sum(axis=1)
        self._counts = np.zeros(NUM_BINS, np.int64)
        self._counts[: len(merged)] = merged
        self._exponent = exponent
