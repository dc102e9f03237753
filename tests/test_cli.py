from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

import vlmport
from vlmport.cli import main as main_module
from vlmport.contract import Manifest
from vlmport.errors import InputError
from vlmport.manifest import save_manifest

VERBS = ("export", "parity", "generate", "client", "load", "inspect", "doctor")

RunCli = Callable[..., tuple[int, str, str]]


def test_help_lists_every_verb(run_cli: RunCli) -> None:
    code, out, _ = run_cli("--help")
    assert code == 0
    assert [verb for verb in VERBS if f" {verb} " not in out] == []


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example(run_cli: RunCli, verb: str) -> None:
    code, out, _ = run_cli(verb, "--help")
    assert code == 0
    assert f"$ vlmport {verb}" in out


FORMS = {
    "export": """CHECKPOINT BUNDLE --max-length --precision --overwrite --family-file --mask-decoder
        --prompt-template""",
    "parity": """CHECKPOINT BUNDLE --image --prompt --max-new-tokens --against --json --html
        --family-file""",
    "generate": """BUNDLE --image --prompt --messages --max-new-tokens --stop --json --temperature
        --seed --top-k --top-p --min-p --repetition-penalty --frequency-penalty
        --presence-penalty""",
    "client": """URL --image --prompt --messages --model --max-new-tokens --stop --timeout
        --priority --json --temperature --seed --top-k --top-p --min-p --repetition-penalty
        --frequency-penalty --presence-penalty""",
    "load": """URL --requests --image --prompt --model --max-new-tokens --clients --rate --count
        --duration --warm-up --seed --timeout --json""",
    "inspect": "BUNDLE --json",
    "doctor": "--json",
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_forms_that_scripts_rely_on(run_cli: RunCli, verb: str) -> None:
    _, out, _ = run_cli(verb, "--help")
    assert [word for word in FORMS[verb].split() if word not in out] == []


def test_the_version_is_printed(run_cli: RunCli) -> None:
    assert run_cli("--version") == (0, f"vlmport {vlmport.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("publish",),
        ("export", "only-one"),
        ("export", "a", "b", "--max-length", "many"),
        ("generate", "bundle", "--promt", "typo"),
        ("generate", "bundle"),
        ("generate", "bundle", "--prompt", "a", "--messages", "b.json"),
    ],
)
def test_wrong_usage_exits_with_2(run_cli: RunCli, arguments: tuple[str, ...]) -> None:
    code, out, err = run_cli(*arguments)
    assert code == 2
    assert out == ""
    assert "Usage" in err


def test_our_errors_exit_with_1_and_no_traceback(run_cli: RunCli, tmp_path: Path) -> None:
    code, out, err = run_cli("inspect", tmp_path / "absent")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "no such path; expected the folder of a bundle" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("image: broken"), 1, "error: image: broken\n"),
        (OSError(errno.ENOSPC, "No space left on device", "b.onnx"), 1, "b.onnx: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "error: x: Permission denied"),
        (MemoryError(), 1, "error: not enough memory"),
        (ModuleNotFoundError("", name="torch._C"), 1, "pip install 'vlmport[export]'"),
        (ModuleNotFoundError("", name="onnxruntime"), 1, "pip install 'vlmport[cpu]'"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_faults_of_the_machine_and_the_user_become_messages(
    run_cli: RunCli,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(main_module, "app", raiser(error))
    found, _, err = run_cli("doctor")
    assert found == code
    assert message in err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a fault of ours"),
        OSError(errno.EBADF, "Bad file descriptor"),
        ModuleNotFoundError("", name="vlmport.absent"),
    ],
)
def test_faults_of_ours_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(main_module, "app", raiser(error))
    with pytest.raises(type(error)):
        main_module.main()


def raiser(error: BaseException) -> Callable[..., NoReturn]:
    def fail(**_: object) -> NoReturn:
        raise error

    return fail


def test_inspect_shows_a_manifest(
    run_cli: RunCli, tmp_path: Path, sample_manifest: Manifest
) -> None:
    save_manifest(tmp_path, sample_manifest)
    code, out, err = run_cli("inspect", tmp_path)
    assert (code, err) == (0, "")
    for words in ("llama + siglip", "512 B a token", "vision_encoder", "MatMul:12", "resize to 32"):
        assert words in out
    code, out, _ = run_cli("inspect", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["manifest"]["family"] == "imagined"


def test_doctor_prints_one_json_object(run_cli: RunCli) -> None:
    code, out, _ = run_cli("doctor", "--json")
    assert code == 0
    assert json.loads(out)["vlmport"] == vlmport.__version__


@pytest.mark.parametrize(("verdict", "code"), [("PASS", 0), ("NEAR_TIE", 0), ("FAIL", 1)])
def test_the_exit_code_of_parity_follows_its_verdict(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, verdict: str, code: int
) -> None:
    report = SimpleNamespace(verdict=verdict)
    quantized = "vlmport.api.quantized_parity"
    monkeypatch.setattr(f"{quantized}.has_integer_layers", lambda _: False)
    monkeypatch.setattr("vlmport.api.parity.parity", lambda *_: report)
    monkeypatch.setattr("vlmport.api.parity_render.print_report", lambda *_: None)
    assert run_cli("parity", "checkpoint", "bundle")[0] == code
    monkeypatch.setattr(f"{quantized}.has_integer_layers", lambda _: True)
    monkeypatch.setattr(f"{quantized}.quantized_parity", lambda *_: report)
    monkeypatch.setattr("vlmport.api.quantized_render.print_quantized_report", lambda *_: None)
    assert run_cli("parity", "checkpoint", "bundle")[0] == code


def test_parity_tells_that_there_is_no_bundle(run_cli: RunCli, tmp_path: Path) -> None:
    code, _, error = run_cli("parity", tmp_path, tmp_path / "nothing")
    assert code == 1
    assert "nothing" in error


def test_an_unknown_precision_is_wrong_usage(run_cli: RunCli, tmp_path: Path) -> None:
    code, out, err = run_cli("export", tmp_path, tmp_path / "bundle", "--precision", "int4")
    assert (code, out) == (2, "")
    assert "'--precision'" in err
    assert all(known in err for known in ("fp32", "fp16", "bf16"))
