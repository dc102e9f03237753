from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engine_table import (
    ENGINE_ROWS,
    KERNEL_ROWS,
    EngineRow,
    KernelRow,
    engine_table,
    kernel_table,
)
from support.parity_table import ROWS, ParityRow, table
from support.run_folder import keep_run_folder

from vlmport.contract import (
    SCHEMA_VERSION,
    AttentionForm,
    FileEntry,
    FixedSizeImages,
    GenerationDefaults,
    GraphSpec,
    ImageTokens,
    KVLayout,
    Manifest,
    ModelDimensions,
    PromptFormat,
    Resize,
    SourceCheckpoint,
    SpecialTokens,
    TensorSpec,
    TextAnswers,
)

RunCli = Callable[..., tuple[int, str, str]]

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINED_CHECKPOINT = REPOSITORY / "examples" / "tinyllava"
GRAPH_NAMES = ("vision_encoder", "projector", "embed_tokens", "decoder")


def pytest_configure(config: pytest.Config) -> None:
    """Lets processes share bundles, and torch list its operators once a process.

    It would do so for every graph, 0.3 s each time.
    """
    keep_run_folder(config)
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # the runtime is also tested without torch
        return
    registry: Any = ONNXRegistry
    registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the longest tests: at the end one process would wait for another's."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands the rows of a worker process over."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["parity_rows"] = [dataclasses.astuple(row) for row in ROWS]
        output["engine_rows"] = [dataclasses.astuple(row) for row in ENGINE_ROWS]
        output["kernel_rows"] = [dataclasses.astuple(row) for row in KERNEL_ROWS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collects the rows of a worker process."""
    output = node.workeroutput
    ROWS.extend(ParityRow(*row) for row in output.get("parity_rows", ()))
    ENGINE_ROWS.extend(EngineRow(*row) for row in output.get("engine_rows", ()))
    KERNEL_ROWS.extend(KernelRow(*row) for row in output.get("kernel_rows", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what was compared with PyTorch, and what TensorRT built."""
    sections = {
        "parity with transformers": table(ROWS) if ROWS else [],
        "TensorRT-RTX engines, built without a GPU": engine_table(ENGINE_ROWS)
        if ENGINE_ROWS
        else [],
        "attention kernels of TensorRT-RTX": kernel_table(KERNEL_ROWS),
    }
    for title, lines in sections.items():
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def trained_bundle() -> Path:
    """The bundle of the trained checkpoint, exported once a run; tests must not change it."""
    from support.trained import exported

    return exported(TRAINED_CHECKPOINT.name)


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCli:
    """Runs the command line in this process: arguments -> (exit code, stdout, stderr)."""
    from vlmport.cli.main import main

    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlmport", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the full TensorRT were not installed, wherever the test runs."""
    from vlmport.runtime.engines.bindings import load_bindings

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    load_bindings.cache_clear()
    yield
    load_bindings.cache_clear()


@pytest.fixture
def sample_manifest() -> Manifest:
    """A manifest that is right in itself; no file that it lists exists."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family="imagined",
        variant="llama + siglip, mlp2x_gelu, square",
        precision="float32",
        dimensions=ModelDimensions(hidden_size=64, vocab_size=512, max_length=1024),
        graphs=tuple(sample_graph(name) for name in GRAPH_NAMES),
        kv_layout=KVLayout(num_layers=2, num_kv_heads=2, head_dim=16, dtype="float32"),
        attention=AttentionForm(prompt="causal", first_position=0),
        image=FixedSizeImages(
            kind="fixed_size",
            pad_to_square=None,
            resize=Resize(mode="exact", height=32, width=32, resample="bicubic"),
            center_crop=None,
            rescale_factor=1 / 255,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        prompt=PromptFormat(
            chat_template="{{ messages }}",
            image_placeholder="<image>",
            image_tokens=ImageTokens("repeat", "", 16, "", "", ""),
            tokenization="chunks",
            add_special_tokens=True,
        ),
        special_tokens=SpecialTokens(
            bos_token_id=1,
            eos_token_ids=(2,),
            image_token_id=None,
            bos_token="<s>",
            eos_token="</s>",
        ),
        generation=GenerationDefaults(max_new_tokens=64, stop_strings=("</s>",)),
        answers=TextAnswers("text"),
        source=SourceCheckpoint(
            name="tiny", layout="merged", files=(sample_file("model.safetensors"),)
        ),
        tools={"onnx": "1.23.2", "torch": "2.13.0", "vlmport": "0.1.0"},
        files=(
            *sorted(
                (sample_file(f"graphs/{name}.onnx") for name in GRAPH_NAMES),
                key=lambda entry: entry.path,
            ),
            sample_file("tokenizer.json"),
        ),
    )


def sample_graph(name: str) -> GraphSpec:
    return GraphSpec(
        name=name,
        file=f"graphs/{name}.onnx",
        inputs=(TensorSpec(name="pixels", dtype="float32", shape=("batch", 3, 32, 32)),),
        outputs=(TensorSpec(name="features", dtype="float32", shape=("batch", 16, 64)),),
        opset=24,
        operators={"Add": 3, "MatMul": 12},
        parameter_bytes=4096,
    )


def sample_file(path: str) -> FileEntry:
    return FileEntry(path=path, size=100, sha256="0" * 64)
