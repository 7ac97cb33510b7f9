"""Fixtures of the tests that need an API server."""

from pathlib import Path

import pytest

from support.cluster.control_plane import Cluster
from support.cluster.operator_process import Job, grant_rights, make_claim


@pytest.fixture(scope="session")
def operator_rights(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kubeconfig with the rights that the chart gives to the operator."""
    return grant_rights(cluster, tmp_path_factory.mktemp("rights"))


@pytest.fixture
def job(cluster: Cluster, namespace: str) -> Job:
    """A job, not applied yet, in a namespace with its claim."""
    cluster.apply(*make_claim(namespace))
    return Job(cluster, namespace)
