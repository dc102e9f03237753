"""Programs that need little decomposition are not traced twice, and mean the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vlmport.export.direct_decomposition import decompose_directly, direct_decomposition

_aten = torch.ops.aten


class Replaced(nn.Module):
    """Has every operator that is replaced, of an image and of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 2, stride=2, padding="valid")
        self.dropout = nn.Dropout(0.5)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        patches = self.dropout(self.patches(image))
        flat = patches.flatten(2).transpose(1, 2)
        merged = torch.square(flat.reshape(flat.shape[0], -1))
        same = flat.reshape(flat.shape).to(torch.float32).to("cpu")
        mask = (merged > 0.5) & (merged < 2)
        return patches.flatten(0, 1), merged, same, mask.to(torch.float16), image.to(torch.float32)


class Calls(nn.Module):
    """Returns what a function makes of a tensor."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.function(value)


def written_through_a_view(value: torch.Tensor) -> torch.Tensor:
    written = value.clone()
    written.reshape(-1).add_(1)
    return written


def program_of(module: nn.Module, value: torch.Tensor) -> torch.export.ExportedProgram:
    batch = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(module.eval(), (value,), dynamic_shapes=batch)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _aten.logit.default: lambda value, eps=None: torch.log(value / (1 - value))
}


def test_replaced_operators_give_the_same() -> None:
    torch.manual_seed(0)
    module, image = Replaced(), torch.randn(3, 3, 8, 6)
    program = program_of(module, image)
    assert decompose_directly(program.graph_module, DECOMPOSITIONS)
    left = {node.target for node in program.graph.nodes}
    assert not left & {_aten.reshape.default, _aten.flatten.using_ints, _aten.to.dtype}
    assert not left & {_aten.dropout.default, _aten.conv2d.padding, _aten.square.default}
    for size in (3, 5):
        inputs = torch.randn(size, 3, 8, 6)
        for mine, theirs in zip(program.module()(inputs), module(inputs), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(torch.logit, id="decomposed"),
        pytest.param(lambda value: value.clone().add_(1), id="written in place"),
        pytest.param(written_through_a_view, id="written through a view"),
        pytest.param(lambda value: value.view_as(value).unflatten(1, (2, 2)), id="composite"),
        pytest.param(lambda value: nn.functional.dropout(value, 0.5, True), id="random"),
    ],
)
def test_other_operators_are_left_to_torch(function: Callable[[torch.Tensor], Any]) -> None:
    program = program_of(Calls(function), torch.rand(3, 4))
    assert not decompose_directly(program.graph_module, DECOMPOSITIONS)


def test_what_writes_through_a_view_means_the_same_afterwards() -> None:
    program = program_of(Calls(written_through_a_view), torch.rand(3, 4))
    decompose_directly(program.graph_module, DECOMPOSITIONS)
    value = torch.rand(5, 4)
    torch.testing.assert_close(program.module()(value), value + 1)


def test_torch_decomposes_the_rest_of_a_program() -> None:
    program = program_of(Calls(lambda value: torch.logit(value).reshape(-1)), torch.rand(3, 4))
    with direct_decomposition():
        decomposed = program.run_decompositions(DECOMPOSITIONS)
    assert _aten.logit.default not in {node.target for node in decomposed.graph.nodes}
    value = torch.rand(5, 4)
    torch.testing.assert_close(decomposed.module()(value), torch.logit(value).reshape(-1))
    assert torch.export.ExportedProgram.run_decompositions.__name__ == "run_decompositions"
    assert torch.export.ExportedProgram.run_decompositions.__module__.startswith("torch")
