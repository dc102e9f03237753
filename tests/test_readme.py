from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/structure.md",
    "docs/families/adding.md",
    "docs/evaluation.md",
    "docs/quantization.md",
    "docs/quantization/accuracy.md",
    "docs/quantization/calibration-data.md",
    "docs/quantization/half-precision.md",
    "docs/quantization/kv-cache.md",
    "docs/bench.md",
    "docs/debugging.md",
    "docs/deploy/README.md",
    "docs/deploy/scaling.md",
    "docs/deploy/triton.md",
    "docs/engines.md",
    "docs/gpu-loop.md",
    "docs/onnxruntime-gpu.md",
    "docs/serving.md",
    "docs/token-selection.md",
    "docs/cache-slots.md",
    "docs/continuous-batching.md",
    "docs/measurements/engines.md",
    "docs/measurements/gpu.md",
    "docs/measurements/precision.md",
    "docs/onnxruntime-gpu.md",
)

SCRIPTS = (
    "scripts/setup",
    "scripts/test",
    "scripts/demo",
    "scripts/setup_triton",
    "scripts/run_triton",
    ".ci/run",
)


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_resolve(page: str) -> None:
    folder = (REPOSITORY / page).parent
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(page))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (folder / target).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_named_paths_of_the_repository_exist(page: str) -> None:
    tops = "export|graphs|calibration|runtime|tests|scripts|docs|src|examples"
    named = re.findall(rf"`((?:{tops})/[\w./-]*)`", text_of(page))
    assert named
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_can_be_run(script: str) -> None:
    path = REPOSITORY / script
    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")


def test_the_readme_names_the_two_commands_and_every_verb() -> None:
    readme = text_of("README.md")
    verbs = [
        f"vlmport {verb}"
        for verb in (
            "export",
            "parity",
            "build",
            "bench",
            "generate",
            "evaluate",
            "inspect",
            "doctor",
        )
    ]
    missing = [word for word in ("scripts/demo", "scripts/test", *verbs) if word not in readme]
    assert missing == []
