"""Matches a checkpoint's tensors with the parameters of the modules that are exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.errors import CheckpointError
from vlmport.export.tensor_store import TensorStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from vlmport.export.tensor_store import WeightFile

__all__ = ["PrefixRule", "collect_tensors", "match_weights", "tensor_shapes"]

# (prefix in the checkpoint, prefix among the module parameters)
PrefixRule = tuple[str, str]

# Buffers that older versions of transformers saved and newer ones compute.
_COMPUTED = (".position_ids", ".rotary_emb.inv_freq", ".masked_bias", ".attention.bias")


def collect_tensors(
    files: Iterable[WeightFile], rules: Sequence[PrefixRule]
) -> dict[str, tuple[WeightFile, str]]:
    """Renames the tensors of some files; the first rule whose prefix fits decides.

    Args:
        files: opened files of weights.
        rules: prefix in the file -> prefix of the parameter.

    Returns:
        Parameter name -> (file, key in that file). A tensor that no rule fits keeps its name.
    """
    found: dict[str, tuple[WeightFile, str]] = {}
    for file in files:
        for key in file.tensors:
            rule = next(((old, new) for old, new in rules if key.startswith(old)), ("", ""))
            found[rule[1] + key.removeprefix(rule[0])] = (file, key)
    return found


def tensor_shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Parameter name, with the module's name and a dot in front -> shape."""
    return {
        f"{prefix}.{name}": tuple(value.shape)
        for prefix, module in modules.items()
        for name, value in module.state_dict().items()
    }


def match_weights(
    checkpoint: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[WeightFile, str]],
    may_be_missing: Callable[[str], bool],
    tied: Mapping[str, str],
) -> TensorStore:
    """Checks that the checkpoint has the model's weights, all of them and no others.

    Args:
        checkpoint: folder, for the message.
        expected: parameter name -> shape.
        found: as `collect_tensors` returns it.
        may_be_missing: whether a parameter is dead weight that some checkpoints leave out.
        tied: parameter -> the parameter that it shares its values with.

    Returns:
        The store; tied parameters that the checkpoint leaves out read the one they share.

    Raises:
        CheckpointError: with all missing, extra and misshapen tensors at once.
    """
    entries = dict(found)
    for name, origin in tied.items():
        if name not in entries and origin in entries:
            entries[name] = entries[origin]
    missing = sorted(n for n in expected if n not in entries and not may_be_missing(n))
    extra = sorted(n for n in entries if n not in expected and not n.endswith(_COMPUTED))
    misshapen = [
        f"{name} ({file.tensors[key].shape}, expected {expected[name]})"
        for name, (file, key) in sorted(entries.items())
        if name in expected and file.tensors[key].shape != expected[name]
    ]
    faults = [
        f"{title} ({len(names)}): {', '.join(names)}"
        for title, names in (
            ("missing weights", missing),
            ("weights that the model has no place for", extra),
            ("weights of the wrong shape", misshapen),
        )
        if names
    ]
    if faults:
        msg = (
            f"{checkpoint}: config.json and weights do not fit. " + "; ".join(faults) + ". "
            "Check that config.json belongs to these weights, or download the checkpoint again"
        )
        raise CheckpointError(msg)
    return TensorStore(entries)
