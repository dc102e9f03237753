from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_demo_ends_with_pass() -> None:
    finished = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "demo.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.rstrip().endswith("PASS")
