"""Fixtures of the tests whose pods run: one cluster of real nodes and one operator per session.

The time limits of these tests count the test alone (`func_only`). What a session shares, images and nodes,
has limits of its own: every command that makes them has a deadline.
"""

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from asyncrl_api.crdgen import FILE_NAME
from support.chart.installed_operator import InstalledOperator, Operator
from support.cluster.control_plane import making_namespace
from support.cluster.nodes import HOST_IMAGE, NATS_IMAGE, USES_IMAGES, NodeCluster, why_no_nodes
from support.cluster.operator_process import OperatorProcess, grant_rights
from support.cluster.running_job import RunningJob, prepare

ROOT = Path(__file__).parents[2]
HAS_FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    """Two real nodes; with our CRD, unless the chart brings it."""
    if reason := why_no_nodes():
        pytest.skip(reason)
    made = NodeCluster(os.environ["KUBEUP"], tmp_path_factory.mktemp("nodes") / "cluster")
    try:
        start(made)
        if not USES_IMAGES:
            made.apply_crd(ROOT / "crds" / FILE_NAME)
        yield made
    finally:
        made.stop()


def start(cluster: NodeCluster) -> None:
    """Start it. Not every root may make nodes: `make e2e` fails then, other runs skip these tests."""
    try:
        cluster.start()
    except AssertionError as error:
        if USES_IMAGES:
            raise
        pytest.skip(f"no real nodes can be started here: {error}")


@pytest.fixture(scope="session")
def operator(nodes: NodeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """The operator: installed by its chart, or as a process of this machine with the chart's rights."""
    running: Operator
    if USES_IMAGES:
        running = InstalledOperator(nodes)
    else:
        folder = tmp_path_factory.mktemp("operator")
        images = {"ASYNCRL_RUNTIME_IMAGE": HOST_IMAGE, "ASYNCRL_NATS_IMAGE": NATS_IMAGE}
        running = OperatorProcess(grant_rights(nodes, folder), folder, **images)
    try:
        running.start()
        yield running
    finally:
        running.kill()


@pytest.fixture
def namespace(nodes: NodeCluster) -> Iterator[str]:
    """A namespace of the restricted level, with the claims of the quickstart."""
    with making_namespace(nodes) as name:
        prepare(nodes, name)
        yield name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell the `job` fixture how the test went."""
    report = yield
    item.stash[HAS_FAILED] = item.stash.get(HAS_FAILED, False) or report.failed
    return report


@pytest.fixture
def job(
    nodes: NodeCluster, operator: Operator, namespace: str, request: pytest.FixtureRequest
) -> Iterator[RunningJob]:
    """The quickstart, not applied yet; of a test that fails, what its pods were about is printed."""
    made = RunningJob(nodes, namespace)
    yield made
    if request.node.stash.get(HAS_FAILED, False):
        print(made.describe())
