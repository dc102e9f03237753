"""A repository says of its models what their graphs are, and has everything inside."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.trained import exported, quantized
from support.triton_configs import (
    BACKENDS,
    CHECKPOINTS,
    config_of,
    configs_of,
    dims_of,
    graph_ports,
    repository,
    type_of,
    written,
)

from vlmport.api.triton_folder import MARKER_NAME
from vlmport.api.triton_texts import _COMMON, _OF_BACKEND
from vlmport.contract import IMAGE_GRAPHS
from vlmport.errors import InputError
from vlmport.manifest import file_entry, load_manifest
from vlmport.runtime.triton_model.parameters import read_parameters

SOURCE = Path(__file__).resolve().parents[2]
GRAPHS = (*IMAGE_GRAPHS, "embed_tokens")
BATCHED = ("num_images", "num_tiles", "batch")


def onnx_file(folder: Path, backend: str, graph: str) -> Path:
    """Where the variant has the graph that its model runs."""
    if backend == "onnxruntime":
        return folder / graph / "1" / "model.onnx"
    if backend == "tensorrt":
        home = "vlm" if graph == "embed_tokens" else graph
        return folder / home / "1" / "source" / f"{graph}.onnx"
    return folder / "vlm" / "1" / "bundle" / f"{graph}.onnx"


def check_ports(config: Any, path: Path) -> None:
    """Compares a configuration with a graph, port by port."""
    inputs, outputs = graph_ports(path)
    for found, expected in ((config.input, inputs), (config.output, outputs)):
        assert [port.name for port in found] == list(expected)
        for port in found:
            dtype, shape = expected[port.name]
            assert port.data_type == type_of(dtype), port.name
            assert list(port.dims) == dims_of(shape, config.max_batch_size), port.name


def check_graph_models(folder: Path, backend: str) -> None:
    configs = configs_of(folder)
    graphs = [graph for graph in GRAPHS if graph in configs]
    assert graphs[-2:] == ["projector", "embed_tokens"]
    for graph in graphs:
        path = onnx_file(folder, backend, graph)
        check_ports(configs[graph], path)
        axes = {shape[0] for ports in graph_ports(path) for _, shape in ports.values()}
        is_batched = len(axes) == 1 and axes <= set(BATCHED)
        assert (configs[graph].max_batch_size > 0) == is_batched
        assert configs[graph].HasField("dynamic_batching") == is_batched


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_configurations_agree_with_the_graphs(checkpoint: str, backend: str) -> None:
    folder = repository(checkpoint, backend)
    check_graph_models(folder, backend)
    platforms = {"python": "", "onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
    kind = "KIND_CPU" if backend == "python" else "KIND_GPU"
    for name, config in configs_of(folder).items():
        assert config.name == name
        assert config.version_policy.latest.num_versions == 1
        assert (folder / name / "1").is_dir()
        if name in GRAPHS:
            assert (config.backend, config.platform) == (backend, platforms[backend])
            (group,) = config.instance_group
            assert (group.count, group.kind) == (1, type(group).Kind.Value(kind))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_configurations_follow_the_precision(precision: str, tmp_path: Path) -> None:
    bundle = exported("tinyllava", "fp16")
    if precision == "int8":
        bundle = quantized("tinyllava", exported("tinyllava"), "int8", tmp_path / "int8")
    for backend in ("onnxruntime", "tensorrt"):
        folder = written(bundle, tmp_path / backend, backend)
        check_graph_models(folder, backend)
        (port,) = config_of(folder / "projector").output
        assert port.data_type == type_of("float16" if precision == "fp16" else "float32")


def test_bfloat16_stays_with_backends_that_have_it(tmp_path: Path) -> None:
    bundle = shutil.copytree(exported("tinyllava"), tmp_path / "bundle")
    graphs = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    text = json.dumps(graphs).replace('"float32"', '"bfloat16"')
    outside = ("pixel_values", "logits")  # float32 in every precision
    for name in outside:
        text = text.replace(f'"{name}", "dtype": "bfloat16"', f'"{name}", "dtype": "float32"')
    (bundle / "manifest.json").write_text(text, encoding="utf-8")
    folder = written(bundle, tmp_path / "repository", "onnxruntime")
    configs = configs_of(folder)
    assert configs["vision_encoder"].input[0].data_type == type_of("float32")
    assert configs["projector"].input[0].data_type == type_of("bfloat16")
    assert configs["features"].output[0].data_type == type_of("bfloat16")
    # A Python model cannot take bfloat16 arrays: the main one runs the image graphs itself.
    assert configs["vlm"].parameters["image_graphs"].string_value == "in_process"
    assert (folder / "vlm/1/bundle/projector.onnx").is_file()
    for options in ({"backend": "python"}, {"backend": "onnxruntime", "device": "cpu"}):
        with pytest.raises(InputError, match=r"found a bfloat16 bundle for .*--precision fp16"):
            written(bundle, tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_answering_model_takes_text_and_pictures(checkpoint: str) -> None:
    folder = repository(checkpoint, "python")
    config = config_of(folder / "vlm")
    assert (config.backend, config.max_batch_size) == ("python", 0)
    assert config.model_transaction_policy.decoupled
    assert all(port.optional for port in config.input)
    shapes = {port.name: (port.data_type, list(port.dims)) for port in config.input}
    text, flag = type_of("object"), type_of("bool")
    assert shapes == {
        "text_input": (text, [1]),
        "messages": (text, [1]),
        "image": (text, [-1]),
        "stop": (text, [-1]),
        "stream": (flag, [1]),
    }
    assert [port.name for port in config.output] == [
        "text_output",
        "token_ids",
        "finish_reason",
        "prompt_tokens",
        "image_tokens",
        "generated_tokens",
        "regions",
    ]
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert parameters["image_graphs"] == "in_process"
    models = json.loads(parameters["models"])
    assert models == {graph: graph for graph in IMAGE_GRAPHS if graph in configs_of(folder)}
    home = folder / "vlm" / "1"
    assert load_manifest(home / parameters["bundle"]).image_graphs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_ensemble_fits_together(checkpoint: str, backend: str) -> None:
    configs = configs_of(repository(checkpoint, backend))
    ensemble = configs["features"]
    tensors = {port.name: (port.data_type, list(port.dims)) for port in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        config = configs[step.model_name]
        assert set(step.input_map) == {port.name for port in config.input}
        for port in config.input:
            dtype, shape = tensors[step.input_map[port.name]]
            assert (dtype, len(shape)) == (port.data_type, len(whole(config, port)))
        for port in config.output:
            if port.name in step.output_map:
                tensors[step.output_map[port.name]] = (port.data_type, whole(config, port))
    (output,) = ensemble.output
    assert tensors[output.name] == (output.data_type, list(output.dims))
    assert output.name == "image_features"


def whole(config: Any, port: Any) -> list[int]:
    return [-1] * bool(config.max_batch_size) + list(port.dims)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_weights_lie_in_two_places(backend: str) -> None:
    """The embedding alone is needed by the main model and, in Triton's own backends, by another."""
    folder = repository("tinyllava", backend)
    weights = sorted(path.name for path in folder.rglob("*.onnx.data"))
    expected = [f"{graph}.onnx.data" for graph in ("decoder", *GRAPHS)]
    if backend == "onnxruntime":
        expected.append("embed_tokens.onnx.data")
    assert weights == sorted(expected)
    in_bundle = {path.name for path in (folder / "vlm/1/bundle").glob("*.onnx")}
    image_graphs = {f"{graph}.onnx" for graph in IMAGE_GRAPHS}
    assert image_graphs & in_bundle == (image_graphs if backend == "python" else set())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_names_a_place_outside(backend: str, tmp_path: Path) -> None:
    bundle = exported("tinyllava")
    folder = written(bundle, tmp_path / "repository", backend)
    places = (str(tmp_path).encode(), str(bundle).encode(), str(SOURCE).encode())
    for path in folder.rglob("*"):
        assert not path.is_symlink()
        if path.is_file():
            content = path.read_bytes()
            assert not any(place in content for place in places), path


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bundle_gives_the_same_bytes(backend: str, tmp_path: Path) -> None:
    first = repository("idefics2", backend)
    second = written(exported("idefics2"), tmp_path / "other", backend)
    assert digests(first) == digests(second)
    marker = json.loads((second / MARKER_NAME).read_text(encoding="utf-8"))
    listed = {entry["path"]: entry["sha256"] for entry in marker["files"]}
    assert listed == {k: v for k, v in digests(second).items() if k != MARKER_NAME}


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    entries = [file_entry(folder, path) for path in files]
    return {entry.path: entry.sha256 for entry in entries}


