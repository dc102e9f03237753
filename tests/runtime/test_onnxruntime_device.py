"""ONNX Runtime's providers with a memory of their own.

The CPU provider runs the same code here, with values that ONNX Runtime allocates and copies; the
tests marked `gpu` run the scenarios on the real providers.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.device_scenarios import IMAGE, QUESTION, answers, endless, mixed_requests, on_device
from support.slot_scenarios import check_slots
from support.trained import exported
from tiny.recipes import RECIPES

from vlmport.api.tolerances import near_tie_margin, tolerance_for
from vlmport.contract import GraphSpec, TensorSpec
from vlmport.errors import BundleError, InputError, VlmportError
from vlmport.machine.requirements import requirements
from vlmport.runtime import Request, SamplingOptions
from vlmport.runtime.backends.onnxruntime_device import OnnxRuntimeDeviceBackend
from vlmport.runtime.backends.onnxruntime_memory import OrtMemory, array_of, told, write_
from vlmport.runtime.backends.onnxruntime_provider import (
    CUDA,
    TENSORRT_RTX,
    OrtProvider,
    open_provider_session,
    warn_of_other_nodes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.contract import Manifest
    from vlmport.runtime import VisionLanguageModel

CPU = OrtProvider("onnxruntime-cpu", "CPUExecutionProvider", OrtMemory("cpu"))


@pytest.fixture(scope="module")
def model(trained_bundle: Path) -> VisionLanguageModel:
    return endless(trained_bundle)


def bundle_of(family: str, precision: str) -> Path:
    """As others in this process ask for it, so that no bundle is exported twice."""
    return exported(family) if precision == "fp32" else exported(family, precision)


@pytest.mark.parametrize("family", sorted(RECIPES))
@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_tokens_equal_the_cpu_backend(family: str, precision: str) -> None:
    bundle = bundle_of(family, precision)
    reference = endless(bundle)
    device = on_device(reference, bundle, CPU)
    for batch in (1, 3):
        expected, steps = answers(reference, mixed_requests(batch))
        found, own_steps = answers(device, mixed_requests(batch))
        assert found == expected
        # The capacities of the caches differ, so that sums are cut into other pieces.
        np.testing.assert_allclose(
            own_steps[0], steps[0], atol=1e-5 if precision == "fp32" else 2e-2
        )


@pytest.mark.parametrize("family", sorted(RECIPES))
def test_slots_answer_as_a_sequence_alone(family: str) -> None:
    bundle = bundle_of(family, "fp32")
    reference = endless(bundle)
    device = on_device(reference, bundle, CPU)
    # The capacities of the caches differ, so that sums are cut into other pieces.
    check_slots(device, reference, num_slots=5, cache_tokens=5 * 220, atol=1e-5)


def test_slots_share_the_tokens_out(model: VisionLanguageModel, trained_bundle: Path) -> None:
    device = on_device(model, trained_bundle, CPU)._backend
    slots = device.start_slots(3, 200)
    assert slots.fits(3, 66)
    assert not slots.fits(1, 67)
    assert not slots.fits(4, 1)
    with pytest.raises(InputError, match=r"found 2 tokens \(cache_tokens\) for 3 slots"):
        device.start_slots(3, 2)
    most = model.manifest.dimensions.max_length
    assert not device.start_slots(1, most + 5).fits(1, most + 1)


def test_a_prompt_in_pieces_equals_the_cpu_backend(
    model: VisionLanguageModel, trained_bundle: Path
) -> None:
    prompt = "shapes and colours " * 120
    requests = [
        Request(prompt=prompt, images=(IMAGE,), max_new_tokens=20),
        Request(prompt=QUESTION, max_new_tokens=5),
    ]
    expected, _ = answers(model, requests)
    found, steps = answers(on_device(model, trained_bundle, CPU), requests)
    assert model.prompt_embeddings(requests[0]).shape[0] > 512
    assert found == expected
    assert len(steps) == 20


def test_the_cache_stays_where_it_is_and_is_written_in_place(trained_bundle: Path) -> None:
    manifest = endless(trained_bundle).manifest
    decoding = OnnxRuntimeDeviceBackend(trained_bundle, manifest, CPU, 1).start(2, 40)
    layout = manifest.kv_layout
    shape = (2, layout.num_kv_heads, 40, layout.head_dim)
    addresses = [value.data_ptr() for value in decoding._cache]
    assert [tuple(value.shape()) for value in decoding._cache] == [shape] * len(addresses)
    prompt = np.random.default_rng(0).normal(size=(2, 5, manifest.dimensions.hidden_size))
    decoding.prefill(prompt.astype(np.float32), np.array([5, 3]))
    decoding.step(np.array([1, 2]), np.array([True, False]))
    assert [value.data_ptr() for value in decoding._cache] == addresses
    keys = decoding._cache[0].numpy()
    filled = np.abs(keys).sum(axis=(1, 3)) > 0
    # The second row has ended: it overwrote its own last token. Its padding is never valid.
    assert filled[0].tolist() == [True] * 6 + [False] * 34
    assert filled[1].tolist() == [True] * 5 + [False] * 35
    decoding.close()
    assert decoding._cache == []


def test_a_long_row_that_ended_writes_no_further(trained_bundle: Path) -> None:
    manifest = endless(trained_bundle).manifest
    decoding = OnnxRuntimeDeviceBackend(trained_bundle, manifest, CPU, 1).start(2, 7)
    prompt = np.random.default_rng(0).normal(size=(2, 7, manifest.dimensions.hidden_size))
    decoding.prefill(prompt.astype(np.float32), np.array([7, 3]))
    for _ in range(4):  # the cache has no room for a token of the first row
        logits = decoding.step(np.array([1, 2]), np.array([False, True]))
        assert np.isfinite(logits[1]).all()


def test_what_onnxruntime_cannot_do_is_told(trained_bundle: Path) -> None:
    manifest = endless(trained_bundle).manifest
    backend = OnnxRuntimeDeviceBackend(trained_bundle, manifest, CPU, 1)
    prompt = np.zeros((1, 9, manifest.dimensions.hidden_size), np.float32)
    with pytest.raises(VlmportError, match="decoder, tokens 0 to 9 of the prompt: ONNX Runtime"):
        backend.start(1, 8).prefill(prompt, np.array([9]))
    with (
        pytest.raises(VlmportError, match=r"a cache: ONNX Runtime failed .* ask for fewer"),
        told("a cache"),
    ):
        CPU.memory.empty((1 << 30, 1 << 30), "float32")
    wrong = {"input_ids": np.zeros((1, 3), np.float32)}
    with pytest.raises(VlmportError, match="embed_tokens on onnxruntime-cpu: ONNX Runtime failed"):
        backend.run("embed_tokens", wrong)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_values_keep_their_bits_on_the_way(dtype: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    element = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    array = np.arange(-3, 3).reshape(2, 3).astype(element)
    memory = OrtMemory("cpu")
    value = memory.copy_of(array)
    before = value.data_ptr()
    array[:] = 0  # nothing of the array is kept
    np.testing.assert_array_equal(array_of(value, dtype), np.arange(-3, 3).reshape(2, 3))
    write_(value, np.full((2, 3), 2).astype(element))
    assert value.data_ptr() == before
    np.testing.assert_array_equal(array_of(value, dtype), np.full((2, 3), 2))
    assert not array_of(memory.zeros((2, 3), dtype), dtype).any()


def test_a_graph_of_bfloat16_runs_through_the_same_values(
    sample_manifest: Manifest, tmp_path: Path
) -> None:
    """A lookup, which the CPU provider has in bfloat16, too."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    onnx = pytest.importorskip("onnx")
    table = np.random.default_rng(0).normal(size=(10, 4)).astype(ml_dtypes.bfloat16)
    helper, kind = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])],
        "embed_tokens",
        [helper.make_tensor_value_info("input_ids", kind.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("inputs_embeds", kind.BFLOAT16, ["b", "s", 4])],
        [helper.make_tensor("table", kind.BFLOAT16, (10, 4), table.tobytes(), raw=True)],
    )
    opset = [helper.make_opsetid("", 23)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.save(model, tmp_path / "embed_tokens.onnx")
    spec = GraphSpec(
        "embed_tokens",
        "embed_tokens.onnx",
        (TensorSpec("input_ids", "int64", ("b", "s")),),
        (TensorSpec("inputs_embeds", "bfloat16", ("b", "s", 4)),),
        opset=23,
        operators={"Gather": 1},
        parameter_bytes=table.nbytes,
    )
    backend = OnnxRuntimeDeviceBackend(tmp_path, replace(sample_manifest, graphs=(spec,)), CPU, 1)
    found = backend.run("embed_tokens", {"input_ids": np.array([[1, 5, 9]])})["inputs_embeds"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, table[[[1, 5, 9]]])


def test_a_graph_cannot_be_replaced_on_a_device(
    model: VisionLanguageModel, trained_bundle: Path
) -> None:
    with pytest.raises(InputError, match="found 'onnxruntime-cpu', which cannot replace a graph"):
        on_device(model, trained_bundle, CPU).with_graph("decoder", trained_bundle / "decoder.onnx")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_load_is_an_error(trained_bundle: Path) -> None:
    absent = replace(CPU, name="CUDAExecutionProvider", backend="onnxruntime-cuda")
    if not unmet("onnxruntime-cuda"):
        pytest.skip("CUDA works here; without it, the CPU would have taken its place in silence")
    with pytest.raises(VlmportError, match="found the providers CPUExecutionProvider; expected CU"):
        open_provider_session(trained_bundle / "decoder.onnx", absent, 1)


def test_a_plugin_that_cannot_be_used_is_an_error(trained_bundle: Path) -> None:
    absent = replace(TENSORRT_RTX, plugin="vlmport_absent_plugin")
    with pytest.raises(VlmportError, match="library of vlmport_absent_plugin cannot be used"):
        open_provider_session(trained_bundle / "decoder.onnx", absent, 1)


def test_a_damaged_graph_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "decoder.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="CPUExecutionProvider cannot load it"):
        open_provider_session(tmp_path / "decoder.onnx", CPU, 1)


def session(*nodes: tuple[str, str, str]) -> Any:
    """A session with (provider, operator, name) as its nodes."""
    parts = [
        SimpleNamespace(
            ep_name=provider,
            get_nodes=lambda operator=operator, name=name: [
                SimpleNamespace(op_type=operator, name=name)
            ],
        )
        for provider, operator, name in nodes
    ]
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)


