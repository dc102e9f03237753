from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx
from support.engine_graphs import cached_attention, one_profile, parsed, source

from vlmport.contract_engines import BuildOptions, Engine
from vlmport.errors import EngineError
from vlmport.runtime.device.cuda import find_device
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.builder import BuildCancelledError, EngineBuilder
from vlmport.runtime.engines.network import cache_aliases
from vlmport.runtime.engines.ports import check_network_ports
from vlmport.runtime.engines.progress import PERCENT, BuildWatch
from vlmport.runtime.engines.target import choose_target


def build(
    folder: Path,
    model: onnx.ModelProto | None = None,
    watch: BuildWatch | None = None,
    graph: str = "decoder",
    **options: Any,
) -> Engine:
    asked = BuildOptions("tensorrt-rtx", 4, 32, 16, 1, **options)
    bindings = load_bindings("tensorrt-rtx")
    builder = EngineBuilder(bindings, asked, choose_target(bindings, asked))
    found = replace(source(cached_attention() if model is None else model), graph=graph)
    watch = watch or BuildWatch(lambda _: None, threading.Event())
    return builder.build(found, one_profile(found), folder, watch)[0]


def test_builds_and_writes_an_engine(tmp_path: Path) -> None:
    told: list[int] = []
    engine = build(tmp_path, watch=BuildWatch(told.append, threading.Event()))
    path = tmp_path / "decoder.engine"
    assert (engine.file, engine.size) == (path.name, path.stat().st_size)
    assert [layer.fused for layer in engine.attention] == [True]
    assert sum(told) == PERCENT
    assert len(told) > 5
    assert engine.warnings == ()


def test_a_build_that_is_told_to_stop_writes_nothing(tmp_path: Path) -> None:
    stop = threading.Event()
    watch = BuildWatch(lambda _: stop.set(), stop)
    with pytest.raises(BuildCancelledError):
        build(tmp_path, watch=watch)
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    model = cached_attention()
    spare = onnx.helper.make_tensor_value_info("spare", onnx.TensorProto.INT64, ["batch"])
    model.graph.input.append(spare)
    with pytest.raises(EngineError, match="decoder: TensorRT ignores the inputs spare"):
        build(tmp_path, model)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_operator_is_refused_by_name(tmp_path: Path) -> None:
    model = cached_attention()
    model.graph.node[0].op_type = "Unheard"
    with pytest.raises(EngineError, match=r"does not parse attend\.onnx.*Unheard"):
        build(tmp_path, model)


@pytest.mark.skipif(find_device() is not None, reason="with a GPU it builds")
@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_replaceable_weights_need_a_gpu(tmp_path: Path, option: str) -> None:
    model = with_weights()
    with pytest.raises(EngineError, match="without a GPU; build it where one is, or leave"):
        build(tmp_path, model, refit=option == "refit", strip_weights=option != "refit")


@pytest.mark.gpu
@pytest.mark.skipif(find_device() is None, reason="would have built engines to refit")
@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_replaceable_weights_build_with_a_gpu(tmp_path: Path, option: str) -> None:
    engine = build(
        tmp_path, with_weights(), refit=option == "refit", strip_weights=option != "refit"
    )
    assert engine.size > 0


@pytest.mark.skipif(find_device() is not None, reason="with a GPU it is known")
def test_memory_of_a_profile_is_unknown_without_a_gpu(tmp_path: Path) -> None:
    assert build(tmp_path).profiles[0].activation_bytes is None


@pytest.mark.gpu
@pytest.mark.skipif(find_device() is None, reason="would have asked for each profile's memory")
def test_memory_of_a_profile_is_asked_of_the_gpu(tmp_path: Path) -> None:
    memory = build(tmp_path).profiles[0].activation_bytes
    assert memory is not None
    assert memory >= 0


def with_weights() -> onnx.ModelProto:
    model = cached_attention()
    weight = onnx.numpy_helper.from_array(np.ones((16, 16), np.float16), "weight")
    model.graph.initializer.append(weight)
    (attend,) = (node for node in model.graph.node if node.op_type == "Attention")
    attend.output[0] = "mixed"
    product = onnx.helper.make_node("MatMul", ["mixed", "weight"], ["attend_output"])
    model.graph.node.append(product)
    return model


def test_attention_that_has_a_kernel_alone_but_not_here_is_decomposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmport.runtime.engines.attention_kernels import KernelFinder

    # As if it were found for a network of nothing but this attention.
    monkeypatch.setattr(KernelFinder, "reason", lambda self, kind: "")
    engine = build(tmp_path, cached_attention(dtype=onnx.TensorProto.FLOAT))
    (layer,) = engine.attention
    assert (layer.fused, layer.reason) == (False, "has a kernel alone, but not in this network")


@pytest.mark.parametrize(("graph", "expected"), [("decoder", True), ("vision_encoder", False)])
def test_engines_of_a_decode_step_allocate_nothing_while_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: str, expected: bool
) -> None:
    flag = tensorrt_rtx.BuilderFlag.REQUIRE_USER_ALLOCATION
    found: list[bool] = []
    configure: Any = EngineBuilder._config

    def spy(*arguments: Any) -> Any:
        config = configure(*arguments)
        found.append(config.get_flag(flag))
        return config

    monkeypatch.setattr(EngineBuilder, "_config", spy)
    build(tmp_path, graph=graph)
    assert found == [expected]


@pytest.mark.parametrize(
    ("capabilities", "smaller"), [(("8.9",), True), (("8.0", "8.6", "8.9", "12.0"), False)]
)
def test_compute_capabilities_reach_the_build(
    tmp_path: Path, capabilities: tuple[str, ...], smaller: bool
) -> None:
    portable = build(tmp_path)
    engine = build(tmp_path, compute_capabilities=capabilities)
    assert (engine.size < 0.8 * portable.size) == smaller


def test_ports_of_another_graph_are_refused() -> None:
    other = source(cached_attention(mask="own", causal=False))
    with (
        parsed(cached_attention()) as found,
        pytest.raises(EngineError, match="own: found none, expected"),
    ):
        check_network_ports(found.network, other)


def test_a_cache_that_is_not_updated_in_place_is_refused() -> None:
    with parsed(cached_attention()) as found:
        assert cache_aliases(found.bindings, found.network, found.source) == {}
        expected = replace(found.source, cache_updates=2)
        with pytest.raises(EngineError, match="2 updates of the cache became 0 layers"):
            cache_aliases(found.bindings, found.network, expected)
