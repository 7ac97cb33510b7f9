"""Fixtures shared by all tests: one NATS server and one control plane per session, names of a test's own."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from asyncrl_api.crdgen import FILE_NAME
from asyncrl_api.names import JobNames, NatsAddress
from support.cluster.control_plane import Cluster, making_namespace, why_not
from support.jobs.nats_server import NatsServer
from support.paths import ROOT

# A busy machine takes its time; that is no fault of what is tested.
hypothesis.settings.register_profile("asyncrl", deadline=None)
hypothesis.settings.load_profile("asyncrl")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out test files, all of those in tests/cluster to one worker: they share a control plane."""
    from xdist.scheduler import LoadFileScheduling  # here alone: the tests also run without xdist

    class FilesButOneCluster(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            folder = "tests/cluster/"
            return folder if nodeid.startswith(folder) else super()._split_scope(nodeid)

    return FilesButOneCluster(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def shared_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One server for all tests that do not kill it; the streams that each reserves room for add up."""
    server = NatsServer(tmp_path_factory.mktemp("nats"), store_bytes=2**40)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def nats_address(shared_nats: NatsServer) -> NatsAddress:
    return NatsAddress(url=shared_nats.url)


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[NatsServer]:
    """A server that the test may kill."""
    server = NatsServer(tmp_path / "nats")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def names() -> JobNames:
    """A job of its own for each test on the shared server."""
    return JobNames(job=f"test_{uuid.uuid4().hex[:10]}")


@pytest.fixture(scope="session")
def process_group() -> None:
    """A torch process group of this process alone; one for all tests, since DeepSpeed keeps what it finds.

    Tests that host a weight group have made one already (weights.group), and it stays.
    """
    import torch.distributed as dist  # here alone: it takes seconds, and most tests need none of it
    from torch._C._distributed_c10d import HashStore

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control plane with fake nodes and our CRD, for all tests of a session."""
    if reason := why_not():
        pytest.skip(reason)
    made = Cluster(os.environ["KUBEUP"], tmp_path_factory.mktemp("kube") / "cluster")
    try:
        made.start()
        made.apply_crd(ROOT / "crds" / FILE_NAME)
        yield made
    finally:
        made.stop()


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own."""
    with making_namespace(cluster) as name:
        yield name
