"""The trainer's report reaches its ConfigMap with the trainer's own rights, and nothing else does."""

import base64
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from ruamel.yaml import YAML

from asyncrl_api.report import Report
from asyncrl_operator.render.manifests import render_shared
from asyncrl_runtime.trainer.cluster_report import (
    CHANGED_SECONDS,
    UNCHANGED_SECONDS,
    ReportCopier,
    in_cluster_client,
)
from support.cluster.control_plane import Cluster
from support.manifests.rendered_jobs import DEFAULTS, job_of

pytestmark = pytest.mark.e2e

REPORT = Report(attempt=2, step=7, max_steps=9, state="Training", time="2026-01-02T03:04:05+00:00")


@pytest.fixture
def account(cluster: Cluster, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The service account's folder, as a pod of the trainer finds it."""
    owner = job_of("cpu", namespace=namespace).model_dump(by_alias=True, exclude_none=True)
    del owner["metadata"]["uid"]
    cluster.apply(owner, namespace=namespace)
    uid = cluster.get(namespace, "arl", "gsm8k")["metadata"]["uid"]
    cluster.apply(*render_shared(job_of("cpu", namespace=namespace, uid=uid), DEFAULTS), namespace=namespace)
    token = cluster.kubectl("-n", namespace, "create", "token", "gsm8k-trainer")
    (tmp_path / "token").write_text(token)
    config: dict[str, Any] = YAML(typ="safe").load(Path(cluster.kubeconfig).read_text())
    server = config["clusters"][0]["cluster"]
    if "certificate-authority-data" in server:
        (tmp_path / "ca.crt").write_bytes(base64.b64decode(server["certificate-authority-data"]))
    else:
        (tmp_path / "ca.crt").write_bytes(Path(server["certificate-authority"]).read_bytes())
    address = urlsplit(server["server"])
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", address.hostname or "")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(address.port))
    return tmp_path


def stored(cluster: Cluster, namespace: str) -> Report | None:
    data = cluster.get(namespace, "configmap", "gsm8k-report").get("data")
    return Report.model_validate_json(data["report"]) if data else None


async def test_a_report_is_copied_when_it_is_due(cluster: Cluster, namespace: str, account: Path) -> None:
    now, report = 0.0, REPORT
    async with in_cluster_client(account) as client:
        path = f"/api/v1/namespaces/{namespace}/configmaps/gsm8k-report"
        copier = ReportCopier(client, path, lambda: report, lambda: now)
        await copier.copy_if_due()
        found = stored(cluster, namespace)
        assert found is not None and (found.attempt, found.step) == (2, 7)
        report = REPORT.model_copy(update={"step": 8})
        now += CHANGED_SECONDS - 1
        await copier.copy_if_due()
        assert stored(cluster, namespace) == found, "a step is no reason to hurry"
        report = REPORT.model_copy(update={"step": 8, "state": "Evaluating"})
        await copier.copy_if_due()
        assert (found := stored(cluster, namespace)) is not None and found.state == "Evaluating"
        now += UNCHANGED_SECONDS - 1
        version = cluster.get(namespace, "configmap", "gsm8k-report")["metadata"]["resourceVersion"]
        await copier.copy_if_due()
        assert cluster.get(namespace, "configmap", "gsm8k-report")["metadata"]["resourceVersion"] == version
        report = report.model_copy(update={"step": 9})
        await copier.copy_last()
        assert (found := stored(cluster, namespace)) is not None and found.step == 9


async def test_a_report_that_cannot_be_written_is_logged(
    namespace: str, account: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with in_cluster_client(account) as client:
        path = f"/api/v1/namespaces/{namespace}/configmaps/gsm8k-live"
        await ReportCopier(client, path, lambda: REPORT, lambda: 0.0).copy_if_due()
    assert "the report was not written to" in caplog.text and "403" in caplog.text


async def test_the_trainer_may_do_nothing_else(namespace: str, account: Path) -> None:
    root = f"/api/v1/namespaces/{namespace}"
    async with in_cluster_client(account) as client:

        async def is_refused(method: str, path: str, **body: Any) -> bool:
            answer: httpx.Response = await client.request(method, path, **body)
            return answer.status_code == 403

        assert await is_refused("GET", f"{root}/secrets")
        assert await is_refused("GET", f"{root}/configmaps")
        assert await is_refused("GET", f"{root}/configmaps/gsm8k-live")
        assert await is_refused("DELETE", f"{root}/configmaps/gsm8k-report")
        assert await is_refused("GET", f"{root}/pods")
        assert not await is_refused("GET", f"{root}/configmaps/gsm8k-report")
