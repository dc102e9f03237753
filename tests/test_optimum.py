"""Under optimum: its own command line, its TasksManager, and the wheel that carries both files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vlmport.api.optimum_tasks import EXPORTER, TASK, BundleExporterConfig
from vlmport.export.family import discover_families
from vlmport.manifest import load_manifest

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINED_CHECKPOINT = REPOSITORY / "examples" / "tinyllava"
PACKAGED = ("src", "export", "graphs", "calibration", "runtime")


def optimum_cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs optimum's own command."""
    command = Path(sys.executable).with_name("optimum-cli")
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(
        [command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_optimum_lists_the_export() -> None:
    finished = optimum_cli("export", "--help")
    assert finished.returncode == 0
    assert re.search(r"^ +vlmport +Export a vision-language model", finished.stdout, re.MULTILINE)


def test_optimum_offers_every_option_of_the_export() -> None:
    vlmport = subprocess.run(
        [sys.executable, "-m", "vlmport", "export", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = set(re.findall(r"--[a-z][a-z-]+", vlmport.stdout)) | {"--model"}
    finished = optimum_cli("export", "vlmport", "--help")
    assert finished.returncode == 0
    assert {"--max-length", "--overwrite", "--help"} <= wanted
    assert wanted <= set(re.findall(r"--[a-z][a-z-]+", finished.stdout))


def test_optimum_exports_what_vlmport_exports(trained_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    options = ("--max-length", "200", "--overwrite")
    finished = optimum_cli("export", "vlmport", "--model", TRAINED_CHECKPOINT, bundle, *options)
    assert finished.returncode == 0, finished.stderr
    assert f"{bundle}: llama + siglip" in finished.stdout
    assert "tracing decoder\n" in finished.stderr
    found, wanted = load_manifest(bundle), load_manifest(trained_bundle)
    assert found.files == wanted.files  # with their hashes
    assert found.dimensions.max_length == 200


@pytest.mark.parametrize(
    ("model", "options", "code", "message"),
    [
        ("absent", (), 1, "error: absent: no such checkpoint; expected a folder"),
        (TRAINED_CHECKPOINT, ("--max-length", "0"), 1, "error: max_length: found 0; the model"),
        (TRAINED_CHECKPOINT, ("--family-file", "no.py"), 1, "error: no.py: no such file"),
        (TRAINED_CHECKPOINT, ("--max-length", "many"), 2, "Invalid value for '--max-length'"),
        (TRAINED_CHECKPOINT, ("--max-lenth-x", "1"), 2, "unrecognized arguments: --max-lenth-x"),
    ],
)
def test_faults_end_as_in_vlmport(
    model: str | Path, options: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    finished = optimum_cli("export", "vlmport", "--model", model, tmp_path / "bundle", *options)
    assert (finished.returncode, finished.stdout) == (code, "")
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "bundle").exists()


def test_the_tasks_manager_knows_every_model_type() -> None:
    from optimum.exporters.tasks import TasksManager

    import optimum.exporters.vlmport

    assert optimum.exporters.vlmport.BundleExporterConfig is BundleExporterConfig
    model_types = set(discover_families().entries)
    assert {"tinyllava", "llava"} <= model_types
    assert model_types <= set(TasksManager.get_supported_model_type_for_task(TASK, EXPORTER))
    config = json.loads((TRAINED_CHECKPOINT / "config.json").read_text("utf-8"))
    constructor = TasksManager.get_exporter_config_constructor(
        EXPORTER, model_type=config["model_type"], task=TASK, library_name="transformers"
    )
    assert constructor(config) == BundleExporterConfig(config, TASK)
    with pytest.raises(ValueError, match="doesn't support task fill-mask for the vlmport backend"):
        TasksManager.get_exporter_config_constructor(
            EXPORTER, model_type="llava", task="fill-mask", library_name="transformers"
        )


def test_the_wheel_carries_the_files_for_optimum_and_no_other_name(tmp_path: Path) -> None:
    # A copy, because a build leaves folders behind.
    copy = tmp_path / "repository"
    copy.mkdir()
    for folder in PACKAGED:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / folder, copy / folder, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copyfile(REPOSITORY / file, copy / file)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "-w", tmp_path, copy], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vlmport-*.whl")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    ours = [name for name in names if not name.startswith("vlmport/")]
    assert sorted(ours) == [
        "optimum/commands/register/register_vlmport.py",
        "optimum/exporters/vlmport.py",
    ]
    sources = [p for f in PACKAGED[1:] for p in (REPOSITORY / f).rglob("*.py")]
    missing = [p for p in sources if f"vlmport/{p.relative_to(REPOSITORY)}" not in names]
    assert missing == []
