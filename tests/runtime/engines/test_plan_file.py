from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.plan_file import PlanFile, plan_writer


def test_pieces_are_appended_and_hashed(tmp_path: Path) -> None:
    file = PlanFile(tmp_path / "a.engine")
    assert file.write(b"one") == 3
    assert file.write(b"two") == 3
    assert file.path.read_bytes() == b"onetwo"
    assert (file.size, file.sha256) == (6, hashlib.sha256(b"onetwo").hexdigest())


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.engine"
    path.write_bytes(b"old")
    PlanFile(path)
    assert path.read_bytes() == b""


def test_what_fails_does_not_pass_through_tensorrt(tmp_path: Path) -> None:
    bindings = load_bindings("tensorrt-rtx")
    folder = tmp_path / "folder"
    folder.mkdir()
    file = PlanFile(folder / "a.engine")
    file.path.unlink()
    folder.rmdir()
    assert plan_writer(bindings, file).write(b"one") == 0  # type: ignore[call-arg,arg-type]
    assert isinstance(file.error, FileNotFoundError)


def test_a_real_write_that_fails_ends_the_build(tmp_path: Path) -> None:
    """In a process of its own, whose files may have 4096 bytes."""
    code = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_builder import build
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    build(Path({str(tmp_path)!r}))
except OSError as error:
    print(error.strerror)
"""
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "File too large\n", done.stderr
    assert list(tmp_path.iterdir()) == []
