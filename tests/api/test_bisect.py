"""The first wrong layer is found: in bundles that were damaged on purpose."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console
from support.emulated_cuda import EmulatedCuda
from support.emulated_engines import VERSION
from support.emulated_tensorrt import EmulatedTensorRT, plan_of
from support.trained import EXAMPLES, exported

from vlmport.api import bisect as bisect_module
from vlmport.api.bisect_bundle import bisect_bundle, bisect_side
from vlmport.api.bisect_onnxruntime import OnnxRuntimeSide
from vlmport.api.bisect_report import bisect_report_json, print_bisect_report
from vlmport.api.bisect_tensorrt import TensorRTSide
from vlmport.api.parity import ParityOptions
from vlmport.api.progress import SilentProgress
from vlmport.contract_engines import BuildOptions
from vlmport.errors import InputError
from vlmport.machine.gpus import find_gpus
from vlmport.runtime.device.cuda import Cuda
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.builder import EngineBuilder
from vlmport.runtime.engines.target import choose_target

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlmport.api.bisect import GraphRun
    from vlmport.api.bisect_report import BisectReport, FirstFault
    from vlmport.contract_engines import Engine, EngineSource
    from vlmport.runtime.engines.progress import BuildWatch

RunCli = Callable[..., tuple[int, str, str]]
DOWN = "language_model.model.layers.1.mlp.down_proj"
LATER = "language_model.model.layers.2.self_attn.o_proj"


@pytest.fixture(scope="module")
def bundle() -> Path:
    return exported("tinyllava")


@pytest.fixture(scope="module")
def half_bundle() -> Path:
    return exported("tinyllava", "fp16")


def damaged(bundle: Path, folder: Path, changes: dict[str, Callable[[ir.Model], None]]) -> Path:
    """A copy in which graphs are changed."""
    copy = folder / "damaged"
    shutil.copytree(bundle, copy)
    for graph, change in changes.items():
        model = ir.load(bundle / f"{graph}.onnx")
        change(model)
        ir.save(model, copy / f"{graph}.onnx")
    return copy


def scale_weight(module: str, factor: float) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            recipe = value.const_value.metadata_props.get("vlmport.recipe", "")  # type: ignore[union-attr]
            if recipe.startswith(f"{module}.weight"):
                array = value.const_value.numpy()  # type: ignore[union-attr]
                value.const_value = ir.tensor((array * factor).astype(array.dtype), name=value.name)
                return
        raise AssertionError(module)

    return change


def set_attribute(operator: str, index: int, name: str, number: float) -> Callable[..., None]:
    def change(model: ir.Model) -> None:
        node = [node for node in model.graph if node.op_type == operator][index]
        node.attributes[name] = ir.AttrFloat32(name, number)

    return change


def search(bundle: Path, candidate: Any) -> BisectReport:
    options = ParityOptions(Path("unused"), bundle, max_new_tokens=2)
    return bisect_side(options, candidate, SilentProgress())


def search_damaged(
    bundle: Path, folder: Path, **changes: Callable[[ir.Model], None]
) -> BisectReport:
    return search(bundle, OnnxRuntimeSide(damaged(bundle, folder, changes), "as_bundle"))


def fault(report: BisectReport) -> FirstFault:
    assert report.first_fault is not None
    return report.first_fault


def faulty(report: BisectReport) -> list[str]:
    return [check.graph for check in report.graphs if check.words]


def test_a_bundle_without_damage_is_within_tolerance(bundle: Path) -> None:
    report = search(bundle, OnnxRuntimeSide(bundle, "as_bundle"))
    assert report.first_fault is None
    assert report.builds == 0
    names = ["vision_encoder", "projector", "embed_tokens", "decoder"]
    assert [check.graph for check in report.graphs] == names
    assert all(check.ratio == 0.0 and check.runs for check in report.graphs)
    # Two questions; a prompt and several tokens of each.
    assert report.graphs[-1].runs >= 4


@pytest.fixture(scope="module")
def weight_report(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> BisectReport:
    folder = tmp_path_factory.mktemp("weight")
    return search_damaged(bundle, folder, decoder=scale_weight(DOWN, 1.01))


def test_a_changed_weight_is_found(weight_report: BisectReport) -> None:
    found = fault(weight_report)
    assert faulty(weight_report) == ["decoder"]
    assert (found.graph, found.operator, found.module) == ("decoder", "MatMul", DOWN)
    assert found.found == "marked"
    assert found.sources_ratio == 0.0
    assert found.later > 10
    assert "max_abs" in found.words


def test_a_wrong_attribute_is_found_in_the_first_of_two_graphs(
    bundle: Path, tmp_path: Path
) -> None:
    report = search_damaged(
        bundle,
        tmp_path,
        vision_encoder=set_attribute("LayerNormalization", 3, "epsilon", 0.05),
        decoder=scale_weight(DOWN, 1.01),
    )
    # Each graph is fed with the reference's inputs, so that the projector is not blamed.
    assert faulty(report) == ["vision_encoder", "decoder"]
    found = fault(report)
    assert (found.graph, found.operator) == ("vision_encoder", "LayerNormalization")
    assert found.module == "vision_tower.encoder.layers.1.layer_norm2"


def test_the_first_of_several_damages_is_found(bundle: Path, tmp_path: Path) -> None:
    def change(model: ir.Model) -> None:
        scale_weight(LATER, 2.0)(model)
        scale_weight(DOWN, 1.01)(model)

    assert fault(search_damaged(bundle, tmp_path, decoder=change)).module == DOWN


def test_damage_that_shows_in_decode_alone_is_found(bundle: Path, tmp_path: Path) -> None:
    """What TensorRT's parser makes of the causal mask: aligned to the first row of the cache."""

    def change(model: ir.Model) -> None:
        node = [node for node in model.graph if node.op_type == "Attention"][1]
        node.replace_input_with(6, None)

    report = search_damaged(bundle, tmp_path, decoder=change)
    check = report.graphs[-1]
    assert check.run.endswith(" alone")
    found = fault(report)
    assert (found.operator, found.module) == (
        "Attention",
        "language_model.model.layers.1.self_attn",
    )
    assert found.shape[2] == 1


