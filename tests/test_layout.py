from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "vlmport"
STAGES = ("export", "graphs", "calibration", "runtime")
FAMILIES = REPOSITORY / "export" / "families"
MOST_LINES = 400


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def stage_sources() -> list[Path]:
    own = [path for path in PACKAGE.rglob("*.py") if not is_below_stage(path)]
    return [*own, *sources(*(REPOSITORY / stage for stage in STAGES))]


def is_below_stage(path: Path) -> bool:
    return path.relative_to(PACKAGE).parts[0] in STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_each_link_of_the_package_points_home(stage: str) -> None:
    link = PACKAGE / stage
    assert link.is_symlink(), f"{link}: git must keep links (core.symlinks=true)"
    assert os.readlink(link) == f"../../{stage}"
    assert link.resolve() == REPOSITORY / stage


def test_each_folder_with_sources_is_a_package() -> None:
    # Without __init__.py a folder is imported from a checkout but is missing from the wheel.
    folders = {path.parent for path in stage_sources()}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_test_folders_are_no_packages() -> None:
    # tests/export with __init__.py would be a package "export" of its own; support is imported.
    packages = {path.parent.name for path in (REPOSITORY / "tests").rglob("__init__.py")}
    assert packages <= {"support"}


def test_no_source_is_too_long() -> None:
    files = [*stage_sources(), *sources(REPOSITORY / "tests", REPOSITORY / "scripts")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {str(path): n for path, n in lengths.items() if n > MOST_LINES} == {}


def family_files() -> list[Path]:
    return sorted(path for path in FAMILIES.glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("family", family_files(), ids=lambda path: path.stem)
def test_a_family_is_named_only_in_its_own_file(family: Path) -> None:
    others = [path for path in stage_sources() if path.resolve() != family]
    name = family.stem.lower()
    assert [str(p) for p in others if name in p.read_text(encoding="utf-8").lower()] == []


def test_there_is_a_family() -> None:
    assert family_files()
