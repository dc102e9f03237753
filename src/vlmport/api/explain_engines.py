"""`vlmport build --explain`: layers of engines beside ONNX nodes and PyTorch modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.api.explain_inspector import explain_inspector, inspector_remarks
from vlmport.api.explain_network import explain_network
from vlmport.api.explain_nodes import GraphNodes
from vlmport.api.explain_report import ExplainedLayer, GraphExplanation
from vlmport.errors import EngineError, close_matches
from vlmport.graphs.engine_source import engine_source
from vlmport.manifest import load_manifest
from vlmport.runtime.device.cuda import load_cuda
from vlmport.runtime.engines.bindings import load_bindings
from vlmport.runtime.engines.log import engine_logger, listening
from vlmport.runtime.engines.network import parse_network
from vlmport.runtime.engines.opening import load_engine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vlmport.api.build import BuildReport
    from vlmport.contract import GraphSpec
    from vlmport.contract_engines import Engine
    from vlmport.runtime.engines.bindings import Bindings

__all__ = ["check_inspector_files", "explain_engines"]

_NEEDS_GPU = (
    "what is fused, and which kernels run, only the engine knows, and it is loaded on a GPU: {}"
)


def check_inspector_files(bundle: Path, files: Sequence[Path]) -> dict[str, str]:
    """Reads texts of the engine inspector.

    Args:
        bundle: its folder.
        files: named after their graphs, such as decoder.json.

    Returns:
        Graph -> text.

    Raises:
        EngineError: if a file cannot be read, or is not named after a graph of the bundle.
    """
    graphs = [graph.name for graph in load_manifest(bundle).graphs]
    texts = {}
    for file in files:
        if file.stem not in graphs:
            msg = (
                f"{file}: expected the name of a graph, such as decoder.json; "
                f"{close_matches(file.stem, graphs)}; rename it"
            )
            raise EngineError(msg)
        try:
            texts[file.stem] = file.read_text("utf-8")
        except (OSError, ValueError) as error:
            msg = f"{file}: cannot be read ({error}); expected JSON of the engine inspector"
            raise EngineError(msg) from error
    return texts


def explain_engines(
    bundle: Path, report: BuildReport, inspected: Mapping[str, str] | None = None
) -> tuple[GraphExplanation, ...]:
    """Explains the engines of a bundle's graphs.

    From the engine inspector where a text of it is given or the engine loads here, else from the
    network that the graph is parsed into.

    Args:
        bundle: its folder.
        report: of the build.
        inspected: graph -> what the inspector said of its engine.

    Raises:
        EngineError: if a graph does not parse, or a text is not one of the inspector.
    """
    texts = inspected or {}
    bindings = load_bindings(report.engines.options.backend)
    return tuple(
        _explain(bundle, graph, report, bindings, texts.get(graph.name))
        for graph in load_manifest(bundle).graphs
    )


def _explain(
    bundle: Path, graph: GraphSpec, report: BuildReport, bindings: Bindings, text: str | None
) -> GraphExplanation:
    engine = report.engines.engine(graph.name)
    nodes = GraphNodes(bundle / graph.file)
    remarks: tuple[str, ...] = ()
    if text is None:
        try:
            text = _inspect(bindings, report.folder / engine.file, engine)
        except EngineError as error:
            remarks = (_NEEDS_GPU.format(error),)
    if text is not None:
        layers = explain_inspector(text, nodes, f"{graph.name}.json")
        remarks = inspector_remarks(layers)
    else:
        layers = _network_layers(bundle, graph, report, bindings, nodes)
    return GraphExplanation(
        graph=graph.name,
        source="network" if text is None else "engine",
        remarks=remarks,
        layers=layers,
        attention=engine.attention,
        without_layer=nodes.without(
            name for layer in layers if not layer.is_helper for name in layer.nodes
        ),
    )


def _inspect(bindings: Bindings, path: Path, engine: Engine) -> str:
    """What the inspector says of an engine that is loaded for it.

    Raises:
        EngineError: if there is no GPU, or the engine does not load on it.
    """
    cuda = load_cuda()
    runtime = bindings.Runtime(engine_logger(bindings))
    loaded = load_engine(path, engine, runtime, cuda)
    inspector = loaded.create_engine_inspector()
    return str(inspector.get_engine_information(bindings.LayerInformationFormat.JSON))


def _network_layers(
    bundle: Path, graph: GraphSpec, report: BuildReport, bindings: Bindings, nodes: GraphNodes
) -> tuple[ExplainedLayer, ...]:
    source = engine_source(bundle / graph.file, graph.name, report.engines.options.max_length)
    with listening() as log:
        logger = engine_logger(bindings)
        builder = bindings.Builder(logger)
        network, parser = parse_network(bindings, builder, source, log, logger)
        found = explain_network(bindings, network, nodes)
        del parser  # which holds the network's weights until here
    return found