def test_names_numbers_and_devices_are_those_asked_for(tmp_path: Path) -> None:
    folder = written(
        exported("tinyllava"),
        tmp_path / "repository",
        "onnxruntime",
        name="drawings",
        device="cpu",
        instances=3,
        max_batch=5,
    )
    configs = configs_of(folder)
    assert set(configs) == {
        "drawings",
        *(f"drawings_{part}" for part in (*GRAPHS, "preprocess", "features")),
    }
    main = configs.pop("drawings")
    parameters = {key: value.string_value for key, value in main.parameters.items()}
    assert parameters["num_slots"] == "5"
    assert parameters["image_graphs"] == "bls"
    assert parameters["runtime_backend"] == "onnxruntime"
    assert json.loads(parameters["models"])["projector"] == "drawings_projector"
    assert [group.count for group in main.instance_group] == [1]
    ensemble = configs.pop("drawings_features")
    assert not ensemble.instance_group
    assert {step.model_name for step in ensemble.ensemble_scheduling.step} <= set(configs)
    for config in configs.values():
        (group,) = config.instance_group
        assert (group.count, group.kind) == (3, type(group).Kind.Value("KIND_CPU"))
    assert configs["drawings_vision_encoder"].max_batch_size == 5
    model = (folder / "drawings_preprocess/1/model.py").read_text(encoding="utf-8")
    assert 'parents[2] / "drawings" / "1"' in model


