"""A graph becomes a network of TensorRT, completely or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import tensorrt as trt

    from vlmport.contract_engines import EngineSource
    from vlmport.runtime.engines.bindings import Bindings
    from vlmport.runtime.engines.log import EngineLog

__all__ = ["cache_aliases", "check_nothing_is_ignored", "layers", "parse_network", "tensors"]

_MOST_ERRORS = 5


def parse_network(
    bindings: Bindings,
    builder: trt.Builder,
    source: EngineSource,
    log: EngineLog,
    logger: trt.ILogger,
) -> tuple[trt.INetworkDefinition, trt.OnnxParser]:
    """Parses a graph into a strongly typed network.

    Args:
        bindings: the TensorRT module.
        builder: that will build the network.
        source: the graph.
        log: where `logger` leaves what is said in this thread.
        logger: of the module.

    Returns:
        The network, and the parser, which holds its weights and must outlive the build.

    Raises:
        EngineError: if a node is not supported, or TensorRT would ignore an input of one.
    """
    flag = bindings.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    parser = bindings.OnnxParser(network, logger)
    if not parser.parse(source.model, str(source.path)):
        errors = [_words(parser.get_error(index)) for index in range(parser.num_errors)]
        msg = (
            f"{source.graph}: TensorRT does not parse {source.path.name}: "
            f"{'; '.join(errors[:_MOST_ERRORS])}; expected standard operators that it knows; "
            "another precision may parse"
        )
        raise EngineError(msg)
    check_nothing_is_ignored(source.graph, log)
    return network, parser


def _words(error: trt.ParserError) -> str:
    node = f"{error.node_name() or 'a node'} ({error.node_operator()})"
    return f"{node}: {' '.join(str(error.desc()).split())}"


def check_nothing_is_ignored(graph: str, log: EngineLog) -> None:
    """Refuses a network with inputs that nothing depends on: it would not compute the graph.

    Raises:
        EngineError: names them.
    """
    if unused := log.unused_inputs:
        msg = (
            f"{graph}: TensorRT ignores the inputs {', '.join(unused)}; expected that each is "
            "read; the engine would not compute what the graph means, so there is none"
        )
        raise EngineError(msg)


def layers(network: trt.INetworkDefinition) -> Iterator[trt.ILayer]:
    """Every layer, in the network's order."""
    return (network.get_layer(index) for index in range(network.num_layers))


def tensors(network: trt.INetworkDefinition) -> dict[str, trt.ITensor]:
    """Name -> tensor, of the inputs and of what layers compute."""
    found = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        found[tensor.name] = tensor
    for layer in layers(network):
        for index in range(layer.num_outputs):
            tensor = layer.get_output(index)
            found[tensor.name] = tensor
    return found


def cache_aliases(
    bindings: Bindings, network: trt.INetworkDefinition, source: EngineSource
) -> dict[str, str]:
    """Outputs that are written in place -> the inputs whose address they must have.

    Raises:
        EngineError: if a cache of the graph is not updated in place.
    """
    kind = bindings.LayerType.KV_CACHE_UPDATE
    updates = [layer for layer in layers(network) if layer.type == kind]
    inputs = {network.get_input(index).name for index in range(network.num_inputs)}
    outputs = {network.get_output(index).name for index in range(network.num_outputs)}
    found = {layer.get_output(0).name: layer.get_input(0).name for layer in updates}
    wrong = [out for out, port in found.items() if out not in outputs or port not in inputs]
    if wrong or len(found) != source.cache_updates:
        msg = (
            f"{source.graph}: {source.cache_updates} updates of the cache became {len(found)} "
            f"layers that update it in place; not between ports of the graph: "
            f"{', '.join(wrong) or 'none'}; expected one layer for each, from an input to an output"
        )
        raise EngineError(msg)
    return found
