"""Families that are defined outside the package: from a file and from an installed distribution."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from support.checkpoints import make_tokenizer, random_weights, vision_config
from torch import nn

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.errors import CheckpointError, ExportError
from vlmport.export.family import discover_families, plan_checkpoint

RunCli = Callable[..., tuple[int, str, str]]

REPOSITORY = Path(__file__).resolve().parents[2]
TOY = REPOSITORY / "tests" / "support" / "toy_vlm.py"
TRAINED = REPOSITORY / "examples" / "tinyllava"
CLASHING = """
from vlmport.export.family import Family

FAMILY = Family(name="other", model_types=("{model_type}",), plan=None)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the toy family with random weights."""
    folder = tmp_path_factory.mktemp("toy") / "checkpoint"
    folder.mkdir()
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=160,
        vocab_size=320,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = vision_config("siglip")
    parts = {
        "tower": transformers.AutoModel.from_config(vision),
        "projector": nn.Linear(vision.hidden_size, text.hidden_size),
        "text": transformers.AutoModelForCausalLM.from_config(text),
    }
    state = {
        f"{prefix}.{name}": value.detach()
        for prefix, module in parts.items()
        for name, value in random_weights(module).named_parameters()
    }
    save_file(state, folder / "model.safetensors")
    sections = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    config = {"model_type": "toy_vlm", **sections}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    make_tokenizer(folder)
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path, as pip installs into; its modules are forgotten at the end."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) == str(folder / f"{name}.py"):
            del sys.modules[name]


def install(site: Path, module: str, source: str, distribution: str, target: str = "") -> None:
    """What pip leaves of a distribution that offers one family."""
    (site / f"{module}.py").write_text(source, "utf-8")
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.4\nName: {distribution}\nVersion: 1.0\n"
    (info / "METADATA").write_text(metadata, "utf-8")
    points = f"[vlmport.families]\n{module} = {target or module + ':FAMILY'}\n"
    (info / "entry_points.txt").write_text(points, "utf-8")
    importlib.invalidate_caches()


def check_that_it_answers_as_pytorch(
    run_cli: RunCli, checkpoint: Path, bundle: Path, picture: Path, *options: str | Path
) -> None:
    code, out, err = run_cli("export", checkpoint, bundle, *options)
    assert (code, "llama + siglip, linear" in out) == (0, True), err
    code, out, _ = run_cli("parity", checkpoint, bundle, *options)
    assert code == 0
    assert "PASS" in out
    # The bundle is complete in itself: to ask it, the family is not needed any more.
    asked = ("--image", picture, "--prompt", "What is in the picture?")
    code, out, _ = run_cli("generate", bundle, *asked, "--max-new-tokens", "8", "--json")
    answer = json.loads(out)
    assert (code, answer["generated_tokens"], answer["image_tokens"]) == (0, 8, 16)
    code, out, _ = run_cli("inspect", bundle, "--json")
    assert json.loads(out)["manifest"]["family"] == "toy"


def test_a_family_file_is_exported_asked_and_compared(
    run_cli: RunCli, checkpoint: Path, picture: Path, tmp_path: Path
) -> None:
    own = tmp_path / "my family.py"  # outside the package, and no name of a module
    shutil.copyfile(TOY, own)
    option = ("--family-file", own)
    check_that_it_answers_as_pytorch(run_cli, checkpoint, tmp_path / "bundle", picture, *option)


def test_an_installed_family_is_exported_asked_and_compared(
    run_cli: RunCli, checkpoint: Path, picture: Path, tmp_path: Path, site: Path
) -> None:
    install(site, "toy_vlm", TOY.read_text("utf-8"), "toy-vlm")
    check_that_it_answers_as_pytorch(run_cli, checkpoint, tmp_path / "bundle", picture)


def test_without_the_file_the_family_is_not_known(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_type 'toy_vlm'; known: .*llava"):
        plan_checkpoint(checkpoint)


def test_a_file_and_an_installed_family_that_clash_are_both_named(
    checkpoint: Path, tmp_path: Path, site: Path
) -> None:
    install(site, "toy_vlm", TOY.read_text("utf-8"), "toy-vlm")
    other = tmp_path / "other.py"
    other.write_text(CLASHING.format(model_type="toy_vlm"))
    message = (
        r"model_type 'toy_vlm': found 2 families: 'toy' \(entry point 'toy_vlm' of toy-vlm 1\.0\) "
        r"and 'other' \(.*other\.py\); expected one"
    )
    with pytest.raises(ExportError, match=message):
        plan_checkpoint(checkpoint, other)
    assert plan_checkpoint(TRAINED, other)[0].name != "other"


def test_a_file_that_claims_a_model_type_of_the_package_is_an_error(tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(CLASHING.format(model_type="tinyllava"))
    message = r"'tinyllava': found 2 families: .* \(vlmport's own .*\.py\) and 'other' \(.*\.py\)"
    with pytest.raises(ExportError, match=message):
        export(ExportOptions(TRAINED, tmp_path / "b", family_file=other), SilentProgress())
    assert not (tmp_path / "b").exists()


def test_one_family_under_two_entry_points_is_no_clash(checkpoint: Path, site: Path) -> None:
    install(site, "toy_vlm", TOY.read_text("utf-8"), "toy-vlm")
    install(site, "alias", "", "toy-alias", "toy_vlm:FAMILY")
    assert plan_checkpoint(checkpoint)[0].name == "toy"


@pytest.mark.parametrize(
    ("source", "target", "fault"),
    [
        ("import absent_module", "", r"ModuleNotFoundError: No module named 'absent_module'"),
        ("x = 1\nx / 0", "", r"ZeroDivisionError: division by zero \(.*broken\.py, line 2\)"),
        ("x = (", "", r"SyntaxError: '\(' was never closed"),
        ("FAMILY = 1", "", r"is a int; expected a vlmport\.export\.family\.Family"),
        ("", "broken:FAMILY", r"AttributeError: module 'broken' has no attribute 'FAMILY'"),
        (CLASHING.replace('("{model_type}",)', '"toy"'), "", "model_types 'toy'; expected a tuple"),
    ],
)
def test_a_broken_entry_point_is_named_and_breaks_nothing_else(
    source: str,
    target: str,
    fault: str,
    checkpoint: Path,
    site: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(site, "broken", source, "broken-vlm", target)
    install(site, "toy_vlm", TOY.read_text("utf-8"), "toy-vlm")
    assert plan_checkpoint(checkpoint)[0].name == "toy"
    assert "entry point 'broken' of broken-vlm 1.0" in caplog.text
    shutil.rmtree(site / "toy_vlm-1.0.dist-info")
    message = rf"families that cannot be used: entry point 'broken' of broken-vlm 1\.0: .*{fault}"
    with pytest.raises(CheckpointError, match=message):
        plan_checkpoint(checkpoint)


def test_a_broken_entry_point_shows_no_traceback(
    run_cli: RunCli, checkpoint: Path, tmp_path: Path, site: Path
) -> None:
    install(site, "broken", "raise RuntimeError", "broken-vlm")
    code, _, err = run_cli("export", checkpoint, tmp_path / "bundle")
    assert code == 1
    assert "broken-vlm 1.0" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("absent.py", None, "no such file; expected a Python file that defines FAMILY"),
        ("family.txt", "", "not a Python file; expected one that ends in .py"),
        ("family.py", "", "defines no FAMILY; expected FAMILY = Family"),
        ("family.py", "FAMILY = 1", "FAMILY is a int; expected a vlmport.export.family.Family"),
        ("family.py", "\n\nabsent", r"NameError: name 'absent' is not defined (.*, line 3)"),
        ("family.py", "x = (", "SyntaxError: '(' was never closed"),
    ],
)
def test_a_family_file_that_cannot_be_used_is_an_error(
    name: str, source: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if source is not None:
        path.write_text(source)
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ExportError, match=pattern) as caught:
        discover_families(path)
    assert str(caught.value).startswith(str(path))
