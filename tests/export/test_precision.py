from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.checkpoints import Recipe, make_checkpoint

from vlmport.api.export import ExportOptions, export
from vlmport.api.progress import SilentProgress
from vlmport.errors import ExportError
from vlmport.export.family import load_reference, plan_checkpoint
from vlmport.export.precision import TORCH_DTYPES, default_dtype, in_precision
from vlmport.export.tracing import build_on_meta
from vlmport.export.wrappers.decoder import in_place_attention

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.contract import Precision


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(dtype=torch.bfloat16)
    return make_checkpoint(tmp_path_factory.mktemp("precision") / "checkpoint", recipe)


def test_the_default_dtype_comes_back_whatever_happens() -> None:
    def fail() -> None:
        with default_dtype(torch.float16):
            raise ZeroDivisionError(torch.get_default_dtype())

    with pytest.raises(ZeroDivisionError, match=r"torch\.float16"):
        fail()
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_pixels_and_logits_stay_float32_and_the_rest_follows(
    checkpoint: Path, precision: Precision
) -> None:
    _, plan = plan_checkpoint(checkpoint)
    half = in_precision(plan, precision)
    ports = {
        port.name: port.dtype for graph in half.graphs for port in (*graph.inputs, *graph.outputs)
    }
    floats = {name for name, dtype in ports.items() if dtype.is_floating_point}
    kept = {name for name in floats if ports[name] == torch.float32}
    assert kept == {"pixel_values", "logits"}
    assert {ports[name] for name in floats - kept} == {TORCH_DTYPES[precision]}
    assert {"vision_features", "image_features", "inputs_embeds"} <= floats - kept
    assert half.kv_layout.dtype == precision
    assert {graph.dtype for graph in half.graphs} == {TORCH_DTYPES[precision]}


def test_float32_is_the_plan_as_it_was(checkpoint: Path) -> None:
    _, plan = plan_checkpoint(checkpoint)
    same = in_precision(plan, "float32")
    assert [graph.inputs for graph in same.graphs] == [graph.inputs for graph in plan.graphs]
    assert [graph.outputs for graph in same.graphs] == [graph.outputs for graph in plan.graphs]


def test_parameters_are_built_in_half_and_rotary_frequencies_in_float32(checkpoint: Path) -> None:
    _, plan = plan_checkpoint(checkpoint)
    decoder = in_precision(plan, "bfloat16").graphs[-1]
    with in_place_attention():
        module = build_on_meta(decoder.build, decoder.dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    buffers = dict(module.named_buffers())
    frequencies = [value for name, value in buffers.items() if name.endswith("inv_freq")]
    assert frequencies
    assert {value.dtype for value in frequencies} == {torch.float32}


def test_the_reference_is_loaded_in_the_dtype_with_the_stored_bits(checkpoint: Path) -> None:
    half: Any = load_reference(checkpoint, "bfloat16")
    whole: Any = load_reference(checkpoint)
    for part in ("vision_tower", "connector", "language_model"):
        values = dict(getattr(half, part).named_parameters())
        assert {value.dtype for value in values.values()} == {torch.bfloat16}
        # The checkpoint is stored in bfloat16, so that float32 holds the same numbers.
        for name, value in getattr(whole, part).named_parameters():
            assert torch.equal(value, values[name].float()), name


def test_an_unknown_precision_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(checkpoint, tmp_path / "bundle", precision="fp8")
    expected = r"precision: found 'fp8'; did you mean fp.*known: bf16, fp16, fp32"
    with pytest.raises(ExportError, match=expected):
        export(options, SilentProgress())
    assert list(tmp_path.iterdir()) == []
