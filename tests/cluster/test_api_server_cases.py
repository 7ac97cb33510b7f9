"""A real API server does what the one in memory is said to do, so what unit tests rely on is true.

It needs no nodes and no controllers: `scripts/kubeup.py` and the programs of envtest are enough.
"""

import asyncio
import os
import uuid
from collections.abc import Iterator

import pytest

from asyncrl_api.crdgen import FILE_NAME
from asyncrl_operator.api_server.api import Api, ApiError
from asyncrl_operator.main import connect
from asyncrl_operator.resources import SERVICE_ACCOUNTS
from support.cluster.api_server_cases import CASES, Case
from support.cluster.control_plane import Cluster, why_not
from support.cluster.memory_api_server import NAMESPACES
from support.paths import ROOT

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    made = Cluster(os.environ["KUBEUP"], tmp_path_factory.mktemp("kube") / "cluster")
    try:
        made.start(nodes=0)
        made.apply_crd(ROOT / "crds" / FILE_NAME)
        yield made
    finally:
        made.stop()


async def make_namespace(api: Api) -> str:
    """Make a namespace with the account that pods need, where no controller does."""
    name = f"t-{uuid.uuid4().hex[:8]}"
    await api.create(NAMESPACES.path(None), {"metadata": {"name": name}})
    try:
        await api.create(SERVICE_ACCOUNTS.path(name), {"metadata": {"name": "default"}})
    except ApiError as error:
        assert error.status == 409, error
    return name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_real_api_server_does_so(api_server: Cluster, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", api_server.kubeconfig)

    async def ask() -> None:
        async with connect() as client:
            api = Api(client)
            await case(api, await make_namespace(api))

    asyncio.run(ask())