def test_a_batch_holds_the_tiles_of_one_picture(tmp_path: Path) -> None:
    bundle = shutil.copytree(exported("idefics2"), tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["image"]["splits"] = True
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    configs = configs_of(written(bundle, tmp_path / "repository", max_batch=2))
    assert configs["vision_encoder"].max_batch_size == 5
    assert configs["embed_tokens"].max_batch_size == 2


def test_the_requirements_are_those_of_the_package() -> None:
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    known = {*project["dependencies"], *extras["cpu"], *extras["gpu"]}
    assert "numpy>=1.26,<3" in known
    known |= {"numpy>=1.26,<2"}  # narrower on a server
    assert {*_COMMON, *(line for lines in _OF_BACKEND.values() for line in lines)} <= known
    for checkpoint, backend in (("tinyllava", "python"), ("fuyu", "tensorrt")):
        lines = (repository(checkpoint, backend) / "requirements.txt").read_text().splitlines()
        assert set(lines) <= known


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_readme_names_files_and_models_that_exist(backend: str) -> None:
    folder = repository("fuyu", backend)
    text = (folder / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"[\w./-]+\.(?:sh|txt|pbtxt|json)\b", text):
        if name not in ("request.json", "config.pbtxt"):  # a reader's own, and each model's
            assert (folder / name.removeprefix("/models/")).exists(), name
    rows = re.findall(r"^\| `(\w+)` \|", text.partition("## Start")[0], re.MULTILINE)
    assert set(rows) == set(configs_of(folder))
    assert ("build_engines.sh" in text) == (backend == "tensorrt")
    assert (folder / "Dockerfile").exists()
    with pytest.raises(InputError, match="known: ") as refusal:
        read_parameters('{"unknown": 1}', 0)
    known = re.findall(r"\w+", str(refusal.value).rpartition("known: ")[2].partition(";")[0])
    assert len(known) > 8
    assert [name for name in known if f"`{name}`" not in text] == []
