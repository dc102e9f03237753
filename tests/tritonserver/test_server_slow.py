from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from soak_triton import mixed_questions, soak
from support.trained import exported
from support.triton_repositories import python_repository
from triton_server import triton_server

pytestmark = pytest.mark.slow


def test_nothing_grows_or_gets_stuck_at_twice_the_capacity(tmp_path: Path) -> None:
    report = soak(exported("tinyllava"), mixed_questions(), 40, tmp_path)
    # Memory settles within minutes (the caches fill), so that its growth is the long soak's.
    assert [fault for fault in report.faults if not fault.startswith("memory")] == []
    assert report.counted["finished"] >= report.ends["answered"] > 0
    # Most of those that are left are complete before anybody can notice.
    assert report.counted["cancelled"] > 0
    assert report.ends["left"] > 0


def test_a_python_whose_numpy_the_stub_was_not_built_for_is_refused(tmp_path: Path) -> None:
    packages = Path(sys.executable).parent
    numpy = subprocess.run(
        [packages / "python3", "-c", "import numpy; print(numpy.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if numpy.startswith("1."):
        pytest.skip(f"numpy {numpy.strip()} of this Python is one that the stub was built for")
    repository = python_repository(exported("fuyu"), tmp_path / "vlm", "vlm", {"threads": 1})
    log = tmp_path / "server.log"
    with (
        pytest.raises(AssertionError, match="tritonserver has ended"),
        triton_server([repository], log, ["vlm"], packages),
    ):
        pass
    assert "arrays do not survive Triton's Python backend" in log.read_text(errors="replace")
