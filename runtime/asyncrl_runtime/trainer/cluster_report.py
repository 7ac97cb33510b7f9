"""Copies the trainer's report into a ConfigMap, where the operator finds it even after it has been down.

The trainer's service account may patch this one object. A report that cannot be written is logged and lost:
training never waits for it.
"""

import asyncio
import contextlib
import json
import logging
import os
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx

from asyncrl_api.report import Report
from asyncrl_api.run_config import RunConfig

log = logging.getLogger(__name__)

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
LOOK_SECONDS = 1.0
CHANGED_SECONDS = 10.0
"""The time between two copies of a report that keeps changing; a new state is copied at once."""
UNCHANGED_SECONDS = 30.0
"""The time after which an unchanged report is copied again, because its time shows that the trainer lives."""
CALL_SECONDS = 5.0
"""The time limit of one copy. The last copy uses up part of the pod's grace period."""


class ReportCopier:
    """Copies a report whenever it is due.

    Args:
        client: a client of the API server with the trainer's rights.
        path: the path of the ConfigMap in the API.
        read: returns the report as it is now; None while there is none.
        clock: monotonic time, in seconds.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        path: str,
        read: Callable[[], Report | None],
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._path = path
        self._read = read
        self._clock = clock
        self._sent: Report | None = None
        self._tried_at = float("-inf")
        self._has_failed = False

    async def keep(self) -> None:
        """Copy until cancelled."""
        while True:
            try:
                await self.copy_if_due()
            except Exception:  # the edge of this task: training goes on, and the operator manages without
                log.exception("the report was not copied; it is tried again in %.0f s", CHANGED_SECONDS)
                await asyncio.sleep(CHANGED_SECONDS)
            await asyncio.sleep(LOOK_SECONDS)

    async def copy_if_due(self) -> None:
        """Copy the report if it says something new or has not been copied for long."""
        report = self._read()
        if report is not None and self._is_due(report):
            await self._copy(report)

    async def copy_last(self) -> None:
        """Copy the last report unless it has been copied already."""
        if (report := self._read()) is not None and report != self._sent:
            await self._copy(report)

    def _is_due(self, report: Report) -> bool:
        age = self._clock() - self._tried_at
        if self._has_failed:
            return age >= CHANGED_SECONDS
        if self._sent is None or report.state != self._sent.state:
            return True
        return age >= (CHANGED_SECONDS if _news(report) != _news(self._sent) else UNCHANGED_SECONDS)

    async def _copy(self, report: Report) -> None:
        self._tried_at, self._has_failed = self._clock(), True
        alive = report.model_copy(update={"time": datetime.now(UTC).isoformat(timespec="seconds")})
        body = {"data": {"report": alive.model_dump_json(by_alias=True, exclude_none=True)}}
        headers = {"Content-Type": "application/merge-patch+json"}
        try:
            async with asyncio.timeout(CALL_SECONDS):
                answer = await self._client.patch(self._path, content=json.dumps(body), headers=headers)
                answer.raise_for_status()
        except (httpx.HTTPError, OSError) as error:  # a timeout and an unreadable token are OSErrors
            log.warning("the report was not written to %s: %r", self._path, error)
            return
        self._sent, self._has_failed = report, False


def _news(report: Report) -> Report:
    """Return a report without the fields that change even if nothing has happened."""
    return report.model_copy(update={"time": "", "seconds_without_progress": None})


@contextlib.asynccontextmanager
async def copying_report(
    config: RunConfig, clock: Callable[[], float], read: Callable[[], Report | None]
) -> AsyncIterator[None]:
    """Copy the report while the body runs, and once more at its end; do nothing outside a cluster.

    Args:
        read: returns this attempt's report.
    """
    client = _client_for(config.report_config_map)
    if client is None:
        yield
        return
    async with client:
        path = f"/api/v1/namespaces/{config.namespace}/configmaps/{config.report_config_map}"
        copier = ReportCopier(client, path, read, clock)
        task = asyncio.create_task(copier.keep(), name="copy report")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])  # two copies at once could arrive in the wrong order
            await copier.copy_last()


def _client_for(config_map: str) -> httpx.AsyncClient | None:
    """Return a client; None outside a cluster, or in a pod without a service account."""
    if not config_map:
        return None
    try:
        return in_cluster_client()
    except (KeyError, OSError) as error:
        log.warning("no report reaches ConfigMap %s: the pod has no service account: %r", config_map, error)
        return None


def in_cluster_client(account: Path = ACCOUNT) -> httpx.AsyncClient:
    """Return a client of the pod's API server; it reads the token for every call, because that is renewed."""

    def authorize(request: httpx.Request) -> httpx.Request:
        request.headers["Authorization"] = f"Bearer {(account / 'token').read_text().strip()}"
        return request

    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return httpx.AsyncClient(
        base_url=f"https://{authority}",
        verify=ssl.create_default_context(cafile=str(account / "ca.crt")),
        auth=authorize,
        timeout=CALL_SECONDS,
        trust_env=False,
    )
