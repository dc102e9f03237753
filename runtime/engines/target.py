"""Which GPUs an engine is built for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from vlmport.errors import EngineError
from vlmport.runtime.device.cuda import find_device

if TYPE_CHECKING:
    import tensorrt as trt

    from vlmport.contract_engines import BuildOptions
    from vlmport.runtime.engines.bindings import Bindings, RtxBindings

__all__ = ["PORTABLE", "Target", "choose_target"]

PORTABLE = "portable"


@dataclass(frozen=True, slots=True)
class Target:
    """What engines are built for.

    Attributes:
        capability: "sm89", several joined by "+", or "portable".
        names: members of ComputeCapability; empty for what TensorRT builds when it is not told.
        device: name of the GPU at hand; "" if there is none.
    """

    capability: str
    names: tuple[str, ...]
    device: str

    def apply(self, bindings: Bindings, config: trt.IBuilderConfig) -> None:
        """Tells a configuration of TensorRT-RTX; the full TensorRT builds for the GPU at hand.

        Raises:
            EngineError: if TensorRT does not accept it.
        """
        if not self.names:
            return
        rtx, settings = cast("RtxBindings", bindings), cast("Any", config)
        settings.num_compute_capabilities = len(self.names)
        for index, name in enumerate(self.names):
            if not settings.set_compute_capability(getattr(rtx.ComputeCapability, name), index):
                msg = f"compute capability {name}: TensorRT does not take it; choose another one"
                raise EngineError(msg)


def choose_target(bindings: Bindings, options: BuildOptions) -> Target:
    """What the options ask for.

    TensorRT-RTX that is told nothing builds engines that run on 8.0 and everything later, with or
    without a GPU at hand. The full TensorRT builds for the GPU at hand alone.

    Raises:
        EngineError: if a compute capability is unknown, or there is no GPU where one is needed.

    Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
    """
    device = find_device()
    name = "" if device is None else device.name
    if options.backend == "tensorrt-rtx":
        names = _capability_names(cast("RtxBindings", bindings), options.compute_capabilities)
        label = "+".join(one.lower() for one in names) or PORTABLE
        return Target(label, names, name)
    if device is None:
        msg = (
            "tensorrt: found no GPU; TensorRT builds engines on the GPU that they run on; build "
            "there, or with --backend tensorrt-rtx, which needs none"
        )
        raise EngineError(msg)
    capability = ".".join(map(str, device.capability))
    if others := sorted(set(options.compute_capabilities) - {capability}):
        msg = (
            f"compute capability {', '.join(others)}: TensorRT builds for the GPU at hand alone "
            f"({device.name}, {capability}); leave --compute-capability out, or use "
            "--backend tensorrt-rtx"
        )
        raise EngineError(msg)
    return Target(device.tag, (), name)


def _capability_names(bindings: RtxBindings, wanted: tuple[str, ...]) -> tuple[str, ...]:
    known = {
        f"{name[2:-1]}.{name[-1]}": name
        for name in bindings.ComputeCapability.__members__
        if name.startswith("SM")
    }
    unknown = [capability for capability in wanted if capability not in known]
    if unknown or len(set(wanted)) < len(wanted):
        available = ", ".join(sorted(known, key=float))
        what = f"found {', '.join(unknown)}" if unknown else "one is named twice"
        msg = (
            f"compute capability: {what}; available are {available}; leave it out for engines "
            "that run on 8.0 and later"
        )
        raise EngineError(msg)
    return tuple(known[capability] for capability in sorted(wanted, key=float))
