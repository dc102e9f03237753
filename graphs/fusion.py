"""The base of passes that replace a pattern of nodes, and of their explanations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import MatchingTracer, MatchResult, MatchStatus, pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Fusion", "FusionPass", "MatchResult", "Refusal", "as_int", "as_ints", "make_rule"]


class Fusion(Protocol):
    """One rewrite rule; the parameters of `pattern` and `check` are named values of the pattern."""

    @property
    def pattern(self) -> Callable[..., Any]:
        """Builds the pattern with operators of `op`."""
        ...

    @property
    def check(self) -> Callable[..., MatchResult]:
        """Says whether a match may be rewritten, and why not."""
        ...

    @property
    def rewrite(self) -> Callable[..., ir.Value]:
        """Builds the replacement with operators of `op`."""
        ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """A place where a fusion's pattern was found and its check said no.

    Attributes:
        rule: name of the rewrite rule.
        node: name of the last node of the pattern.
        reason: why the check refused.
    """

    rule: str
    node: str
    reason: str


class FusionPass(ir.passes.InPlacePass):
    """Applies rewrite rules until none fires; then drops what they left without a reader."""

    rules: Sequence[pattern.RewriteRule] = ()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place; `modified` says whether a rule fired."""
        fired = False
        # A rule may complete the pattern of another one that has been visited already.
        while pattern.RewriteRuleSet(list(self.rules)).apply_to_model(model):
            common.CommonSubexpressionEliminationPass()(model)
            common.RemoveUnusedNodesPass()(model)
            fired = True
        return ir.passes.PassResult(model, fired)

    def explain(self, model: ir.Model) -> tuple[Refusal, ...]:
        """Where the patterns match and the checks refuse; changes nothing."""
        tracer = MatchingTracer()
        pattern.RewriteRuleSet(list(self.rules)).apply_to_model(model, tracer=tracer)
        return tuple(
            Refusal(str(rule.name), str(match.root_node.name), match.match_result.reason)
            for rule, matches in tracer.best_matches_map.items()
            for match in matches
            if match.status == MatchStatus.CONDITION_FAILED
        )


def make_rule(name: str, fusion: Fusion, *, keeps_nodes: bool = False) -> pattern.RewriteRule:
    """A rule of onnxscript's rewriter.

    Args:
        name: shown in explanations.
        fusion: pattern, check and rewrite.
        keeps_nodes: whether matched nodes may have other readers; they stay until nobody reads
            them.
    """
    return pattern.RewriteRule(
        fusion.pattern, fusion.rewrite, fusion.check, name=name, remove_nodes=not keeps_nodes
    )


def as_ints(value: ir.Value | None) -> list[int] | None:
    """The integers of a constant value, or None if it is not constant."""
    if value is None or value.const_value is None or not value.const_value.dtype.is_integer():
        return None
    return [int(item) for item in value.const_value.numpy().reshape(-1)]


def as_int(value: ir.Value | None) -> int | None:
    """The one integer of a constant value, or None if there is not exactly one."""
    found = as_ints(value)
    return found[0] if found is not None and len(found) == 1 else None
