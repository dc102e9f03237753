"""How much memory is free."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["free_memory"]


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take without harm: of the machine, or of its container.

    Args:
        root: where the system's files are.

    Source: proc_meminfo(5), MemAvailable; the kernel's cgroup-v2.rst, memory.max.
    """
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    available = re.search(r"MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"))
    if available:
        free = [int(available[1]) * 1024]
    group = root / "sys/fs/cgroup"
    limit, used = _text(group / "memory.max"), _text(group / "memory.current")
    if limit.strip().isdigit() and used.strip().isdigit():  # "max" is no limit
        # Pages of files are given back when memory is short.
        cached = re.search(r"^inactive_file (\d+)", _text(group / "memory.stat"), re.MULTILINE)
        free.append(max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0)))
    return min(free)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""
