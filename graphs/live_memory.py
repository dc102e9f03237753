"""How much memory a graph's values need at once: an upper estimate without running it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from vlmport.errors import GraphError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

__all__ = ["LivePeak", "live_peak"]

# Their output is their input's memory; TensorScatter writes the new rows of the cache in place.
_ALIASES = {"Flatten", "Identity", "Reshape", "Squeeze", "TensorScatter", "Unsqueeze"}
# Constants of more elements are weights: what they say is never needed for a shape.
_MOST_FOLDED = 256


@dataclass(frozen=True, slots=True)
class LivePeak:
    """The moment at which the values of a graph take the most memory.

    Attributes:
        total_bytes: of all values that are alive then, the ports that are counted included.
        port_bytes: of these ports, which are alive all the time.
        node: name of the node that runs then.
        operator: its type.
        score_bytes: attention scores among the total.
    """

    total_bytes: int
    port_bytes: int
    node: str
    operator: str
    score_bytes: int


def live_peak(
    model: ir.Model,
    name: str,
    lengths: Mapping[str, int],
    outside: Collection[str],
    stores_scores: Callable[[ir.Node], bool],
) -> LivePeak:
    """Adds up what is alive at each node, in the graph's order, and finds the highest sum.

    A value lives from its node to its last reader; what has no reader lives at its node. Nothing
    is fused: a value that an engine keeps in registers counts, so that this is an upper estimate.
    Weights, and what is computed from weights alone, do not count.

    Args:
        model: the graph, which is changed; its weights are not read.
        name: of the graph, for messages.
        lengths: axis -> its length, for every dynamic axis.
        outside: ports that others count, such as the cache.
        stores_scores: whether an Attention node writes its scores to memory, as it does where it is
            taken apart; a fused kernel does not.

    Raises:
        GraphError: if an axis has no length here, or a shape does not follow from them.
    """
    _fix_shapes_(model, name, lengths)
    fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=_MOST_FOLDED,
        output_size_limit=_MOST_FOLDED,
    )
    return _Walk(model, name, outside, stores_scores).peak()


def _fix_shapes_(model: ir.Model, name: str, lengths: Mapping[str, int]) -> None:
    for port in model.graph.inputs:
        assert port.shape is not None  # the manifest has it, too
        missing = {str(a) for a in port.shape if not isinstance(a, int)} - lengths.keys()
        if missing:
            msg = f"{name}: no length for {', '.join(sorted(missing))} of {port.name}; give one"
            raise GraphError(msg)
        port.shape = ir.Shape([a if isinstance(a, int) else lengths[str(a)] for a in port.shape])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None  # it held names of axes


class _Walk:
    """One pass over the nodes; memory is identified by the value that it was made for."""

    def __init__(
        self,
        model: ir.Model,
        name: str,
        outside: Collection[str],
        stores_scores: Callable[[ir.Node], bool],
    ) -> None:
        self._graph = model.graph
        self._name = name
        self._stores_scores = stores_scores
        self._owners: dict[ir.Value, ir.Value] = {}
        self._fixed = set(model.graph.initializers.values())  # known when the engine is built
        inputs = [value for value in model.graph.inputs if value.name not in outside]
        self._uncounted = {value for value in model.graph.inputs if value.name in outside}
        self._settle_owners()
        outputs = {self._owner(value) for value in model.graph.outputs if value.name not in outside}
        self._uncounted |= {
            self._owner(value) for value in model.graph.outputs if value.name in outside
        }
        self._ports = {value for value in {*inputs, *outputs} if value not in self._uncounted}

    def peak(self) -> LivePeak:
        readers = self._readers()
        port_bytes = sum(self._bytes(value) for value in self._ports)
        live, best = port_bytes, LivePeak(port_bytes, port_bytes, "", "", 0)
        for node in self._graph:
            made = [value for value in node.outputs if self._counts(value)]
            live += sum(self._bytes(value) for value in made)
            scores = self._scores(node)
            if live + scores > best.total_bytes:
                name = node.name or ""
                best = LivePeak(live + scores, port_bytes, name, node.op_type, scores)
            read = Counter(self._owner(value) for value in node.inputs if value is not None)
            readers.subtract(read)
            done = {*read, *map(self._owner, node.outputs)}
            ended = [value for value in done if readers[value] == 0 and self._counts(value)]
            live -= sum(self._bytes(value) for value in ended)
        return best

    def _settle_owners(self) -> None:
        for node in self._graph:
            fixed = all(value is None or value in self._fixed for value in node.inputs)
            if fixed:
                self._fixed.update(node.outputs)
            elif node.op_type in _ALIASES and node.inputs[0] is not None:
                self._owners[node.outputs[0]] = self._owner(node.inputs[0])

    def _owner(self, value: ir.Value) -> ir.Value:
        return self._owners.get(value, value)

    def _counts(self, value: ir.Value) -> bool:
        """Whether memory is taken when the value is made, and given back after its last reader."""
        if value in self._owners or value in self._fixed or not value.name:
            return False
        return value not in self._ports and value not in self._uncounted

    def _readers(self) -> Counter[ir.Value]:
        return Counter(
            self._owner(value) for node in self._graph for value in node.inputs if value is not None
        )

    def _bytes(self, value: ir.Value) -> int:
        shape = self._shape(value)
        if value.dtype is None:
            msg = f"{self._name}: the type of {value.name} does not follow from the inputs"
            raise GraphError(msg)
        return math.ceil(math.prod(shape) * value.dtype.itemsize)

    def _shape(self, value: ir.Value) -> list[int]:
        axes = [] if value.shape is None else [a for a in value.shape if isinstance(a, int)]
        if value.shape is None or len(axes) != len(value.shape):
            msg = f"{self._name}: the shape of {value.name} does not follow from the inputs'"
            raise GraphError(msg)
        return axes

    def _scores(self, node: ir.Node) -> int:
        """Bytes of the scores and of the probabilities that they become."""
        if node.op_type != "Attention" or not self._stores_scores(node):
            return 0
        query, key = node.inputs[0], node.inputs[1]
        assert query is not None
        assert key is not None
        assert query.dtype is not None
        queries, keys = self._shape(query), self._shape(key)
        if len(queries) == 4:
            batch, heads, count, _ = queries
        else:
            batch, count, _ = queries
            heads = node.attributes["q_num_heads"].as_int()
        scores = batch * heads * count * keys[-2] * query.dtype.itemsize
        return math.ceil(2 * scores)
