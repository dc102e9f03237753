"""Layers beside nodes and modules: of real networks, and of texts in the inspector's forms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.hand_quantized import quantize_by_hand
from support.trained import exported

from vlmport.api.explain_inspector import explain_inspector, inspector_remarks
from vlmport.api.explain_network import explain_network
from vlmport.api.explain_nodes import GraphNodes
from vlmport.api.explain_report import (
    ExplainedLayer,
    GraphExplanation,
    explanation_json,
    print_explanations,
)
from vlmport.errors import EngineError
from vlmport.graphs.engine_source import engine_source
from vlmport.machine.gpus import find_gpus
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.log import engine_logger, listening
from vlmport.runtime.engines.network import parse_network

RunCli = Callable[..., tuple[int, str, str]]
LAYER = "language_model.model.layers.1"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, below which engines are built."""
    folder = tmp_path_factory.mktemp("explained") / "bundle"
    shutil.copytree(exported("tinyllava"), folder)
    return folder


@pytest.fixture(scope="module")
def nodes(bundle: Path) -> GraphNodes:
    return GraphNodes(bundle / "decoder.onnx")


def network(path: Path) -> tuple[ExplainedLayer, ...]:
    bindings = load_bindings("tensorrt-rtx")
    with listening() as log:
        logger = engine_logger(bindings)
        source = engine_source(path, path.stem, 64)
        parsed, parser = parse_network(bindings, bindings.Builder(logger), source, log, logger)
        found = explain_network(bindings, parsed, GraphNodes(path))
        del parser
    return found


def of_module(layers: tuple[ExplainedLayer, ...], module: str, kind: str) -> list[ExplainedLayer]:
    return [
        one for one in layers if module in one.modules and one.kind == kind and not one.is_helper
    ]


def test_layers_of_a_network_have_nodes_and_modules(bundle: Path, nodes: GraphNodes) -> None:
    layers = network(bundle / "decoder.onnx")
    own = [layer for layer in layers if not layer.is_helper]
    assert {name for layer in own for name in layer.nodes} == set(nodes.names())
    [product] = of_module(layers, f"{LAYER}.mlp.down_proj", "MATRIX_MULTIPLY")
    assert product.operators == ("MatMul",)
    assert product.outputs == ("float32",)
    assert product.reads == ()
    joined = of_module(layers, f"{LAYER}.self_attn.k_proj", "MATRIX_MULTIPLY")
    assert [len(one.modules) for one in joined] == [3]
    [attention] = of_module(layers, f"{LAYER}.self_attn", "ATTENTION_INPUT")
    assert attention.operators == ("Attention",)
    assert not any(layer.missing for layer in layers)


def test_helpers_of_the_parser_belong_to_their_readers(bundle: Path) -> None:
    layers = network(bundle / "decoder.onnx")
    helpers = [layer for layer in layers if layer.is_helper]
    weights = [one for one in helpers if one.kind == "CONSTANT" and one.outputs == ("float32",)]
    [down] = [one for one in weights if one.modules == (f"{LAYER}.mlp.down_proj",)]
    assert down.operators == ("MatMul",)
    assert not down.is_fused


def test_dequantized_inputs_are_told(bundle: Path, tmp_path: Path) -> None:
    quantized = quantize_by_hand(bundle, tmp_path / "int4", "int4")
    layers = network(quantized / "decoder.onnx")
    [product] = of_module(layers, f"{LAYER}.mlp.down_proj", "MATRIX_MULTIPLY")
    assert product.reads == ("int4",)


@pytest.fixture
def down(nodes: GraphNodes) -> str:
    """The node of a product."""
    [name] = [
        name
        for name in nodes.names()
        if nodes.modules([name]) == (f"{LAYER}.mlp.down_proj",)
        and nodes.operators([name]) == ("MatMul",)
    ]
    return name


def following(nodes: GraphNodes, name: str) -> str:
    names = nodes.names()
    return names[names.index(name) + 1]


def text(*layers: Any, **more: Any) -> str:
    return json.dumps({"Layers": list(layers), **more})


def test_detailed_text_of_tensorrt_10(nodes: GraphNodes, down: str) -> None:
    after = following(nodes, down)
    found = text(
        {
            "Name": "__myl_MatAdd_myl0_7",
            "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Dimensions": [1, 256], "Format/Datatype": "Int8"}],
            "Outputs": [
                {
                    "Name": "y",
                    "Dimensions": [1, 128],
                    "Format/Datatype": "Row major linear FP16 format",
                }
            ],
            "TacticName": "sm89_xmma_gemm_i8f16_i8i32_f16_tn_n_tilesize64x64x64",
            "TacticValue": "0x1",
            "StreamId": 0,
            "Metadata": f"[ONNX Layer: {down}]\x1f[ONNX Layer: {after}]",
        },
        {"Name": "Reformatting CopyNode for x", "LayerType": "Reformat", "Metadata": ""},
        Bindings=["x", "y"],
    )
    first, second = explain_inspector(found, nodes, "decoder.json")
    assert first.nodes == (down, after)
    assert first.operators == ("MatMul", "Add")
    assert first.modules[0] == f"{LAYER}.mlp.down_proj"
    assert first.is_fused
    assert first.outputs == ("float16",)
    assert first.tactic.startswith("sm89_xmma")
    assert first.missing == ()
    assert second.nodes == ()
    assert second.missing == ("ONNX nodes", "precision", "tactic")
    assert inspector_remarks((first, second)) == (
        "the inspector does not say the ONNX nodes of 1 of 2 layers",
        "the inspector does not say the precision of 1 of 2 layers",
        "the inspector does not say the tactic of 1 of 2 layers",
    )


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."}, "int8"),
        ({"Format/Datatype": "Float"}, "float32"),
        ({"Format/Datatype": "Half"}, "float16"),
        ({"Format/Datatype": "BFloat16"}, "bfloat16"),
        ({"Format/Datatype": "N/A due to dynamic shapes"}, ""),
        # TensorRT 11.
        ({"Format": "LINEAR", "DataType": "BF16"}, "bfloat16"),
        ({"Format": "Row major linear FP32 format (kLINEAR)", "Datatype": "FP32"}, "float32"),
        ({"Format": "LINEAR", "DataType": "FP8"}, "float8"),
        ({"Format": "LINEAR", "DataType": "Int64"}, "int64"),
        ({"Name": "x"}, ""),
    ],
)
def test_precision_of_every_form(
    tensor: dict[str, str], dtype: str, nodes: GraphNodes, down: str
) -> None:
    layer = {"Name": down, "LayerType": "gemm", "Outputs": [tensor], "TacticName": "t"}
    [found] = explain_inspector(text(layer), nodes, "decoder.json")
    assert found.outputs == (dtype,)
    assert found.nodes == (down,)
    assert found.missing == (() if dtype else ("precision",))


