"""What a real GPU has to show of `parity --bisect` and `build --explain`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from support.trained import EXAMPLES, exported

from vlmport.api.bisect_bundle import bisect_side
from vlmport.api.bisect_tensorrt import open_tensorrt_side
from vlmport.api.parity import ParityOptions
from vlmport.api.progress import SilentProgress
from vlmport.machine.gpus import find_gpus

RunCli = Callable[..., tuple[int, str, str]]
DOWN = "language_model.model.layers.1.mlp.down_proj"
FAMILIES = ("tinyllava", "paligemma", "idefics2", "fuyu")


def require_gpu(what: str) -> None:
    fault = find_gpus().fault
    if fault:
        pytest.skip(f"no GPU ({fault}); with one, {what}")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_engines_are_within_tolerance_graph_by_graph(
    name: str, precision: str, run_cli: RunCli
) -> None:
    require_gpu("every graph of the bundle would have been compared with ONNX Runtime's CPU")
    bundle = exported(name, precision)
    arguments = ("parity", EXAMPLES / name, bundle, "--backend", "tensorrt-rtx", "--bisect")
    code, out, err = run_cli(*arguments)
    assert code == 0, out + err


@pytest.mark.gpu
def test_a_changed_weight_is_found_on_the_gpu(tmp_path: Path) -> None:
    require_gpu("a layer with a changed weight would have been found among engines")
    bundle = exported("tinyllava")
    copy = tmp_path / "damaged"
    shutil.copytree(bundle, copy)
    model = ir.load(bundle / "decoder.onnx")
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        if value.const_value.metadata_props.get("vlmport.recipe", "").startswith(f"{DOWN}.weight"):
            array = value.const_value.numpy()
            value.const_value = ir.tensor((array * 1.05).astype(array.dtype), name=value.name)
    ir.save(model, copy / "decoder.onnx")
    options = ParityOptions(Path("unused"), bundle, max_new_tokens=2)
    side = open_tensorrt_side(copy, "tensorrt-rtx")
    found = bisect_side(options, side, SilentProgress()).first_fault
    assert found is not None
    assert (found.graph, found.module) == ("decoder", DOWN)


@pytest.mark.gpu
def test_the_inspector_names_nodes_of_real_engines(run_cli: RunCli, tmp_path: Path) -> None:
    require_gpu("layers of real engines would have been explained by the engine inspector")
    bundle = tmp_path / "bundle"
    shutil.copytree(exported("tinyllava", "fp16"), bundle)
    code, out, err = run_cli("build", bundle, "--max-length", "64", "--explain", "--json")
    assert code == 0, err
    for graph in json.loads(out)["explanation"]:
        assert graph["source"] == "engine", graph["remarks"]
        assert any(layer["modules"] for layer in graph["layers"])
