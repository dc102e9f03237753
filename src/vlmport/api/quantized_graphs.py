"""The graphs before the decoder, each beside PyTorch on PyTorch's input of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.api.quantized_report import GraphSignal
from vlmport.api.signal_noise import SignalSums
from vlmport.errors import ParityError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmport.api.builtin_cases import Case
    from vlmport.api.parity_model import ComparedModel
    from vlmport.api.progress import Progress
    from vlmport.export.reference import Reference

__all__ = ["graph_signals"]


def graph_signals(
    reference: Reference, bundle: ComparedModel, cases: Sequence[Case], progress: Progress
) -> tuple[GraphSignal, ...]:
    """Runs the image graphs on the pictures of all cases, one at a time.

    Args:
        reference: the PyTorch model in float32.
        bundle: the opened bundle.
        cases: whose pictures to take.
        progress: is told of each case.

    Raises:
        ParityError: if an output has another shape than PyTorch's.
    """
    sums: dict[tuple[str, str], SignalSums] = {}
    progress.start("comparing image graphs", len(cases))
    for case in cases:
        for image in case.rgb_images():
            arrays = reference.image_inputs(image)
            for graph in bundle.image_graphs:
                theirs = reference.run(graph, arrays)
                ours = bundle.run(graph, arrays)
                for name, expected in theirs.items():
                    if expected.dtype.kind != "f":
                        continue  # a mask of patches; layers compute no booleans
                    total = sums.setdefault((graph, name), SignalSums(-1))
                    try:
                        total.add(ours[name], expected)
                    except ValueError as error:
                        msg = f"{graph}, {name}, case {case.name!r}: {error}; export it again"
                        raise ParityError(msg) from error
                arrays = {**arrays, **theirs}
        progress.advance(1)
    progress.finish()
    return tuple(GraphSignal(*names, total.signal()) for names, total in sums.items())
