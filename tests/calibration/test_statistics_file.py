from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from vlmport.calibration.accumulate import ValueAccumulator
from vlmport.calibration.statistics import Probe, Statistics, ValueStatistics
from vlmport.calibration.statistics_file import load_statistics, save_statistics
from vlmport.errors import CalibrationError


@pytest.fixture
def statistics() -> Statistics:
    accumulator = ValueAccumulator(Probe("x", histogram=True, second_moment=True), "x")
    accumulator.update(np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32) / 3)
    unseen = ValueStatistics(0, math.inf, -math.inf, math.inf)
    return {"decoder": {"x": accumulator.statistics(), "a/b": unseen}, "projector": {}}


def test_statistics_come_back_bit_by_bit(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "below" / "statistics.safetensors"
    save_statistics(path, statistics, {"samples": "3"})
    for mapped in (False, True):
        found, notes = load_statistics(path, mapped=mapped)
        assert notes == {"samples": "3"}
        assert found.keys() == statistics.keys()
        before, after = statistics["decoder"]["x"], found["decoder"]["x"]
        for name in ("positions", "minimum", "maximum", "smallest_magnitude"):
            assert getattr(before, name) == getattr(after, name)
        np.testing.assert_array_equal(before.second_moment, after.second_moment)
        np.testing.assert_array_equal(before.channel_amax, after.channel_amax)
        assert before.histogram is not None
        assert after.histogram is not None
        np.testing.assert_array_equal(before.histogram.counts, after.histogram.counts)
        assert before.histogram.bin_width == after.histogram.bin_width
        assert found["decoder"]["a/b"].minimum == math.inf
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_is_safetensors(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    save_statistics(path, statistics, {})
    found = load_file(path)["decoder/x/second_moment"]
    np.testing.assert_array_equal(found, statistics["decoder"]["x"].second_moment)


def test_damaged_and_missing_files_are_refused(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_statistics(path)
    save_statistics(path, statistics, {})
    content = path.read_bytes()
    for damaged in (b"", content[:20], content[:-9], b"\xff" * 64, b"{}" * 20):
        path.write_bytes(damaged)
        with pytest.raises(CalibrationError, match=r"not a file of statistics|cannot be read"):
            load_statistics(path)


def test_a_folder_in_the_way_is_told(statistics: Statistics, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be written"):
        save_statistics(tmp_path, statistics, {})
    (tmp_path / "file").touch()
    with pytest.raises(CalibrationError, match="cannot be written"):
        save_statistics(tmp_path / "file" / "below", statistics, {})
