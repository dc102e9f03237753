"""Finds out what is wrong with calibration data before any of it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.errors import CalibrationError, InputError, close_matches
from vlmport.runtime.generate import check_length
from vlmport.runtime.messages import messages_from_prompt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlmport.calibration.samples import CalibrationSample
    from vlmport.calibration.statistics import Probe
    from vlmport.contract import Manifest
    from vlmport.runtime import VisionLanguageModel

__all__ = ["check_graphs", "check_samples"]


def check_graphs(probes: Mapping[str, Sequence[Probe]], manifest: Manifest) -> None:
    """Checks that the bundle has the graphs.

    Raises:
        CalibrationError: if it lacks one.
    """
    known = [graph.name for graph in manifest.graphs]
    for graph in probes:
        if graph not in known:
            msg = (
                f"{graph}: statistics are asked for; the bundle has no such graph; "
                f"{close_matches(graph, known)}"
            )
            raise CalibrationError(msg)


def check_samples(
    samples: Sequence[CalibrationSample],
    probes: Mapping[str, Sequence[Probe]],
    model: VisionLanguageModel,
) -> None:
    """Opens and prepares every picture and renders every prompt, and keeps nothing of it.

    Raises:
        CalibrationError: if there are no samples, if some cannot be asked (all listed at once), or
            if statistics of an image graph are asked for and no sample has a picture.
    """
    if not samples:
        msg = "calibration data: found no sample; expected at least one question"
        raise CalibrationError(msg)
    faults = [f"{sample.name}: {fault}" for sample in samples if (fault := _fault(sample, model))]
    if faults:
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        msg = f"calibration data: {count} found:\n" + "\n".join(f"  {fault}" for fault in faults)
        raise CalibrationError(msg)
    needing = [graph for graph in model.manifest.image_graphs if probes.get(graph)]
    if needing and not any(sample.images for sample in samples):
        msg = (
            f"calibration data: none of {len(samples)} samples has a picture, and statistics of "
            f"{' and '.join(needing)} are asked for; give questions about pictures, or leave "
            "these graphs as they are"
        )
        raise CalibrationError(msg)


def _fault(sample: CalibrationSample, model: VisionLanguageModel) -> str:
    """What the runtime has against a sample; "" for nothing."""
    placeholder = model.manifest.prompt.image_placeholder
    try:
        messages = messages_from_prompt(sample.prompt, len(sample.images), placeholder)
        layouts = [model.prepare(image).layout for image in sample.images]
        check_length(model.encode(messages, layouts), model.manifest.dimensions.max_length)
    except InputError as error:
        return str(error)
    return ""