def test_nan_is_found(bundle: Path, tmp_path: Path) -> None:
    report = search_damaged(bundle, tmp_path, projector=scale_weight("connector.0", np.nan))
    found = fault(report)
    assert found.graph == "projector"
    assert found.ratio is None
    assert "NaN or Inf on one side alone" in found.words


def test_noise_of_the_last_bit_is_no_fault(bundle: Path, tmp_path: Path) -> None:
    def change(model: ir.Model) -> None:
        generator = np.random.default_rng(0)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2:
                array = tensor.numpy()
                steps = generator.integers(-1, 2, array.shape).astype(np.float32)
                moved = array * (1 + steps * np.float32(2.0**-24))
                value.const_value = ir.tensor(moved.astype(np.float32), name=value.name)

    graphs = dict.fromkeys(("vision_encoder", "projector", "decoder"), change)
    report = search_damaged(bundle, tmp_path, **graphs)
    assert report.first_fault is None
    assert all(check.ratio for check in report.graphs if check.graph in graphs)


@pytest.mark.slow
def test_other_rounding_of_half_precision_is_no_fault(half_bundle: Path) -> None:
    """A side that does not round at all is as far off as the reference's own rounding."""
    report = search(half_bundle, OnnxRuntimeSide(half_bundle, "float32"))
    assert report.first_fault is None
    assert report.precision == "float16"
    decoder = report.graphs[-1]
    assert decoder.ratio is not None
    assert 0.1 < decoder.ratio <= 0.6  # a fourth of the largest, or half of the mean


@pytest.mark.slow
def test_damage_is_found_in_half_precision(half_bundle: Path, tmp_path: Path) -> None:
    report = search_damaged(half_bundle, tmp_path, decoder=scale_weight(DOWN, 1.25))
    found = fault(report)
    assert (found.graph, found.module) == ("decoder", DOWN)


def test_groups_that_fit_into_memory_find_the_same(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bisect_module, "_MOST_ELEMENTS", 200_000)
    report = search_damaged(bundle, tmp_path, decoder=scale_weight(DOWN, 1.01))
    assert report.builds > 2
    assert fault(report).module == DOWN
    assert fault(report).sources_ratio == 0.0


class FusedSide:
    """Wrong only while few values are asked for, as a wrong fusion is.

    With `hides`, also right while the value itself is asked for.
    """

    name = "fused"

    def __init__(self, good: Path, bad: Path, most: int) -> None:
        self._good = OnnxRuntimeSide(good, "as_bundle")
        self._bad = OnnxRuntimeSide(bad, "as_bundle")
        self._most = most

    @contextlib.contextmanager
    def open(self, graph: str, values: Sequence[str]) -> Iterator[GraphRun]:
        side = self._bad if len(values) <= self._most else self._good
        with side.open(graph, values) as run:
            yield run

    def known(self, graph: str, values: Sequence[str]) -> tuple[str, ...]:
        return self._good.known(graph, values)