def test_nodes_that_run_elsewhere_are_named(caplog: pytest.LogCaptureFixture) -> None:
    mixed = session(
        (CUDA.name, "MatMul", "a"),
        ("CPUExecutionProvider", "Attention", "layer_0"),
        ("CPUExecutionProvider", "Attention", "layer_1"),
        ("CPUExecutionProvider", "Shape", "s"),
    )
    with caplog.at_level(logging.WARNING):
        warn_of_other_nodes(mixed, CUDA, "decoder.onnx")
    assert "decoder.onnx: 2 nodes do not run on CUDAExecutionProvider: Attention x2" in caplog.text
    assert "layer_0 (Attention, CPUExecutionProvider)" in caplog.text


def test_shapes_on_the_cpu_are_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    usual = session((CUDA.name, "MatMul", "a"), ("CPUExecutionProvider", "Shape", "s"))
    with caplog.at_level(logging.WARNING):
        warn_of_other_nodes(usual, CUDA, "decoder.onnx")
    assert caplog.text == ""


def test_a_provider_without_any_node_is_an_error() -> None:
    with pytest.raises(VlmportError, match="runs none of its nodes"):
        warn_of_other_nodes(session(("CPUExecutionProvider", "MatMul", "a")), CUDA, "decoder.onnx")


