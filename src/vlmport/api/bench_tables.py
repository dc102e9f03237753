"""From the samples of a benchmark to its figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.api.bench_contenders import TORCH_CONTENDERS, is_on_gpu
from vlmport.api.bench_points import DecodePoint, FirstTokenPoint
from vlmport.api.bench_report import (
    ContenderFigures,
    DecodeFigures,
    FirstTokenFigures,
    ratios,
    spread,
)
from vlmport.api.bench_worker import NotRun
from vlmport.runtime.device.sizes import itemsize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmport.api.bench_points import Measurement, Point
    from vlmport.api.bench_report import Spread
    from vlmport.api.bench_worker import MemoryUse
    from vlmport.contract import Manifest

__all__ = ["contender_figures", "decode_bytes", "decode_figures", "first_token_figures"]


def contender_figures(
    found: Mapping[str, NotRun | tuple[str, MemoryUse]],
) -> tuple[ContenderFigures, ...]:
    """Name -> why it was not run, or what computes and how much memory it took."""
    figures = []
    for name, one in found.items():
        if isinstance(one, NotRun):
            figures.append(ContenderFigures(name, "", None, None, one.reason))
        else:
            computes, memory = one
            figures.append(
                ContenderFigures(name, computes, memory.peak_rss_bytes, memory.device_bytes, "")
            )
    return tuple(figures)


def first_token_figures(measured: Measurement) -> tuple[FirstTokenFigures, ...]:
    """One row a prompt and contender."""
    return tuple(
        FirstTokenFigures(
            contender=name,
            images=point.images,
            text_tokens_wanted=point.text_tokens,
            text_tokens=point.prompt.text_tokens if point.prompt else 0,
            image_tokens=point.prompt.image_tokens if point.prompt else 0,
            milliseconds=_scaled(measured.seconds.get((point, name)), 1e3),
            ratio=_ratio(measured, point, name),
            reason=measured.reasons.get((point, name), ""),
        )
        for point in measured.points
        if isinstance(point, FirstTokenPoint)
        for name in measured.contenders
    )


def decode_figures(measured: Measurement, manifest: Manifest) -> tuple[DecodeFigures, ...]:
    """One row a context, batch and contender."""
    return tuple(
        _decode_row(measured, point, name, manifest)
        for point in measured.points
        if isinstance(point, DecodePoint)
        for name in measured.contenders
    )


def decode_bytes(manifest: Manifest, batch: int, context: int, steps: int) -> int:
    """Bytes that one decode step cannot do without, on average over some steps.

    The decoder's weights once; of each row the keys and values of all its tokens so far, its own
    new ones included, and once more for writing these; and its token's embedding.

    Args:
        manifest: the bundle's.
        batch: rows.
        context: tokens of each row before the first of the steps.
        steps: over which is averaged.
    """
    layout = manifest.kv_layout
    a_token = layout.bytes_per_token(itemsize(layout.dtype))
    embedding = manifest.dimensions.hidden_size * itemsize(manifest.precision)
    read = context + (steps + 1) / 2
    weights = manifest.graph("decoder").parameter_bytes
    return weights + round(batch * (a_token * (read + 1) + embedding))


def _decode_row(
    measured: Measurement, point: DecodePoint, name: str, manifest: Manifest
) -> DecodeFigures:
    seconds = measured.seconds.get((point, name))
    context = len(point.prompt.token_ids) if point.prompt else 0
    moved = None
    if name not in TORCH_CONTENDERS and point.prompt is not None:
        moved = decode_bytes(manifest, point.batch, context, point.steps)
    share = None
    # The bandwidth is that of the device of the first contender.
    if seconds and moved is not None and is_on_gpu(name) == is_on_gpu(measured.contenders[0]):
        pairs = zip(seconds, measured.bandwidths, strict=True)
        share = spread([moved / step / bandwidth for step, bandwidth in pairs])
    return DecodeFigures(
        contender=name,
        batch=point.batch,
        context_wanted=point.context,
        context=context,
        steps=point.steps,
        step_milliseconds=_scaled(seconds, 1e3),
        tokens_per_second=spread([point.batch / one for one in seconds]) if seconds else None,
        host_milliseconds=_scaled(measured.host_seconds.get((point, name)), 1e3),
        bytes_per_step=moved,
        roofline_share=share,
        ratio=_ratio(measured, point, name),
        reason=measured.reasons.get((point, name), ""),
    )


def _ratio(measured: Measurement, point: Point, name: str) -> Spread | None:
    theirs = measured.seconds.get((point, name))
    ours = measured.seconds.get((point, measured.contenders[0]))
    return ratios(theirs, ours) if theirs and ours else None


def _scaled(samples: list[float] | None, factor: float) -> Spread | None:
    return spread([factor * sample for sample in samples]) if samples else None
