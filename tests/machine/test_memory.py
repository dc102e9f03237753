from __future__ import annotations

from pathlib import Path

import pytest

from vlmport.machine.memory import free_memory


def test_the_free_memory_of_this_machine_is_a_part_of_its_memory() -> None:
    import os

    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    assert 0 < free_memory() < whole


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4_000_000 * 1024),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 4_000_000 * 1024),
        ({"memory.max": "3000\n", "memory.current": "1000\n"}, 2000),
        (
            {
                "memory.max": "3000\n",
                "memory.current": "2500\n",
                "memory.stat": "anon 9\ninactive_file 400\n",
            },
            900,
        ),
        ({"memory.max": "3000\n", "memory.current": "3500\n"}, 0),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:  4000000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in files.items():
        (group / name).write_text(text)

    assert free_memory(tmp_path) == expected
