"""Engines of a bundle: reuse, atomic folders, and everything that a user can get wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.engine_builds import small_options

from vlmport.api.build import LOG_NAME, BuildReport, build
from vlmport.api.build_options import build_options
from vlmport.api.progress import SilentProgress
from vlmport.contract import AttentionForm, Manifest, NativeSizeImages
from vlmport.contract_engines import ENGINES_NAME
from vlmport.engine_manifest import load_engine_set
from vlmport.errors import BundleError, EngineError
from vlmport.manifest import load_manifest, save_manifest
from vlmport.runtime.device.cuda import find_device
from vlmport.runtime.engines.plan_file import PlanFile

FOLDER = "tensorrt-rtx-{}-portable"
GRAPHS = ["vision_encoder", "projector", "embed_tokens", "decoder"]
ALL = [*GRAPHS, "select_greedy", "select_sampled"]


@pytest.fixture(scope="module")
def with_engines(trained_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with its engines; a test that changes it works on a copy."""
    bundle = tmp_path_factory.mktemp("bundles") / "bundle"
    shutil.copytree(trained_bundle, bundle)
    report = run(bundle)
    assert report.reused == ()
    return bundle


@pytest.fixture
def bundle(with_engines: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_engines, tmp_path / "bundle"))


@pytest.fixture
def bare(trained_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_bundle, tmp_path / "bundle"))


def run(bundle: Path, output: Path | None = None, jobs: int = 1, **changes: Any) -> BuildReport:
    options = replace(small_options(bundle), **changes)
    return build(bundle, options, SilentProgress(), output, jobs=jobs)


def files(folder: Path) -> dict[str, tuple[int, float]]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime) for path in found
    }


def test_everything_lies_in_one_folder(with_engines: Path) -> None:
    (folder,) = (with_engines / "engines").iterdir()
    engines = load_engine_set(folder)
    assert folder.name == FOLDER.format(engines.version)
    names = {path.name for path in folder.iterdir()}
    assert names == {*(f"{name}.engine" for name in ALL), ENGINES_NAME, LOG_NAME}
    assert [engine.graph for engine in engines.engines] == ALL
    assert (folder.stat().st_mode & 0o777) == 0o755
    log = (folder / LOG_NAME).read_text()
    assert "decoder: built in" in log
    assert "Int64 binding" in log  # all that was said, harmless or not
    assert engines.tools["tensorrt-rtx"] == engines.version


def test_unchanged_engines_are_left_alone(bundle: Path) -> None:
    before = files(bundle)
    report = run(bundle)
    assert list(report.reused) == ALL
    assert files(bundle) == before


def test_only_what_changes_is_built_again(bundle: Path) -> None:
    report = run(bundle, max_length=64, prefill_chunk=64)
    assert set(ALL) - set(report.reused) == {"embed_tokens", "decoder"}
    assert load_engine_set(report.folder) == report.engines
    decoder = report.engines.engine("decoder")
    assert {port.shape[2] for port in decoder.inputs if port.name.startswith("past")} == {64}


