from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from vlmport.api.triton_folder import MARKER_NAME

if TYPE_CHECKING:
    from conftest import RunCli


def test_writes_a_repository_and_says_what_is_in_it(
    trained_bundle: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    folder = tmp_path / "new" / "repository"
    code, out, err = run_cli("triton", trained_bundle, folder, "--backend", "onnxruntime")
    assert (code, out.splitlines()[0]) == (0, f"{folder}: 6 models")
    assert "vision_encoder" in out
    assert "build_engines" not in out
    assert "writing the repository" in err
    assert (folder / MARKER_NAME).is_file()

    code, out, _ = run_cli("triton", trained_bundle, tmp_path / "t", "--backend", "tensorrt")
    assert code == 0
    assert f"next, where the server will run: {tmp_path}/t/build_engines.sh" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "tensort"), "backend: found 'tensort'; did you mean tensorrt?"),
        (("--device", "tpu"), "device: found 'tpu'; did you mean gpu, cpu?"),
        (("--backend", "tensorrt", "--device", "cpu"), "TensorRT computes on a GPU alone"),
        (("--name", "a/b"), "name: found 'a/b'; expected at most 128 letters"),
        (("--name", ".hidden"), "name: found '.hidden'"),
        (("--name", ""), "name: found ''"),
        (("--name", "x" * 129), "choose another one"),
        (("--instances", "0"), "instances: found 0; expected 1 or more"),
        (("--max-batch", "0", "--instances", "-1"), "max_batch: found 0; expected 1 or more"),
    ],
)
def test_refuses_options_that_cannot_be(
    arguments: tuple[str, ...], message: str, trained_bundle: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    code, out, err = run_cli("triton", trained_bundle, tmp_path / "repository", *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_replaces_its_own_repositories_alone(
    trained_bundle: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    folder = tmp_path / "repository"
    assert run_cli("triton", trained_bundle, folder)[0] == 0
    (folder / "left over").touch()
    code, _, err = run_cli("triton", trained_bundle, folder)
    assert code == 1
    assert "exists already; pass --overwrite" in err
    assert (folder / "left over").exists()
    assert run_cli("triton", trained_bundle, folder, "--overwrite", "--name", "other")[0] == 0
    assert not (folder / "left over").exists()
    assert (folder / "other").is_dir()
    assert not (folder / "vlm").exists()

    others = tmp_path / "others"
    others.mkdir()
    (others / "photo.jpg").touch()
    (others / MARKER_NAME).write_text("[]", encoding="utf-8")
    file = tmp_path / "file"
    file.touch()
    link = tmp_path / "link"
    link.symlink_to(folder)
    for place, words in ((others, "no repository that vlmport wrote"), (file, "is no folder")):
        code, _, err = run_cli("triton", trained_bundle, place, "--overwrite")
        assert code == 1
        assert words in err
    assert "is no folder" in run_cli("triton", trained_bundle, link, "--overwrite")[2]
    assert (others / "photo.jpg").exists()
    assert file.is_file()


def test_refuses_a_damaged_bundle(trained_bundle: Path, tmp_path: Path, run_cli: RunCli) -> None:
    bundle = shutil.copytree(trained_bundle, tmp_path / "bundle")
    weights = bundle / "projector.onnx.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    code, _, err = run_cli("triton", bundle, tmp_path / "repository")
    assert code == 1
    assert "projector.onnx.data: sha256" in err
    assert "none: no such path" in run_cli("triton", tmp_path / "none", tmp_path / "r")[2]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_leaves_nothing_behind_when_the_disk_is_full(
    trained_bundle: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "repository"
    assert run_cli("triton", trained_bundle, folder)[0] == 0
    copied: list[object] = []
    real = shutil.copyfile

    def full(source: Path, target: Path) -> object:
        if len(copied) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        copied.append(source)
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    code, _, err = run_cli("triton", trained_bundle, folder, "--overwrite", "--name", "other")
    assert code == 1
    assert f"{folder}: cannot be written (No space left on device)" in err
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]
    assert (folder / "vlm").is_dir()  # the old one is as it was


def test_an_interrupt_leaves_nothing_behind(
    trained_bundle: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, target: Path) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    assert run_cli("triton", trained_bundle, tmp_path / "repository")[0] == 130
    assert list(tmp_path.iterdir()) == []
