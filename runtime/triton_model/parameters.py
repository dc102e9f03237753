"""Parameters of a request: how tokens are chosen, and when the answer ends."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vlmport.errors import InputError, close_matches
from vlmport.runtime.sampling import SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CallParameters", "read_parameters"]

_WHOLE = ("max_tokens", "priority", "timeout", "top_k", "seed")
_SAMPLING = tuple(field.name for field in fields(SamplingOptions))
_KNOWN = ("max_tokens", "priority", "timeout", *_SAMPLING)
# The `generate` endpoint puts the request's id among the parameters (Triton 2.51).
_TRITONS_OWN = ("id",)
_MICROSECONDS = 1e6


@dataclass(frozen=True, slots=True)
class CallParameters:
    """What the parameters of a request say.

    Attributes:
        max_tokens: of the answer; None for the bundle's default.
        sampling: how tokens are chosen.
        priority: requests of a smaller one are begun first, as in Triton; 0 is the default.
        timeout_s: seconds within which the answer must be complete; None for no limit.
    """

    max_tokens: int | None
    sampling: SamplingOptions
    priority: int
    timeout_s: float | None


def read_parameters(text: str, timeout: int) -> CallParameters:
    """Reads a request's parameters.

    Args:
        text: a JSON object of numbers and texts; "" for none.
        timeout: microseconds of Triton's own field; 0 for no limit. The endpoint `generate` leaves
            it among the parameters (Triton 2.51).

    Raises:
        InputError: with every fault at once.
    """
    values: dict[str, object] = json.loads(text) if text else {}
    given = {name: value for name, value in values.items() if name not in _TRITONS_OWN}
    faults = [
        f"parameter {name}: unknown; {close_matches(name, _KNOWN)}"
        for name in given
        if name not in _KNOWN
    ]
    numbers: dict[str, Any] = {}  # checked here: whole numbers where one is expected
    for name in _KNOWN:
        if name in given:
            try:
                numbers[name] = _number(name, given[name])
            except InputError as error:
                faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    if numbers.get("max_tokens", 1) < 1:
        msg = f"parameter max_tokens: found {numbers['max_tokens']}; expected 1 or more"
        raise InputError(msg)
    microseconds = numbers.get("timeout", timeout)
    if microseconds < 0:
        msg = f"parameter timeout: found {microseconds}; expected microseconds, 0 for no limit"
        raise InputError(msg)
    return CallParameters(
        max_tokens=numbers.get("max_tokens"),
        sampling=SamplingOptions(**_only(numbers, _SAMPLING)),
        priority=numbers.get("priority", 0),
        timeout_s=microseconds / _MICROSECONDS if microseconds else None,
    )


def _only(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _number(name: str, value: object) -> float:
    """A number, or a text of one: gRPC clients before 2.52 cannot send floating-point numbers."""
    wanted = "a whole number" if name in _WHOLE else "a number"
    fault = InputError(f"parameter {name}: found {value!r}; expected {wanted}")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise fault
    try:
        number = float(value)
        if name not in _WHOLE:
            return number
        whole = int(value) if isinstance(value, str) else value
    except ValueError:
        raise fault from None
    if not math.isfinite(number) or whole != int(whole):
        raise fault
    return int(whole)