def test_a_changed_weight_is_noticed(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    place = bundle / "projector.onnx.data"
    content = bytearray(place.read_bytes())
    content[0] ^= 1
    place.write_bytes(content)
    with pytest.raises(BundleError, match=r"projector\.onnx\.data"):
        run(bundle)
    refresh(bundle, manifest)
    assert set(ALL) - set(run(bundle).reused) == {"projector"}


def refresh(bundle: Path, manifest: Manifest) -> None:
    from vlmport.manifest import file_entry

    entries = tuple(file_entry(bundle, bundle / entry.path) for entry in manifest.files)
    save_manifest(bundle, replace(manifest, files=entries))


def test_damaged_engines_are_built_again(bundle: Path) -> None:
    (folder,) = (bundle / "engines").iterdir()
    path = folder / "projector.engine"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (folder / "embed_tokens.engine").write_bytes(b"short")
    (folder / "select_greedy.engine").unlink()
    damaged = {"projector", "embed_tokens", "select_greedy"}
    assert set(ALL) - set(run(bundle).reused) == damaged
    assert run(bundle).reused == tuple(ALL)


def test_a_damaged_engine_json_is_replaced(bundle: Path) -> None:
    (folder,) = (bundle / "engines").iterdir()
    (folder / ENGINES_NAME).write_text('{"schema_version": 1')
    report = run(bundle)
    assert report.reused == ()
    assert load_engine_set(folder) == report.engines


def test_other_folders_stay(bundle: Path) -> None:
    other = bundle / "engines" / "tensorrt-9.9-sm89"
    other.mkdir()
    (other / ENGINES_NAME).write_text("{}")
    run(bundle, max_batch=2)
    assert (other / ENGINES_NAME).read_text() == "{}"
    assert len(list((bundle / "engines").iterdir())) == 2


def test_jobs_build_the_same_engines(bare: Path, with_engines: Path) -> None:
    (folder,) = (with_engines / "engines").iterdir()
    known = load_engine_set(folder)
    found = run(bare, jobs=3).engines
    for one, other in zip(known.engines, found.engines, strict=True):
        assert one.source_sha256 == other.source_sha256
        assert one.attention == other.attention
        assert (one.inputs, one.outputs) == (other.inputs, other.outputs)


def test_output_names_the_folder(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere" / "engines-of-mine"
    shutil.copytree(next((bundle / "engines").iterdir()), place)
    report = run(bundle, output=place)
    assert (report.folder, list(report.reused)) == (place, ALL)


def test_a_folder_of_something_else_is_not_replaced(bare: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "letter.txt").write_text("dear")
    with pytest.raises(EngineError, match=r"mine: holds no engines \(no engine\.json\)"):
        run(bare, output=place)
    assert (place / "letter.txt").read_text() == "dear"


def test_a_missing_bundle_is_named(tmp_path: Path, trained_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no such path; expected the folder of a bundle"):
        build(tmp_path / "none", small_options(trained_bundle), SilentProgress())


def test_options_out_of_range_are_refused_before_anything_is_done(bare: Path) -> None:
    with pytest.raises(EngineError, match=r"max_batch: found 0.*max_images: found 0"):
        run(bare, max_batch=0, max_images=0)
    with pytest.raises(EngineError, match="jobs: found 0; expected 1 or more"):
        run(bare, jobs=0)
    with pytest.raises(EngineError, match=r"found 9\.0; available are"):
        run(bare, compute_capabilities=("9.0",))
    assert not (bare / "engines").exists()


@pytest.mark.usefixtures("without_tensorrt")
def test_a_module_that_is_not_installed_is_named(bare: Path) -> None:
    with pytest.raises(EngineError, match=r"tensorrt: .*pip install 'vlmport\[tensorrt\]'"):
        run(bare, backend="tensorrt")


def test_a_timing_cache_that_does_nothing_is_said(bundle: Path, tmp_path: Path) -> None:
    options, place = small_options(bundle), tmp_path / "cache"
    report = build(bundle, options, SilentProgress(), timing_cache=place)
    assert len(report.remarks) == 1
    assert "TensorRT-RTX measures no kernels" in report.remarks[0]
    assert not place.exists()


def full_disk(times: int) -> Callable[[PlanFile, bytes], int]:
    """Writes that many pieces of engines; then a part of one."""
    write, left = PlanFile.write, [times]

    def written(plan: PlanFile, data: bytes) -> int:
        if left[0] == 0:
            plan.path.write_bytes(b"a part")
            plan.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(plan.path))
            return 0
        left[0] -= 1
        return write(plan, data)

    return written


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_full_disk_leaves_nothing(bare: Path, jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(bare)
    monkeypatch.setattr(PlanFile, "write", full_disk(3))
    with pytest.raises(EngineError, match=r"cannot be written \(No space left on device\)"):
        run(bare, jobs=jobs)
    assert files(bare) == before
    assert not (bare / "engines").exists()


def test_a_failed_build_leaves_what_was_there(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(bundle)
    monkeypatch.setattr(PlanFile, "write", full_disk(0))
    with pytest.raises(EngineError, match="No space left"):
        run(bundle, max_batch=2)
    assert files(bundle) == before


class Interrupting(SilentProgress):
    """Presses Ctrl-C as soon as the decoder's build begins to tell of itself."""

    def __init__(self) -> None:
        self.at_work = ""

    def start(self, description: str, total: int | None = None) -> None:
        self.at_work = description

    def advance(self, count: int, /) -> None:
        if self.at_work.endswith("decoder"):
            self.at_work = ""
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)


def test_an_interrupt_leaves_nothing(bare: Path) -> None:
    before, progress = files(bare), Interrupting()
    with pytest.raises(KeyboardInterrupt):
        build(bare, small_options(bare), progress)
    assert files(bare) == before
    assert not (bare / "engines").exists()
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_defaults_suit_the_bundle(sample_manifest: Manifest) -> None:
    causal = build_options(sample_manifest, "tensorrt-rtx")
    assert (causal.max_length, causal.prefill_chunk) == (1024, 512)
    assert (causal.max_batch, causal.max_images) == (4, 4)
    both_ways = replace(sample_manifest, attention=AttentionForm("bidirectional", 1))
    assert build_options(both_ways, "tensorrt-rtx").prefill_chunk == 1024
    tiles = NativeSizeImages("native_size", True, 32, 96, 16, "bilinear", None, None, None)
    assert build_options(replace(sample_manifest, image=tiles), "tensorrt-rtx").max_images == 5
    asked = build_options(
        sample_manifest, "tensorrt", max_batch=1, max_length=64, max_images=2, masking="mask"
    )
    assert (asked.max_batch, asked.max_length, asked.prefill_chunk) == (1, 64, 64)
    assert (asked.max_images, asked.masking, asked.backend) == (2, "mask", "tensorrt")


def test_engine_json_says_what_was_built(with_engines: Path) -> None:
    (folder,) = (with_engines / "engines").iterdir()
    content = json.loads((folder / ENGINES_NAME).read_text())
    assert content["options"]["backend"] == "tensorrt-rtx"
    device = find_device()
    assert content["device"] == ("" if device is None else device.name)
    assert {engine["graph"] for engine in content["engines"]} == set(ALL)
