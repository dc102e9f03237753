from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.parity_fakes import FakeModel, fake_cases

from vlmport.api.parity import ParityOptions, check_source, parity, select_cases
from vlmport.api.progress import SilentProgress
from vlmport.contract import Manifest, SourceCheckpoint
from vlmport.errors import BundleError, CheckpointError, InputError, ParityError
from vlmport.manifest import file_entry, save_manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vlmport.api.builtin_cases import Case


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "tower").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tower" / "model.bin").write_bytes(b"weights")
    return folder


@pytest.fixture
def manifest(checkpoint: Path, sample_manifest: Manifest) -> Manifest:
    paths = (checkpoint / "config.json", checkpoint / "tower" / "model.bin")
    entries = tuple(file_entry(checkpoint, path) for path in paths)
    return replace(sample_manifest, source=SourceCheckpoint("original", "merged", entries))


def test_the_right_checkpoint_is_accepted(checkpoint: Path, manifest: Manifest) -> None:
    check_source(checkpoint, Path("bundle"), manifest, SilentProgress())


def test_another_checkpoint_is_refused_with_all_differences(
    checkpoint: Path, manifest: Manifest
) -> None:
    (checkpoint / "config.json").unlink()
    (checkpoint / "tower" / "model.bin").write_bytes(b"WEIGHTS")
    with pytest.raises(ParityError) as caught:
        check_source(checkpoint, Path("some bundle"), manifest, SilentProgress())
    message = str(caught.value)
    assert message.startswith(
        f"some bundle: was not made from {checkpoint}: config.json is missing"
    )
    assert "tower/model.bin has sha256" in message
    assert "names the checkpoint 'original'; compare it with that one" in message


def test_a_missing_checkpoint_is_not_called_another_one(manifest: Manifest) -> None:
    with pytest.raises(CheckpointError, match="missing: no such checkpoint"):
        check_source(Path("missing"), Path("bundle"), manifest, SilentProgress())


def test_a_file_of_another_size_is_told_without_hashing(
    checkpoint: Path, manifest: Manifest
) -> None:
    (checkpoint / "config.json").write_text("{ }")
    with pytest.raises(ParityError, match=r"config\.json has 3 bytes, the bundle's source had 2"):
        check_source(checkpoint, Path("bundle"), manifest, SilentProgress())


def test_cases_that_the_bundle_has_no_room_for_are_left_out() -> None:
    lengths = [len(FakeModel().encode(case)) for case in fake_cases()]
    kept, skipped = select_cases(fake_cases(), FakeModel(max_length=max(lengths)))
    assert len(kept) == 2
    assert skipped == (f"case 'two': {max(lengths)} prompt tokens; max_length {max(lengths)}",)


def test_no_case_at_all_is_an_error() -> None:
    with pytest.raises(ParityError, match=r"no case can be asked.*max_length 3.*larger --max-le"):
        select_cases(fake_cases(), FakeModel(max_length=3))


def test_cases_that_the_prompt_form_refuses_are_left_out_with_its_reason() -> None:
    class NeedsPictures(FakeModel):
        def encode(self, case: Case) -> NDArray[np.int64]:
            if not case.images:
                raise InputError("found no image")
            return super().encode(case)

    kept, skipped = select_cases(fake_cases(), NeedsPictures())
    assert [case.name for case in kept] == ["picture", "two"]
    assert skipped == ("case 'text': found no image",)


def test_no_tokens_cannot_be_compared(tmp_path: Path) -> None:
    options = ParityOptions(tmp_path, tmp_path, max_new_tokens=0)
    with pytest.raises(InputError, match="max_new_tokens: found 0; expected 1 or more"):
        parity(options, SilentProgress())


def test_a_folder_that_is_no_bundle_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such path"):
        parity(ParityOptions(checkpoint, tmp_path / "none"), SilentProgress())


class OpenedFake(FakeModel):
    backend = "a fake"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> OpenedFake:
    model = OpenedFake()
    monkeypatch.setattr("vlmport.api.parity_bundle.open_bundle", lambda *_: model)
    monkeypatch.setattr("vlmport.export.family.load_reference", lambda *_: model.reference)
    return model


def write_bundle(folder: Path, manifest: Manifest) -> Path:
    folder.mkdir()
    save_manifest(folder, manifest)
    return folder


def test_the_whole_way_gives_a_report(
    opened: OpenedFake, checkpoint: Path, manifest: Manifest, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "bundle", manifest)
    report = parity(ParityOptions(checkpoint, bundle, max_new_tokens=4), SilentProgress())
    assert report.verdict == "PASS"
    assert (report.bundle, report.checkpoint) == (str(bundle), str(checkpoint))
    assert (report.family, report.backend, report.precision) == ("imagined", "a fake", "float32")
    assert [len(case.steps) for case in report.cases] == [4] * 6
    assert {"vlmport", "python", "torch", "transformers"} <= set(report.versions)
    assert report.seconds > 0


def test_skipped_cases_stand_in_the_report(
    opened: OpenedFake, checkpoint: Path, manifest: Manifest, tmp_path: Path
) -> None:
    opened.max_length = 200
    bundle = write_bundle(tmp_path / "bundle", manifest)
    report = parity(ParityOptions(checkpoint, bundle), SilentProgress())
    assert len(report.skipped) == 2
    assert report.verdict == "PASS"