def test_names_alone(nodes: GraphNodes, down: str) -> None:
    """What an engine that was built without detailed verbosity has."""
    after = following(nodes, down)
    found = text(f"{down} + {after}", "Reformatting CopyNode for Output Tensor 0 to logits")
    first, second = explain_inspector(found, nodes, "decoder.json")
    assert first.nodes == (down, after)
    assert first.missing == ("type", "precision", "tactic")
    assert second.nodes == ()


def test_a_region_is_named_by_its_ends(nodes: GraphNodes, down: str) -> None:
    after = following(nodes, down)
    name = f"{{ForeignNode[{down}...{after}]}}"
    [found] = explain_inspector(text({"Name": name, "LayerType": "Myelin"}), nodes, "decoder.json")
    assert found.nodes == (down, after)
    assert found.is_stretch


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", 'has no list "Layers"'),
        ('{"Layers": 3}', 'has no list "Layers"'),
        ('{"Layers": [3]}', 'has no list "Layers"'),
        ('{"Layers": ["conv1", "conv2"]}', "none of its 2 layers names a node of this graph"),
    ],
)
def test_texts_that_are_not_of_an_inspector(content: str, message: str, nodes: GraphNodes) -> None:
    with pytest.raises(EngineError, match=f"decoder.json: {message}"):
        explain_inspector(content, nodes, "decoder.json")


def test_tables_show_what_is_known(nodes: GraphNodes, down: str, tmp_path: Path) -> None:
    layer = {"Name": "fused", "LayerType": "gemm", "Metadata": f"[ONNX Layer: {down}]"}
    layers = explain_inspector(text(layer), nodes, "decoder.json")
    remarks = inspector_remarks(layers)
    graph = GraphExplanation("decoder", "engine", remarks, layers, (), ("node_x",))
    other = replace(graph, graph="projector")
    with (tmp_path / "out").open("w") as file:
        console = Console(record=True, width=160, file=file)
        print_explanations((graph, other), console)
    shown = console.export_text()
    assert f"MatMul {down}" in shown
    assert f"{LAYER}.mlp.down_proj" in shown
    assert "nodes that no layer names: node_x" in shown
    assert "decoder, projector: the inspector does not say the tactic of 1 of 1 layers" in shown
    assert explanation_json([graph])[0]["layers"][0]["is_fused"] is False


@pytest.fixture(scope="module")
def engines() -> tuple[str, ...]:
    return ("--max-length", "64", "--max-batch", "1")


def test_build_explains(run_cli: RunCli, bundle: Path, engines: tuple[str, ...], down: str) -> None:
    if not find_gpus().fault:
        pytest.skip("found a GPU; without one, networks would have been explained")
    code, out, err = run_cli("build", bundle, *engines, "--explain", "--json")
    assert code == 0, err
    explained = {graph["graph"]: graph for graph in json.loads(out)["explanation"]}
    assert set(explained) == {"vision_encoder", "projector", "embed_tokens", "decoder"}
    decoder = explained["decoder"]
    assert decoder["source"] == "network"
    assert "only the engine knows" in decoder["remarks"][0]
    assert "NVIDIA driver" in decoder["remarks"][0] or "GPU: found none" in decoder["remarks"][0]
    assert {layer["masking"] for layer in decoder["attention"]} == {"lower_right"}
    # The engines are there now.
    path = bundle.parent / "decoder.json"
    path.write_text(text({"Name": down, "LayerType": "gemm", "TacticName": "a_kernel"}))
    more = ("--explain", "--inspector-json", path)
    code, out, err = run_cli("build", bundle, *engines, *more)
    assert code == 0, err
    assert "a_kernel" in out
    assert "the inspector does not say the precision of 1 of 1 layers" in " ".join(out.split())


def test_inspector_files_must_fit(run_cli: RunCli, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "decodr.json"
    path.write_text("{}")
    code, _, err = run_cli("build", bundle, "--explain", "--inspector-json", path)
    assert code == 1
    assert "expected the name of a graph, such as decoder.json; did you mean decoder" in err
    missing = tmp_path / "decoder.json"
    code, _, err = run_cli("build", bundle, "--explain", "--inspector-json", missing)
    assert code == 1
    assert "cannot be read" in err
    code, _, err = run_cli("build", bundle, "--inspector-json", missing)
    assert code == 2
