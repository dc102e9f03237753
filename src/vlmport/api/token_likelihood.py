"""Predicts windows of tokens with several bundles in step, and compares their distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmport.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.api.progress import Progress
    from vlmport.runtime import VisionLanguageModel

__all__ = ["Likelihoods", "Predictions", "predict_windows"]


@dataclass(slots=True)
class Likelihoods:
    """One bundle's negative log-likelihoods.

    Attributes:
        sums: of each window, over its predicted tokens, in nats.
        counts: predicted tokens of each window.
    """

    sums: list[float]
    counts: list[int]


@dataclass(slots=True)
class Predictions:
    """What was found at all places together.

    Attributes:
        likelihoods: of each bundle.
        count: predicted tokens.
        sum_kl: of KL(second bundle || first bundle), in nats; 0 with one bundle.
        max_kl: the largest.
        same_top: places at which the likeliest token is the same.
    """

    likelihoods: list[Likelihoods]
    count: int = 0
    sum_kl: float = 0.0
    max_kl: float = 0.0
    same_top: int = 0


def predict_windows(
    models: Sequence[VisionLanguageModel],
    names: Sequence[Path],
    windows: Sequence[Sequence[int]],
    batch: int,
    progress: Progress,
) -> Predictions:
    """Predicts every token but the first of each window.

    Args:
        models: one, or two to be compared: then the first is held against the second.
        names: of the models, for messages.
        windows: token ids, two or more each.
        batch: windows computed together.
        progress: is told of every predicted token.

    Raises:
        BundleError: if logits are NaN or Inf.
    """
    counts = [len(window) - 1 for window in windows]
    found = Predictions([Likelihoods([0.0] * len(windows), counts) for _ in models])
    for start in range(0, len(windows), batch):
        group = windows[start : start + batch]
        runs = [_logits(model, group) for model in models]
        # One step of every model at a time: no model's logits are kept for longer than a step.
        for place, logits in enumerate(zip(*runs, strict=True), start=1):
            rows = [row for row, window in enumerate(group) if len(window) > place]
            for row in rows:
                target = group[row][place]
                logs = [
                    _log_softmax(one[row], name) for one, name in zip(logits, names, strict=True)
                ]
                for likelihoods, log in zip(found.likelihoods, logs, strict=True):
                    likelihoods.sums[start + row] -= float(log[target])
                _compare(found, logs)
            progress.advance(len(rows))
    return found


def _logits(
    model: VisionLanguageModel, group: Sequence[Sequence[int]]
) -> Iterator[NDArray[np.float32]]:
    """Logits [rows, vocab_size] that predict place 1, 2, ...; those of ended rows mean nothing."""
    longest = max(len(window) for window in group)
    lengths = np.array([len(window) for window in group])
    ids = np.array([[*window, *[0] * (longest - len(window))] for window in group], np.int64)
    decoding = model.start_decoding(len(group), longest)
    yield decoding.prefill(model.inputs_embeds(ids[:, :1]), np.ones(len(group), np.int64))
    for place in range(1, longest - 1):
        yield decoding.step(np.ascontiguousarray(ids[:, place]), lengths > place + 1)


def _log_softmax(logits: NDArray[np.float32], name: Path) -> NDArray[np.float64]:
    if not np.isfinite(logits).all():
        msg = (
            f"{name}: its logits have NaN or Inf, expected finite numbers; the bundle's precision "
            "does not hold the model's values; quantize or export it again with more in float"
        )
        raise BundleError(msg)
    shifted = logits.astype(np.float64) - float(logits.max())
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def _compare(found: Predictions, logs: Sequence[NDArray[np.float64]]) -> None:
    found.count += 1
    if len(logs) < 2:
        return
    ours, theirs = logs
    # Rounding can bring the divergence of nearly equal distributions a hair below zero.
    divergence = max(0.0, float(np.exp(theirs) @ (theirs - ours)))
    found.sum_kl += divergence
    found.max_kl = max(found.max_kl, divergence)
    found.same_top += int(ours.argmax() == theirs.argmax())
