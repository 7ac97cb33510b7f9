"""Fixtures of the tests whose pods run: one cluster of real nodes and one operator per session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncrl_api.crdgen import FILE_NAME
from kube_fixture import making_namespace
from node_cluster import HOST_IMAGE, NATS_IMAGE, NodeCluster, why_no_nodes
from operator_process import OperatorProcess, grant_rights
from running_job import RunningJob, prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    """Two real nodes with our CRD."""
    if reason := why_no_nodes():
        pytest.skip(reason)
    made = NodeCluster(os.environ["KUBEUP"], tmp_path_factory.mktemp("nodes") / "cluster")
    try:
        made.start()
        made.apply_crd(ROOT / "crds" / FILE_NAME)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def operator(nodes: NodeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """The operator with its chart's rights, as a process of this machine."""
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


@pytest.fixture
def job(nodes: NodeCluster, operator: OperatorProcess, namespace: str) -> Iterator[RunningJob]:
    """The quickstart, not applied yet."""
    made = RunningJob(nodes, namespace)
    yield made
    made.delete()
