"""The servers that the contract is tried on: CPU engine, emulated engine, SGLang where it is installed."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from asyncrl_api.run_config import SGLANG_PYTHON
from support.engines.emulated_process import EmulatedProcess
from support.engines.sglang_process import SGLangProcess
from support.engines.tiny_models import EngineProcess, running_engine, tiny_model

STEP_SECONDS = 0.02
"""The duration of a decoding step, slow enough to act between two."""


@pytest.fixture(scope="session", autouse=True)
def _gloo_on_loopback() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"


@pytest.fixture(scope="session", params=["cpu", "emulated", "sglang"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """One server of each kind per session, with the weights of seed 0."""
    if request.param == "cpu":
        with running_engine(tiny_model()) as engine:
            yield engine
        return
    if request.param == "emulated":
        emulated = EmulatedProcess(tiny_model(), tmp_path_factory.mktemp("emulated"), STEP_SECONDS)
        try:
            yield emulated
        finally:
            emulated.kill()
        return
    if SGLANG_PYTHON not in os.environ:
        pytest.skip(f"{SGLANG_PYTHON} is not set: the contract is not tried on SGLang (make contract-sglang)")
    sglang = SGLangProcess(tiny_model(), tmp_path_factory.mktemp("sglang"))
    try:
        yield sglang
    finally:
        sglang.kill()


@pytest.fixture
def engine(server: EngineProcess) -> Iterator[EngineProcess]:
    """A server that is slow enough to act between two steps; afterwards it is as it was."""
    if server.computes:  # an emulated engine is as slow as its device model says
        server.post("/slow_down", {"forward_sleep_time": STEP_SECONDS})
    yield server
    server.post("/abort_request", {"abort_all": True})
    server.post("/continue_generation", {})
    server.post("/end_weight_update")
    if server.computes:
        server.post("/slow_down", {"forward_sleep_time": None})
    body = {"model_path": str(tiny_model()), "weight_version": "default"}
    assert server.post("/update_weights_from_disk", body).status_code == 200


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool
