"""`vlmport build --plan`: what engines need, whether it fits, and what would."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vlmport.api.build import build
from vlmport.api.memory_advice import available_memory, plan_memory
from vlmport.api.memory_plan import Memory, MemoryPlan, Planner, check_fits
from vlmport.api.progress import SilentProgress
from vlmport.contract import AttentionForm
from vlmport.contract_engines import BuildOptions
from vlmport.errors import EngineError, InputError
from vlmport.machine.gpus import find_gpus
from vlmport.manifest import load_manifest

RunCli = Callable[..., tuple[int, str, str]]

OPTIONS = BuildOptions(
    "tensorrt-rtx", max_batch=8, max_length=1024, prefill_chunk=128, max_images=2
)


@pytest.fixture(scope="module")
def planner(trained_bundle: Path) -> Planner:
    return Planner(trained_bundle, load_manifest(trained_bundle))


def gpu(size: float) -> Memory:
    return Memory(int(size), "given")


def sizes(plan: MemoryPlan) -> dict[tuple[str, str], int]:
    return {(graph.graph, one.name): one.size for graph in plan.graphs for one in graph.profiles}


def test_the_parts_follow_from_the_manifest(planner: Planner) -> None:
    plan, manifest = planner.plan(OPTIONS), planner.manifest
    layout = manifest.kv_layout
    a_token = 2 * layout.num_layers * layout.num_kv_heads * layout.head_dim * 4
    assert plan.weight_bytes == sum(graph.parameter_bytes for graph in manifest.graphs)
    assert (plan.cache_bytes_per_token, plan.cache_bytes) == (a_token, a_token * 8 * 1024)
    assert plan.activation_bytes == max(sizes(plan).values())
    parts = (plan.weight_bytes, plan.cache_bytes, plan.activation_bytes, plan.buffer_bytes)
    assert plan.total_bytes == sum(parts)
    assert plan.fits is None


def test_every_engine_and_profile_is_planned(planner: Planner) -> None:
    found = sizes(planner.plan(OPTIONS))
    assert set(found) == {
        ("vision_encoder", "default"),
        ("projector", "default"),
        ("embed_tokens", "default"),
        ("decoder", "prefill"),
        ("decoder", "decode"),
        ("select_greedy", "default"),
        ("select_sampled", "default"),
    }
    # An embedding gives out a row of hidden_size numbers for each id of 8 bytes.
    hidden = planner.manifest.dimensions.hidden_size
    assert found["embed_tokens", "default"] == 8 * 1024 * (8 + 4 * hidden)
    assert found["decoder", "decode"] < found["decoder", "prefill"]


def test_single_precision_attention_stores_its_scores(planner: Planner) -> None:
    prefill, decode = next(
        graph.profiles for graph in planner.plan(OPTIONS).graphs if graph.graph == "decoder"
    )
    heads = 4
    assert prefill.score_bytes == 2 * 4 * (8 * heads * 128 * 1024)
    assert decode.score_bytes == 2 * 4 * (8 * heads * 1 * 1024)
    assert prefill.at.endswith("(Attention)")


def test_more_of_anything_never_needs_less(planner: Planner) -> None:
    base = planner.plan(OPTIONS).total_bytes
    for more in (
        replace(OPTIONS, max_batch=9),
        replace(OPTIONS, max_length=1100),
        replace(OPTIONS, prefill_chunk=256),
    ):
        assert planner.plan(more).total_bytes > base, more
    pictures = planner.plan(replace(OPTIONS, max_images=200))
    assert sizes(pictures)["vision_encoder", "default"] > 50 * 1024 * 1024


def number(advice: str, option: str) -> int:
    found = re.search(rf"{option} (\d+)", advice)
    assert found is not None, advice
    return int(found[1])


def test_advice_is_the_largest_that_fits(trained_bundle: Path, planner: Planner) -> None:
    most = gpu(planner.plan(OPTIONS).total_bytes * 0.7)
    plan = plan_memory(trained_bundle, OPTIONS, most)
    assert plan.fits is False
    advice = "; ".join(plan.advice)
    changes: dict[str, Callable[[int], BuildOptions]] = {
        "--max-batch": lambda value: replace(OPTIONS, max_batch=value),
        "--max-length": lambda value: replace(OPTIONS, max_length=value),
        "--prefill-chunk": lambda value: replace(OPTIONS, prefill_chunk=value),
    }
    for option, changed in changes.items():
        largest = number(advice, option)
        assert planner.plan(changed(largest), most).fits is True, option
        assert planner.plan(changed(largest + 1), most).fits is False, option
    assert "vlmport quantize --precision fp16`" in advice


def test_what_fits_needs_no_advice(trained_bundle: Path, planner: Planner) -> None:
    exact = gpu(planner.plan(OPTIONS).total_bytes)
    plan = plan_memory(trained_bundle, OPTIONS, exact)
    assert (plan.fits, plan.advice) == (True, ())
    check_fits(plan)
    check_fits(plan_memory(trained_bundle, OPTIONS, None))
    with pytest.raises(EngineError, match=r"GPU memory: .* needed"):
        check_fits(plan_memory(trained_bundle, OPTIONS, gpu(exact.size - 1)))


def test_where_nothing_fits_nothing_is_promised(trained_bundle: Path) -> None:
    with pytest.raises(EngineError, match="use a GPU with more memory"):
        check_fits(plan_memory(trained_bundle, OPTIONS, gpu(1000)))


def test_a_prompt_in_one_piece_is_shortened_with_the_length(trained_bundle: Path) -> None:
    manifest = replace(
        load_manifest(trained_bundle), attention=AttentionForm("bidirectional", first_position=1)
    )
    planner = Planner(trained_bundle, manifest)
    whole = replace(OPTIONS, prefill_chunk=OPTIONS.max_length)
    with pytest.raises(EngineError, match="must run in one piece"):
        planner.plan(OPTIONS)
    assert planner.plan(whole).fits is None


@pytest.mark.parametrize("size", [0.0, -1.0, math.nan, math.inf])
def test_a_gpu_without_memory_is_refused(size: float) -> None:
    with pytest.raises(InputError, match="--device-memory: found"):
        available_memory(size)


def test_without_a_gpu_nothing_is_known_of_its_memory() -> None:
    assert available_memory(0.5) == Memory(1 << 29, "given by --device-memory")
    assert (available_memory(None) is None) == bool(find_gpus().fault)


def test_engines_hold_their_weights_and_little_else(
    trained_bundle: Path, tmp_path: Path, planner: Planner
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="not installed: engines would be built")
    small = replace(OPTIONS, max_batch=1, max_length=64, prefill_chunk=16)
    engines = build(trained_bundle, small, SilentProgress(), tmp_path / "engines").engines
    for graph in planner.plan(small).graphs:
        size = engines.engine(graph.graph).size
        print(f"{graph.graph}: engine {size}, weights {graph.weight_bytes}")
        assert size > graph.weight_bytes
        # Kernels lie beside the weights: 0.15 MB for a product of matrices, and those of attention
        # are larger than all weights of so small a model.
        if graph.graph in ("embed_tokens", "projector"):
            assert size < graph.weight_bytes + 500_000


ARGUMENTS = ("--max-batch", "2", "--max-length", "256")


def test_the_command_shows_the_plan(run_cli: RunCli, trained_bundle: Path) -> None:
    before = sorted(trained_bundle.rglob("*"))
    code, out, err = run_cli("build", trained_bundle, "--plan", *ARGUMENTS)
    assert code == 0, err
    assert "max_batch 2 x max_length 256" in out
    assert "vision_encoder" in out
    code, out, err = run_cli(
        "build", trained_bundle, "--plan", *ARGUMENTS, "--device-memory", "1", "--json"
    )
    assert code == 0, err
    written = json.loads(out)
    assert (written["fits"], written["options"]["max_length"]) == (True, 256)
    assert written["available"]["size"] == 1 << 30
    assert sorted(trained_bundle.rglob("*")) == before


@pytest.mark.parametrize("plan", [("--plan",), ()])
def test_the_command_refuses_what_does_not_fit(
    run_cli: RunCli, trained_bundle: Path, tmp_path: Path, plan: tuple[str, ...]
) -> None:
    arguments = (*plan, *ARGUMENTS, "--device-memory", "0.01", "--output", tmp_path / "engines")
    code, out, err = run_cli("build", trained_bundle, *arguments)
    assert code == 1
    assert "GPU memory" in err
    assert "10.2 MiB given by --device-memory" in err
    assert ("does not fit" in out) == bool(plan)
    assert not (tmp_path / "engines").exists()
