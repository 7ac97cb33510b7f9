"""The command `asyncrl-operator`: the operator's process."""

import asyncio
import contextlib
import gc
import logging
import os
import random
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

import kopf
import typer
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from prometheus_client import start_http_server

from asyncrl_operator.api_server.api import Api, ApiError
from asyncrl_operator.api_server.cluster import Cluster
from asyncrl_operator.api_server.recorder import Recorder
from asyncrl_operator.executor import Executor
from asyncrl_operator.handlers import build_registry
from asyncrl_operator.obstacles import Obstacles
from asyncrl_operator.passes import Passes
from asyncrl_operator.reconcile import Reconciler
from asyncrl_operator.render.manifests import Defaults
from asyncrl_operator.telemetry import Telemetry
from asyncrl_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

WATCH_SILENCE_SECONDS = 600.0
"""A watch loop that has done nothing for this long, not even failed, is stuck."""
STUCK_PASS_SECONDS = 300.0
CRD_RETRY_SECONDS = 5.0
SHOW_SECONDS = 15.0
"""The time between two updates of the watches' metrics."""
CREDENTIALS_BYTES = 24


@dataclass(frozen=True)
class Settings:
    """The settings that the process is started with."""

    namespaces: tuple[str, ...]
    """The namespaces that are watched; none: all."""
    defaults: Defaults
    metrics_port: int
    liveness_port: int


@app.command()
def main(
    runtime_image: Annotated[
        str, typer.Option(envvar="ASYNCRL_RUNTIME_IMAGE", help="Image of trainers and workers.")
    ],
    nats_image: Annotated[str, typer.Option(envvar="ASYNCRL_NATS_IMAGE", help="Image of NATS servers.")],
    namespaces: Annotated[
        str,
        typer.Option(
            envvar="ASYNCRL_NAMESPACES", help="Namespaces to watch, separated by commas; empty: all."
        ),
    ] = "",
    image_pull_secrets: Annotated[
        str,
        typer.Option(
            envvar="ASYNCRL_IMAGE_PULL_SECRETS",
            help="Secrets for pulling the images of all pods, separated by commas.",
        ),
    ] = "",
    metrics_port: Annotated[
        int, typer.Option(envvar="ASYNCRL_METRICS_PORT", help="Port of the metrics; 0: none.")
    ] = 8080,
    liveness_port: Annotated[
        int, typer.Option(envvar="ASYNCRL_LIVENESS_PORT", help="Port of the liveness endpoint; 0: none.")
    ] = 8081,
    log_level: Annotated[str, typer.Option(envvar="ASYNCRL_LOG_LEVEL")] = "INFO",
) -> None:
    """Run the operator of AsyncRLJobs until SIGTERM or SIGINT.

    It uses the credentials of KUBECONFIG, or those of the pod's service account.
    """
    logging.basicConfig(level=log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    defaults = Defaults(
        runtime_image=runtime_image, nats_image=nats_image, image_pull_secrets=_names(image_pull_secrets)
    )
    gc.freeze()  # modules stay, and no collection need look at the client's hundreds of models
    asyncio.run(run(Settings(_names(namespaces), defaults, metrics_port, liveness_port)))


async def run(settings: Settings) -> None:
    """Run the operator until kopf, which handles the signals, ends."""
    telemetry = Telemetry()
    async with connect() as client:
        api = Api(client, telemetry.called)
        queue = WorkQueue(jitter=lambda: random.uniform(0.8, 1.2))
        passes = Passes(queue, telemetry, time.time)
        cluster = Cluster(api, settings.namespaces, passes.wake, time.monotonic)
        reconciler = Reconciler(
            cluster,
            Executor(cluster, settings.defaults, lambda: secrets.token_urlsafe(CREDENTIALS_BYTES)),
            Obstacles(cluster, time.time),
            Recorder(api, time.time),
            telemetry,
            time.time,
        )
        if settings.metrics_port:
            start_http_server(settings.metrics_port, registry=telemetry.registry)
        await _run_all(settings, client.configuration, cluster, passes, reconciler, telemetry)


async def _run_all(
    settings: Settings,
    configuration: Configuration,
    cluster: Cluster,
    passes: Passes,
    reconciler: Reconciler,
    telemetry: Telemetry,
) -> None:
    async def work() -> None:
        await cluster.wait_until_synced()
        logger.info("the caches are filled; reconciling begins")
        await passes.run(reconciler.reconcile)

    registry = build_registry(cluster, configuration, lambda: check_health(cluster, passes))
    port = settings.liveness_port
    tasks = [
        asyncio.create_task(cluster.run(), name="caches"),
        asyncio.create_task(work(), name="passes"),
        asyncio.create_task(_show_watches(cluster, telemetry), name="watch metrics"),
    ]
    shell = asyncio.create_task(_run_shell(settings, cluster, registry, port), name="kopf")
    try:
        await asyncio.wait([shell, *tasks], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (shell, *tasks):
            task.cancel()
        ends = await asyncio.gather(shell, *tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end


@contextlib.asynccontextmanager
async def connect() -> AsyncIterator[ApiClient]:
    """Provide a client with the credentials of KUBECONFIG, or with those of the pod's service account."""
    configuration = Configuration()
    configuration.retries = 0  # the queue and the informers try again at their own pace
    if os.environ.get("KUBECONFIG"):
        await config.load_kube_config(os.environ["KUBECONFIG"], client_configuration=configuration)
    else:
        config.load_incluster_config(client_configuration=configuration)
    async with ApiClient(configuration) as client:
        yield client


def check_health(cluster: Cluster, passes: Passes) -> None:
    """Check that the process is not stuck. An API server that is down is no reason for a restart.

    Raises:
        RuntimeError: the process is stuck and should be restarted; says what is stuck.
    """
    for sign in cluster.signs():
        if (silence := time.monotonic() - sign.at) > WATCH_SILENCE_SECONDS:
            raise RuntimeError(f"the watch of {sign.watch} has been silent for {silence:.0f} s")
    if (seconds := passes.longest_pass_seconds()) > STUCK_PASS_SECONDS:
        raise RuntimeError(f"a pass has been under way for {seconds:.0f} s")


async def _run_shell(
    settings: Settings, cluster: Cluster, registry: kopf.OperatorRegistry, liveness_port: int
) -> None:
    """Run kopf once the CRD is served, since kopf looks for it only once."""
    await _wait_for_crd(cluster)
    await kopf.operator(
        registry=registry,
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
        liveness_endpoint=f"http://0.0.0.0:{liveness_port}/healthz" if liveness_port else None,
        standalone=True,
        # Otherwise it asks for the user's name, which a container lacks. kopf's type for it is not public.
        identity="asyncrl-operator",  # type: ignore[arg-type]
    )


async def _wait_for_crd(cluster: Cluster) -> None:
    """Return once AsyncRLJobs are served. The wait has no deadline, since the CRD may be installed later."""
    while True:
        try:
            await cluster.served_problem()
            return
        except ApiError as error:
            logger.warning("AsyncRLJobs are not served, next try in %.0f s: %s", CRD_RETRY_SECONDS, error)
        await asyncio.sleep(CRD_RETRY_SECONDS)


async def _show_watches(cluster: Cluster, telemetry: Telemetry) -> None:
    while True:
        offset = time.time() - time.monotonic()
        telemetry.watches((sign.watch, sign.at + offset) for sign in cluster.signs())
        await asyncio.sleep(SHOW_SECONDS)


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))
