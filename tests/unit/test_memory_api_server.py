"""The API server in memory does what the operator relies on in a real one, and says what it lacks."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from ruamel.yaml import YAML

from asyncrl_api.crdgen import FILE_NAME
from asyncrl_operator.api_server.api import Api, ApiError
from asyncrl_operator.resources import CONFIG_MAPS, Json
from asyncrl_runtime.simulation.virtual_time import run_virtually
from support.cluster.api_server_cases import CASES, Case, config_map, refused
from support.cluster.field_managers import LackingError
from support.cluster.memory_api_client import MemoryApiClient
from support.cluster.memory_api_server import NAMESPACES, MemoryApiServer
from support.paths import ROOT

CRD: Json = YAML(typ="safe").load((ROOT / "crds" / FILE_NAME).read_text())


def make_server() -> MemoryApiServer:
    server = MemoryApiServer(CRD, lambda: 1_800_000_000.0)
    server.store(NAMESPACES, {"metadata": {"name": "team", "uid": "n1"}})
    return server


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_it_does_as_a_real_one(case: Case) -> None:
    server = make_server()
    run_virtually(case(Api(MemoryApiClient(server)), "team"))
    assert not server.lacked


@pytest.mark.parametrize(
    "call",
    [
        lambda api: api.get("/apis/kueue.x-k8s.io/v1beta2/namespaces/team/workloads/one"),
        lambda api: api.list(CONFIG_MAPS.path("team"), labelSelector="a in (b,c)"),
        lambda api: api.create(CONFIG_MAPS.path("team"), {"metadata": {"generateName": "a-"}}),
        lambda api: api.apply(CONFIG_MAPS.path("team", "one"), config_map(unheard=[{"of": "it"}])),
        lambda api: api._call("PUT", CONFIG_MAPS.path("team", "one"), {}, config_map()),
    ],
)
def test_what_it_lacks_it_does_not_pass_over(call: Any) -> None:
    server = make_server()
    with pytest.raises(LackingError):
        run_virtually(call(Api(MemoryApiClient(server))))
    assert len(server.lacked) == 1


async def names_watched(api: Api, **query: str) -> AsyncIterator[str]:
    async for event in api.watch(CONFIG_MAPS.path("team"), **query):
        yield f"{event['type']} {event['object']['metadata'].get('name', '')}".strip()


def test_a_watch_has_a_bookmark_each_minute_and_ends_in_its_time() -> None:
    async def ask() -> list[str]:
        query = {"allowWatchBookmarks": "true", "resourceVersion": "100", "timeoutSeconds": "290"}
        return [name async for name in names_watched(Api(MemoryApiClient(make_server())), **query)]

    assert run_virtually(ask()) == ["BOOKMARK"] * 5


def test_what_is_forgotten_is_expired_for_watches_and_pages() -> None:
    async def ask() -> None:
        server = make_server()
        api = Api(MemoryApiClient(server))
        for name in "abc":
            await api.apply(CONFIG_MAPS.path("team", name), config_map(name))
        page = await api.list(CONFIG_MAPS.path("team"), limit="2")
        server.forget()
        error = await refused(api.list(CONFIG_MAPS.path("team"), limit="2", **{"continue": page.token}))
        assert error.status == 410 and error.is_expired
        with pytest.raises(ApiError) as expired:
            [name async for name in names_watched(api, resourceVersion="102", timeoutSeconds="1")]
        assert expired.value.is_expired

    run_virtually(ask())
