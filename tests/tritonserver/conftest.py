from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the repositories."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[TritonServer]:
    """One server for all trained checkpoints; each is loaded when a test asks for it first."""
    repositories = [folder / name for name in (*CHECKPOINTS, *map(twin_of, CHECKPOINTS))]
    for repository in repositories:
        repository.mkdir()
    with triton_server(repositories, folder / "server.log", ()) as running:
        yield running


@pytest.fixture(scope="session", params=CHECKPOINTS)
def family(request: pytest.FixtureRequest, server: TritonServer, folder: Path) -> Family:
    """A checkpoint whose repository is loaded, and a twin that calls its image models by BLS."""
    name: str = request.param
    bundle = exported(name)
    repository = python_repository(bundle, folder / name, name, SMALL)
    bls_twin(repository, name, folder / twin_of(name))
    models = [path.parent.name for path in repository.glob("*/config.pbtxt")]
    ensembles = [f"{name}_features"]  # after the models that they are made of
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(server.load, [*set(models).difference(ensembles), twin_of(name)]))
    for ensemble in ensembles:
        server.load(ensemble)
    model = VisionLanguageModel.load(bundle, threads=1, verify=False)
    requests = mixed_requests(name)
    return Family(name, model, requests, [expected_of(model, one) for one in requests])


def twin_of(name: str) -> str:
    return f"{name}_bls"


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
