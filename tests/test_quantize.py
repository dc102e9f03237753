"""`vlmport quantize` from end to end, on a trained checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmport.manifest import load_manifest, verify_files
from vlmport.runtime import VisionLanguageModel

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
QUESTIONS = EXAMPLES / "questions" / "heldout.jsonl"

RunCli = Callable[..., tuple[int, str, str]]
Quantize = Callable[..., Path]


@pytest.fixture
def quantize(run_cli: RunCli, trained_bundle: Path, tmp_path: Path) -> Quantize:
    """Runs the command on the trained bundle, which has to succeed."""

    def run(*arguments: str | Path) -> Path:
        out = tmp_path / "out"
        data = ("--calibration", QUESTIONS, "--samples", "6")
        code, _, err = run_cli("quantize", trained_bundle, out, *data, *arguments)
        assert code == 0, err
        verify_files(out, load_manifest(out), hashes=True)
        return out

    return run


def shares(bundle: Path, source: Path) -> dict[str, float]:
    before = {graph.name: graph.parameter_bytes for graph in load_manifest(source).graphs}
    return {
        graph.name: graph.parameter_bytes / before[graph.name]
        for graph in load_manifest(bundle).graphs
    }


def answers(bundle: Path) -> list[str]:
    model = VisionLanguageModel.load(bundle)
    entries = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return [
        model.generate(
            images=[QUESTIONS.parent / entry["image"]], prompt=entry["text"], max_new_tokens=24
        ).text
        for entry in entries
    ]


@pytest.mark.parametrize(
    ("precision", "decoder_share", "stays_equal"),
    [
        ("int8", 0.27, 0.9),
        ("int8-weight-only", 0.27, 0.9),
        ("int4", 0.16, 0.8),
        ("fp16", 0.51, 1.0),
    ],
)
def test_answers_of_each_precision(
    quantize: Quantize,
    trained_bundle: Path,
    precision: str,
    decoder_share: float,
    stays_equal: float,
) -> None:
    out = quantize("--precision", precision)
    assert shares(out, trained_bundle)["decoder"] <= decoder_share
    expected, found = answers(trained_bundle), answers(out)
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    assert same >= stays_equal * len(expected), list(zip(expected, found, strict=True))


def test_a_precision_for_each_graph(quantize: Quantize, trained_bundle: Path) -> None:
    out = quantize("--decoder", "int4", "--vision-encoder", "fp16")
    manifest = load_manifest(out)
    assert manifest.precision == "float32"
    assert manifest.quantization is not None
    computes = {graph.graph: graph.compute for graph in manifest.quantization.graphs}
    assert computes == {"vision_encoder": "float16", "decoder": "float32"}
    found = shares(out, trained_bundle)
    assert found["projector"] == 1.0
    assert found["decoder"] <= 0.16
    assert 0.49 < found["vision_encoder"] < 0.51
    assert {spec.dtype for spec in manifest.graph("vision_encoder").outputs} == {"float32"}
    assert answers(out)


def test_a_bundle_in_half_precision_says_so(quantize: Quantize) -> None:
    manifest = load_manifest(quantize("--precision", "bf16"))
    assert manifest.precision == "bfloat16"
    assert manifest.kv_layout.dtype == "bfloat16"
    assert manifest.graph("decoder").outputs[0].dtype == "float32"


def test_a_float32_decoder_may_keep_its_cache_in_float16(
    quantize: Quantize, trained_bundle: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    out = quantize("--decoder", "int8-weight-only", "--kv-cache", "fp16")
    manifest = load_manifest(out)
    assert (manifest.precision, manifest.kv_layout.dtype) == ("float32", "float16")
    assert answers(out) == answers(trained_bundle)
    half = quantize("--precision", "fp16", "--overwrite")
    code, _, err = run_cli("quantize", half, tmp_path / "again", "--kv-cache", "fp16")
    assert code == 1
    assert "leave --kv-cache out" in " ".join(err.split())


def test_the_recipe_in_a_bundle_makes_it_again(
    quantize: Quantize, run_cli: RunCli, trained_bundle: Path, tmp_path: Path
) -> None:
    first = quantize("--precision", "int8")
    data = ("--calibration", QUESTIONS, "--samples", "6")
    again = tmp_path / "again"
    recipe = ("--recipe", first / "recipe.json")
    code, _, err = run_cli("quantize", trained_bundle, again, *data, *recipe)
    assert code == 0, err
    assert (again / "decoder.onnx.data").read_bytes() == (first / "decoder.onnx.data").read_bytes()


def test_named_modules_stay_in_float(quantize: Quantize, tmp_path: Path) -> None:
    names = tmp_path / "keep.txt"
    names.write_text("# the head\n*.lm_head\n\n*.layers.0.mlp.*\n", encoding="utf-8")
    out = quantize("--precision", "int8-weight-only", "--keep-float", names)
    parts = json.loads((out / "quantization.json").read_text())["graphs"]
    report = {part["graph"]: part for part in parts}
    formats = report["decoder"]["formats"]
    kept = sorted(name for name, form in formats.items() if form == "float")
    assert kept == [
        "language_model.lm_head",
        "language_model.model.layers.0.mlp.down_proj",
        "language_model.model.layers.0.mlp.gate_proj+up_proj",
    ]


def test_a_stopped_calibration_is_not_repeated(
    quantize: Quantize, run_cli: RunCli, trained_bundle: Path, tmp_path: Path
) -> None:
    state = tmp_path / "statistics"
    out = quantize("--precision", "int8", "--statistics", state)
    assert state.is_file()
    data = ("--calibration", QUESTIONS, "--samples", "6", "--statistics", state)
    again = tmp_path / "again"
    code, _, err = run_cli("quantize", trained_bundle, again, "--precision", "int8", *data)
    assert code == 0, err
    assert (again / "decoder.onnx").read_bytes() == (out / "decoder.onnx").read_bytes()


def refusals(tmp_path: Path) -> dict[str, tuple[tuple[str | Path, ...], str]]:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "picture.png").write_bytes(b"no picture")
    rule = {"modules": "*.layers.99.*", "format": "float"}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"graphs": [{"graph": "decoder", "rules": [rule]}]}))
    names = tmp_path / "names.txt"
    names.write_text("*.layers.0.mlp.down_porj\n")
    int8: tuple[str | Path, ...] = ("--precision", "int8")
    return {
        "nothing asked": ((), "precision: found none; give --precision"),
        "both asked": ((*int8, "--recipe", recipe), "and precisions beside it"),
        "rule of nothing": (("--recipe", recipe), r"'*.layers.99.*' of decoder names no layer"),
        "pattern of nothing": ((*int8, "--keep-float", names), "did you mean"),
        "no data": ((*int8, "--calibration", empty), str(empty)),
        "no picture": ((*int8, "--calibration", broken), "picture.png"),
        "no samples": ((*int8, "--samples", "0"), "samples: found 0"),
        "no recipe": (("--recipe", tmp_path / "none.json"), "cannot be read"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "nothing asked",
        "both asked",
        "rule of nothing",
        "pattern of nothing",
        "no data",
        "no picture",
        "no samples",
        "no recipe",
    ],
)
def test_refusals_leave_nothing_behind(
    run_cli: RunCli, trained_bundle: Path, tmp_path: Path, case: str
) -> None:
    arguments, expected = refusals(tmp_path)[case]
    place = tmp_path / "place"
    place.mkdir()
    code, out, err = run_cli("quantize", trained_bundle, place / "out", *arguments)
    assert (code, out) == (1, "")
    assert expected in " ".join(err.split())
    assert list(place.iterdir()) == []


def test_a_quantized_bundle_is_not_quantized_again(
    quantize: Quantize, run_cli: RunCli, tmp_path: Path
) -> None:
    out = quantize("--precision", "int8-weight-only")
    code, _, err = run_cli("quantize", out, tmp_path / "twice", "--precision", "int4")
    assert code == 1
    assert "is quantized already (int8-weight-only)" in " ".join(err.split())


def test_a_place_that_is_taken_is_told_first(
    run_cli: RunCli, trained_bundle: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    shutil.copytree(trained_bundle, taken)
    code, _, err = run_cli("quantize", trained_bundle, taken, "--precision", "int8")
    assert code == 1
    assert "exists already; pass --overwrite" in " ".join(err.split())


def test_a_budget_keeps_the_most_harmful_layers_in_float(
    quantize: Quantize, trained_bundle: Path
) -> None:
    out = quantize(
        "--decoder",
        "int4",
        "--rounding",
        "nearest",
        "--block-size",
        "128",
        "--accuracy-budget",
        "0",
    )
    budget = json.loads((out / "quantization.json").read_text())["budget"]
    ranking = [damage["group"]["name"] for damage in budget["ranking"]]
    kept = [group["name"] for group in budget["budget"]["kept"]]
    assert len(ranking) == 17
    assert kept == ranking[: len(kept)]
    assert len(kept) < len(ranking)
    assert budget["budget"]["lost_percent"] == 0.0
    assert answers(out) == answers(trained_bundle)
