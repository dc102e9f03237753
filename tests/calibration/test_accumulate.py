from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlmport.calibration.accumulate import NUM_BINS, ValueAccumulator, merged_probes
from vlmport.calibration.statistics import Probe, ValueStatistics
from vlmport.errors import CalibrationError

EVERYTHING = Probe("value", channels=True, histogram=True, second_moment=True)


def gathered(
    batches: Sequence[NDArray[np.floating[Any]]], probe: Probe = EVERYTHING, *, flush: bool = False
) -> ValueStatistics:
    accumulator = ValueAccumulator(probe, "the value")
    for batch in batches:
        accumulator.update(batch)
        if flush:
            accumulator.flush()
    return accumulator.statistics()


def batches_of(seed: int) -> list[NDArray[np.float32]]:
    """Of very different ranges, with zeros of both signs."""
    generator = np.random.default_rng(seed)
    batches = [
        generator.normal(0, 10.0**power, (rows, 5)).astype(np.float32)
        for power, rows in ((-6, 3), (2, 7), (0, 1), (-1, 40), (4, 2))
    ]
    batches[3][5, 2], batches[3][6, 1] = 0.0, -0.0
    return batches


def test_every_number_is_that_of_all_data_at_once() -> None:
    batches = batches_of(0)
    values = np.concatenate(batches)
    found = gathered(batches)
    assert found.positions == len(values)
    assert (found.minimum, found.maximum) == (values.min(), values.max())
    assert found.smallest_magnitude == np.abs(values)[values != 0].min()
    assert found.channel_amax is not None
    np.testing.assert_array_equal(found.channel_amax, np.abs(values).max(axis=0))
    assert found.second_moment is not None
    exact = values.astype(np.float64).T @ values.astype(np.float64)
    np.testing.assert_allclose(found.second_moment, exact, rtol=1e-5, atol=1e-5 * exact.max())
    assert found.histogram is not None
    width = found.histogram.bin_width
    assert math.frexp(width)[0] == 0.5, "a power of two"
    assert NUM_BINS / 2 * width <= found.amax < NUM_BINS * width
    bins = np.floor(np.abs(values.astype(np.float64)) / width).astype(np.int64)
    counts = np.bincount(bins.reshape(-1), minlength=NUM_BINS)
    np.testing.assert_array_equal(found.histogram.counts, counts)


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(5)), st.integers(0, 20))
def test_the_order_of_batches_changes_no_count(order: list[int], seed: int) -> None:
    batches = batches_of(seed)
    first, second = gathered(batches), gathered([batches[index] for index in order])
    assert first.histogram is not None
    assert second.histogram is not None
    assert first.histogram.bin_width == second.histogram.bin_width
    np.testing.assert_array_equal(first.histogram.counts, second.histogram.counts)
    assert first.channel_amax is not None
    assert second.channel_amax is not None
    np.testing.assert_array_equal(first.channel_amax, second.channel_amax)
    assert first.smallest_magnitude == second.smallest_magnitude


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20)
)
def test_every_finite_float32_is_counted(items: list[float]) -> None:
    probe = Probe("value", histogram=True)
    found = gathered([np.array([item], np.float32) for item in items], probe)
    assert found.histogram is not None
    assert found.histogram.counts.sum() == len(items)
    assert found.amax == np.abs(np.array(items, np.float32)).max()


def test_only_valid_positions_count() -> None:
    values = np.ones((2, 3, 4), np.float32)
    values[1, 2], values[0, 1] = 1000.0, np.nan
    valid = np.ones((2, 3), np.bool_)
    valid[1, 2] = valid[0, 1] = False
    accumulator = ValueAccumulator(EVERYTHING, "the value")
    accumulator.update(values, valid)
    accumulator.update(values, np.zeros((2, 3), np.bool_))
    found = accumulator.statistics()
    assert (found.positions, found.maximum) == (4, 1.0)
    assert found.second_moment is not None
    np.testing.assert_array_equal(found.second_moment, np.full((4, 4), 4.0))


def test_channels_of_a_picture_lie_on_axis_1() -> None:
    pixels = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float16)
    found = gathered([pixels], Probe("value", 1, second_moment=True))
    assert found.positions == 40
    assert found.channel_amax is not None
    np.testing.assert_array_equal(found.channel_amax, np.abs(pixels).max(axis=(0, 2, 3)))
    rows = np.moveaxis(pixels, 1, -1).reshape(-1, 3).astype(np.float64)
    assert found.second_moment is not None
    np.testing.assert_allclose(found.second_moment, rows.T @ rows, rtol=1e-5)


def test_zeros_alone_and_scalars() -> None:
    found = gathered([np.zeros((3, 2), np.float32)])
    assert (found.amax, found.smallest_magnitude) == (0.0, math.inf)
    assert found.histogram is not None
    assert found.histogram.counts[0] == 6
    assert gathered([np.array(3.0, np.float32)]).maximum == 3.0


def test_what_is_not_asked_for_is_not_kept() -> None:
    found = gathered(batches_of(0), Probe("value", channels=False))
    assert found.channel_amax is None
    assert found.histogram is None
    assert found.second_moment is None
    assert found.positions == 53


@pytest.mark.parametrize(
    ("bad", "kind"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")]
)
def test_what_is_not_finite_is_refused_by_name(bad: float, kind: str) -> None:
    with pytest.raises(CalibrationError, match=f"the value: found {kind}"):
        gathered([np.array([[1.0, bad]], np.float32)])


def test_squares_beyond_float32_are_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match="the value: found activations up to 1e\\+20"):
        gathered([np.full((2, 2), 1e20, np.float32)])


def test_integers_are_refused() -> None:
    accumulator = ValueAccumulator(EVERYTHING, "the value")
    with pytest.raises(CalibrationError, match="found int64 values"):
        accumulator.update(np.ones((2, 2), np.int64))


def test_going_on_from_statistics_is_the_same_as_not_stopping() -> None:
    batches = batches_of(3)
    whole = gathered(batches, flush=True)
    accumulator = ValueAccumulator(EVERYTHING, "the value", gathered(batches[:2], flush=True))
    for batch in batches[2:]:
        accumulator.update(batch)
        accumulator.flush()
    resumed = accumulator.statistics()
    assert resumed.second_moment is not None
    assert whole.second_moment is not None
    np.testing.assert_array_equal(resumed.second_moment, whole.second_moment)
    assert resumed.histogram is not None
    assert whole.histogram is not None
    np.testing.assert_array_equal(resumed.histogram.counts, whole.histogram.counts)
    assert resumed.smallest_magnitude == whole.smallest_magnitude


def test_probes_of_one_value_are_joined() -> None:
    joined = merged_probes(
        [Probe("a", channels=False, histogram=True), Probe("b"), Probe("a", second_moment=True)]
    )
    assert joined == (Probe("a", channels=True, histogram=True, second_moment=True), Probe("b"))
    with pytest.raises(CalibrationError, match="channel axes -1 and 1"):
        merged_probes([Probe("a"), Probe("a", 1)])