def test_a_fault_that_marking_all_values_hides_is_found_alone(bundle: Path, tmp_path: Path) -> None:
    bad = damaged(bundle, tmp_path, {"decoder": scale_weight(DOWN, 1.01)})
    found = fault(search(bundle, FusedSide(bundle, bad, most=1)))
    assert found.found == "alone"
    assert found.module == DOWN
    assert found.after


def test_a_fault_that_any_mark_hides_is_told_of_the_output(bundle: Path, tmp_path: Path) -> None:
    bad = damaged(bundle, tmp_path, {"decoder": scale_weight(DOWN, 1.01)})
    found = fault(search(bundle, FusedSide(bundle, bad, most=0)))
    assert found.found == "alone"
    # The first output behind the damage.
    assert found.value == "present_key_values.2.key"


def test_report_is_printed_and_written(weight_report: BisectReport, tmp_path: Path) -> None:
    report = weight_report
    with Console(record=True, width=160, file=(tmp_path / "out").open("w")) as console:
        print_bisect_report(report, console)
    text = " ".join(console.export_text().split())
    assert f"decoder: first out of tolerance: MatMul {fault(report).node} (module {DOWN})" in text
    content = json.loads(bisect_report_json(report))
    assert content["first_fault"]["module"] == DOWN
    assert [graph["graph"] for graph in content["graphs"]][-1] == "decoder"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnxruntime"}, "--bisect searches tensorrt or tensorrt-rtx"),
        ({"backend": "tensorrt-rtx", "engines": Path("x")}, "--engines: --bisect builds engines"),
        ({"backend": "tensorrt-rtx", "max_new_tokens": 0}, "max_new_tokens: found 0"),
    ],
)
def test_options_that_do_not_fit(bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bisect_bundle(ParityOptions(Path("unused"), bundle, **options), SilentProgress())


def test_a_machine_without_a_gpu_is_told(run_cli: RunCli, bundle: Path) -> None:
    if not find_gpus().fault:
        pytest.skip("found a GPU; without one, parity --bisect would have said that it is missing")
    checkpoint = EXAMPLES / "tinyllava"
    arguments = ("parity", checkpoint, bundle, "--backend", "tensorrt-rtx", "--bisect")
    code, out, err = run_cli(*arguments)
    assert (code, out) == (1, "")
    assert "NVIDIA driver: found none" in err or "GPU: found none" in err
    assert "Traceback" not in err


class Emulated:
    """TensorRT-RTX builds every engine, and an emulated GPU runs its ONNX graph instead."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle = bundle
        self.folder = folder
        self.cuda = EmulatedCuda()
        self.built: list[Engine] = []
        bindings = load_bindings("tensorrt-rtx")
        options = BuildOptions("tensorrt-rtx", 1, 1, 1, 1)
        self.builder = EngineBuilder(bindings, options, choose_target(bindings, options))

    def side(self) -> TensorRTSide:
        tensorrt: Any = EmulatedTensorRT(self.cuda, VERSION)
        cuda = Cuda(self.cuda)
        return TensorRTSide(self.bundle, "tensorrt-rtx", tensorrt, cuda, self.build)

    def build(self, source: EngineSource, profiles: Any, folder: Path, watch: BuildWatch) -> Any:
        engine, log = self.builder.build(source, profiles, folder, watch)
        # Weights are found from where the graph lies.
        model = self.bundle / f"marked{len(self.built)}.onnx"
        model.write_bytes(source.model)
        (folder / engine.file).write_bytes(plan_of(engine, str(model), VERSION))
        self.built.append(engine)
        return engine, log


def test_tensorrt_with_inner_values_is_searched(bundle: Path, tmp_path: Path) -> None:
    """Everything but the numbers of a real GPU."""
    copy = damaged(bundle, tmp_path, {"decoder": scale_weight(DOWN, 1.01)})
    emulated = Emulated(copy, tmp_path)
    report = search(bundle, emulated.side())
    found = fault(report)
    assert (found.graph, found.module) == ("decoder", DOWN)
    assert report.candidate == f"tensorrt-rtx {VERSION} on Emulated GPU"
    assert emulated.cuda.leaks() == []
    marked = max(emulated.built, key=lambda engine: len(engine.outputs))
    assert len(marked.outputs) > 100
    assert {layer.masking for layer in marked.attention} == {"lower_right"}
    aliases = [port.aliases for port in marked.outputs if port.aliases]
    assert len(aliases) == 8
    # A prompt and a token alone have engines of their own.
    assert {one.profiles[0].ranges[0].usual[1] for one in emulated.built if one.graph == "decoder"}