def test_the_real_assignment_of_nodes_is_read(
    trained_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_provider_session(trained_bundle / "decoder.onnx", CPU, 1)
    other = replace(CPU, name="OtherExecutionProvider")
    with pytest.raises(VlmportError, match="OtherExecutionProvider runs none of its nodes"):
        warn_of_other_nodes(opened, other, "decoder.onnx")
    assert "do not run" not in caplog.text


def unmet(backend: Any) -> str:
    missing = [f"{need.name}: {need.found}" for need in requirements(backend) if not need.is_met]
    return "; ".join(missing)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", [CUDA, TENSORRT_RTX], ids=lambda provider: provider.backend)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", sorted(RECIPES))
def test_tokens_on_a_gpu_equal_the_cpu_backend(
    family: str, precision: str, provider: OrtProvider
) -> None:
    if missing := unmet(provider.backend):
        pytest.skip(
            f"{missing}; would have compared the greedy tokens of {family} in {precision}, batch "
            f"1, 3 and 8, on {provider.name} with those of the CPU"
        )
    bundle = bundle_of(family, precision)
    reference = endless(bundle)
    device = on_device(reference, bundle, provider)
    for batch in (1, 3, 8):
        requests = [
            replace(request, sampling=SamplingOptions()) for request in mixed_requests(batch)
        ]
        tokens, steps = answers(reference, requests)
        found, _ = answers(device, requests)
        for row in range(batch):
            gap = gap_where_parted(tokens[row], found[row], [step[row] for step in steps])
            assert gap <= (1e-3 if precision == "fp32" else 6e-2), row


@pytest.mark.gpu
@pytest.mark.parametrize("provider", [CUDA, TENSORRT_RTX], ids=lambda provider: provider.backend)
@pytest.mark.parametrize("family", sorted(RECIPES))
def test_slots_on_a_gpu_answer_as_a_sequence_alone(family: str, provider: OrtProvider) -> None:
    if missing := unmet(provider.backend):
        pytest.skip(
            f"{missing}; would have compared answers of {family} in slots on {provider.name}, "
            "joining and leaving, with those of the CPU alone"
        )
    bundle = bundle_of(family, "fp32")
    reference = endless(bundle)
    device = on_device(reference, bundle, provider)
    limit = tolerance_for("logits", "float32").max_abs
    margin = near_tie_margin(limit)
    check_slots(device, reference, num_slots=5, cache_tokens=5 * 220, margin=margin)


def gap_where_parted(
    expected: Sequence[int], found: Sequence[int], steps: Sequence[NDArray[np.float32]]
) -> float:
    """How much the reference preferred its own token where two answers part; 0 if they do not."""
    for wanted, got, logits in zip(expected, found, steps, strict=False):
        if wanted != got:
            return float(logits[wanted] - logits[got])
    return 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("provider", [CUDA, TENSORRT_RTX], ids=lambda provider: provider.backend)
def test_a_gpu_runs_every_node_of_the_decoder(
    provider: OrtProvider, trained_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if missing := unmet(provider.backend):
        pytest.skip(
            f"{missing}; would have looked for nodes that {provider.name} leaves to the CPU"
        )
    with caplog.at_level(logging.WARNING):
        open_provider_session(trained_bundle / "decoder.onnx", provider, 1)
    assert caplog.text == ""
