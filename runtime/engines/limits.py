"""Checks a request's shapes against what an engine was built for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmport.contract_engines import Engine, EngineProfile, PortRange

__all__ = ["check_shapes", "largest_length", "profile_of"]

# Axis -> what makes room for it; other axes follow the size of the pictures.
_OPTIONS = {
    "batch": "--max-batch",
    "capacity": "--max-length",
    "num_images": "--max-images",
    "num_patches": "--max-images",
    "num_tiles": "--max-images",
    "sequence_length": "--prefill-chunk",
}


def profile_of(engine: Engine, name: str) -> tuple[int, EngineProfile]:
    """Index and limits of a profile.

    Raises:
        EngineError: if the engine has no such profile.
    """
    for index, profile in enumerate(engine.profiles):
        if profile.name == name:
            return index, profile
    found = ", ".join(profile.name for profile in engine.profiles)
    msg = (
        f"{engine.graph}: found the profiles {found}; expected {name}; build the engines again "
        "with `vlmport build`"
    )
    raise EngineError(msg)


def largest_length(engine: Engine, profile: EngineProfile, port: str, axis: int) -> int:
    """The largest length of an axis of an input that a profile takes."""
    for limits in profile.ranges:
        if limits.port == port:
            return limits.largest[axis]
    found = next(one for one in engine.inputs if one.name == port).shape[axis]
    assert isinstance(found, int)  # an axis that can change has a range
    return found


def check_shapes(
    engine: Engine, profile: EngineProfile, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks the shapes of all inputs.

    Args:
        engine: what engine.json says.
        profile: of its profiles, the one in use.
        shapes: input -> shape.

    Raises:
        EngineError: if one lies outside; it names the axis and the option that makes room.
    """
    ranges = {limits.port: limits for limits in profile.ranges}
    for port in engine.inputs:
        shape = shapes[port.name]
        limits = ranges.get(port.name)
        if limits is None:
            if shape != port.shape:
                msg = f"{engine.graph}: {port.name} has shape {shape}; expected {port.shape}"
                raise EngineError(msg)
            continue
        for axis, length in enumerate(shape):
            if not limits.smallest[axis] <= length <= limits.largest[axis]:
                raise EngineError(_outside(engine, profile, limits, axis, length))


def _outside(
    engine: Engine, profile: EngineProfile, limits: PortRange, axis: int, length: int
) -> str:
    port = next(one for one in engine.inputs if one.name == limits.port)
    name = port.shape[axis]
    option = _OPTIONS.get(str(name))
    remedy = f"with `vlmport build {option} {length}`" if option else "for such pictures"
    return (
        f"{engine.graph}: found {name} {length} (axis {axis} of {limits.port}); its profile "
        f"{profile.name} takes {limits.smallest[axis]} to {limits.largest[axis]}; ask for less, or "
        f"build the engines again {remedy}"
    )
