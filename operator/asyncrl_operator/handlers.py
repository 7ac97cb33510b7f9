"""The kopf shell: kopf watches AsyncRLJobs and tells the cache; everything else is ours.

`on.event` is the only kind of handler that leaves no finalizer and no annotation on the object. kopf also
handles the process's signals and the liveness endpoint.
"""

import logging
from collections.abc import Callable
from typing import Any

import kopf
from kubernetes.aio.client.configuration import Configuration

from asyncrl_operator.api_server.cluster import Cluster
from asyncrl_operator.resources import ASYNCRL_JOBS

DOMAIN = "asyncrl.dev"
PAGE_SIZE = 100
"""The objects of a page, few because kopf decodes a page as a whole."""
RETRY_SECONDS = (0.5, 1.0, 2.0, 3.0, 3.0, 3.0)
"""The waits between kopf's tries; its own grow to 21 s. After the last one the watch begins anew."""


class NoDiffs(kopf.DiffBaseStorage):
    """Keeps nothing of an object: `on.event` needs nothing, and kopf would copy each object in full."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Leave the object as it is."""


def build_registry(
    cluster: Cluster, configuration: Configuration, check_health: Callable[[], None]
) -> kopf.OperatorRegistry:
    """Return the handlers of the operator.

    Args:
        configuration: that of our own client; kopf gets its credentials, and asks again when they expire.
        check_health: raises if the process should be restarted.
    """
    registry = kopf.OperatorRegistry()
    group, version = ASYNCRL_JOBS.api_version.split("/")

    async def login(**_: Any) -> Any:
        scheme, _space, token = (await configuration.get_api_key_with_prefix("BearerToken") or "").rpartition(
            " "
        )
        return kopf.ConnectionInfo(
            server=configuration.host,
            ca_path=configuration.ssl_ca_cert,
            insecure=not configuration.verify_ssl,
            scheme=scheme or None,
            token=token or None,
            certificate_path=configuration.cert_file,
            private_key_path=configuration.key_file,
        )

    def set_up(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)

    async def job_changed(event: Any, **_: Any) -> None:
        cluster.take_job(event["type"], event["object"])

    def health(**_: Any) -> str:
        check_health()
        return "ok"

    kopf.on.login(registry=registry)(login)
    kopf.on.startup(registry=registry)(set_up)
    kopf.on.event(group, version, ASYNCRL_JOBS.plural, registry=registry)(job_changed)
    kopf.on.probe(id="health", registry=registry, errors=kopf.ErrorsMode.PERMANENT)(health)
    return registry


def configure(settings: kopf.OperatorSettings) -> None:
    """Turn off what kopf would do by itself, and set deadlines for what it would wait for forever."""
    settings.scanning.disabled = True  # otherwise it lists namespaces and CRDs
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 310
    settings.watching.chunk_size = PAGE_SIZE
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = RETRY_SECONDS
    settings.queueing.exit_timeout = 1.0
    settings.process.ultimate_exiting_timeout = 10.0
    # Unused, since `on.event` keeps nothing; but a handler of another kind, if one is added, must not leave
    # kopf's names.
    settings.persistence.finalizer = f"{DOMAIN}/operator"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=DOMAIN)
    settings.persistence.diffbase_storage = NoDiffs()
    for noisy in (
        "kopf.objects",
        "kopf.activities.probe",
        "aiohttp.access",
    ):  # a line for each event or probe
        logging.getLogger(noisy).setLevel(logging.WARNING)
