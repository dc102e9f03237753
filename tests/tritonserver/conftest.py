from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.trained import exported
from support.triton_cases import Family, expected_of, mixed_requests
from support.triton_repositories import bls_twin, python_repository
from triton_server import TritonServer, triton_server

from vlmport.runtime import VisionLanguageModel

CHECKPOINTS = ("tinyllava", "paligemma", "idefics2", "fuyu")
# One thread each: the server's models and the tests share the machine's cores.
SMALL = {"threads": 1, "cache_tokens": 16384, "prefix_bytes": 2**24, "feature_bytes": 2**22}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """One server for all trained checkpoints, image graphs in process and by BLS."""
    folder = tmp_path_factory.mktemp("triton")
    repositories: list[Path] = []
    models: list[str] = []
    for name in CHECKPOINTS:
        repository = python_repository(exported(name), folder / name, name, SMALL)
        repositories += [repository, bls_twin(repository, name, folder / f"{name}-bls")]
        unused = f"{name}_embed_tokens"
        models += [path.parent.name for path in repository.glob("*/config.pbtxt")]
        models += [f"{name}_bls"]
        if name != CHECKPOINTS[0]:
            models.remove(unused)
    with triton_server(repositories, folder / "server.log", models) as running:
        yield running


@pytest.fixture(scope="session", params=CHECKPOINTS)
def family(request: pytest.FixtureRequest) -> Family:
    name: str = request.param
    model = VisionLanguageModel.load(exported(name), threads=1, verify=False)
    requests = mixed_requests(name)
    return Family(name, model, requests, [expected_of(model, one) for one in requests])


@pytest.fixture(autouse=True)
def _log_of_a_failure(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shows the end of the server's log where a test fails."""
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        for name in ("server", "faulty"):
            with contextlib.suppress(pytest.FixtureLookupError, KeyError):
                if name in request.fixturenames:
                    running: TritonServer = request.getfixturevalue(name)
                    print(running.log.read_text(errors="replace")[-6000:])
