"""A real API server does what the one in memory is said to do: what unit tests rest on is true."""

import asyncio
from pathlib import Path

import pytest

from asyncrl_operator.api_server.api import Api
from asyncrl_operator.main import connect
from support.cluster.api_server_cases import CASES, Case
from support.cluster.control_plane import Cluster

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_real_api_server_does_so(
    cluster: Cluster, namespace: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(Path(cluster.kubeconfig)))

    async def ask() -> None:
        async with connect() as client:
            await case(Api(client), namespace)

    asyncio.run(ask())
