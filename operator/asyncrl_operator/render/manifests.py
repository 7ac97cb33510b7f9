"""Renders an AsyncRLJob as the Kubernetes objects that it is made of. Pure.

Names are derived from the job's name alone, so that a pass that runs twice makes nothing twice. The Job of an
attempt and the configurations never change once made; the rest is applied again whenever it differs.
"""

import json
from collections.abc import Callable
from pathlib import Path

from asyncrl_api.base import parse_quantity
from asyncrl_api.job import AsyncRLJob, Spec
from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_api.run_config import DISRUPTION_FILE as DISRUPTION_KEY
from asyncrl_api.run_config import RunConfig, live_values
from asyncrl_operator.decide.desired import DesiredTrainer
from asyncrl_operator.decide.edits import rollout_hash
from asyncrl_operator.layout import HEALTH_PORT, TRAINER_PORT, num_trainer_pods
from asyncrl_operator.render.access import render_access
from asyncrl_operator.render.messaging import User, render_nats_config, worker_permissions
from asyncrl_operator.render.pod_parts import (
    CACHE,
    CODE,
    LIVE,
    NATS,
    NATS_PORT,
    NATS_STORE,
    Defaults,
    credentials_name,
    job_folder,
    labels,
    selector,
)
from asyncrl_operator.render.pod_templates import (
    code_volumes,
    messaging_template,
    rollout_template,
    trainer_template,
)
from asyncrl_operator.render.quantities import canonical
from asyncrl_operator.resources import ATTEMPT_LABEL, TEMPLATE_LABEL, Json

__all__ = [
    "Defaults",
    "render_credentials",
    "render_messaging",
    "render_rollout",
    "render_shared",
    "render_trainer",
]


def render_shared(job: AsyncRLJob, defaults: Defaults, disruption: str = "") -> list[Json]:
    """Return what all groups need: access, Services, live values, the report.

    Args:
        disruption: what is announced to end the trainer's pods.
    """
    name = job.metadata.name
    objects = [
        _object(job, each["apiVersion"], each["kind"], each["name"], each["body"])
        for each in render_access(job)
    ]
    ports = {"trainer": TRAINER_PORT, "rollout": HEALTH_PORT}
    if job.spec.messaging.mode == "Embedded":
        ports["nats"] = NATS_PORT
    objects += [_service(job, suffix, port) for suffix, port in ports.items()]
    live = json.dumps(live_values(job.spec), sort_keys=True)
    told = {"live.json": live, DISRUPTION_KEY: disruption}
    objects.append(_object(job, "v1", "ConfigMap", f"{name}-live", {"data": told}))
    objects.append(_object(job, "v1", "ConfigMap", f"{name}-report", {}))  # the trainer writes its data
    return objects


def render_credentials(job: AsyncRLJob, new_secret: Callable[[], str]) -> Json:
    """Return the Secret of an embedded server: its configuration and the password of each role.

    Args:
        new_secret: returns a random password.
    """
    names = JobNames.on_own_server(job.metadata.namespace or "", job.metadata.name)
    users = [User("trainer", new_secret()), User("worker", new_secret(), worker_permissions(names))]
    storage = job.spec.messaging.embedded.storage
    config = render_nats_config(
        host="0.0.0.0",
        port=NATS_PORT,
        store_dir=NATS_STORE,
        max_store_bytes=parse_quantity(storage.size),
        is_persistent=storage.type == "Persistent",
        users=users,
    )
    roles = {
        f"{user.name}.json": json.dumps({"user": user.name, "password": user.password}) for user in users
    }
    body = {"type": "Opaque", "immutable": True, "stringData": {"nats.conf": config, **roles}}
    return _object(job, "v1", "Secret", credentials_name(job), body)


def render_messaging(job: AsyncRLJob, defaults: Defaults, replicas: int) -> list[Json]:
    """Return the StatefulSet of the embedded server: one pod, or none while the job rests."""
    name, storage = job.metadata.name, job.spec.messaging.embedded.storage
    spec: Json = {
        "replicas": replicas,
        "serviceName": f"{name}-nats",
        "podManagementPolicy": "Parallel",
        "updateStrategy": {"type": "OnDelete"},  # a newer operator must not restart it
        "selector": {"matchLabels": selector(job, "messaging")},
        "template": messaging_template(job, defaults),
    }
    if storage.type == "Persistent":
        claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": storage.size}}}
        spec["volumeClaimTemplates"] = [{"metadata": {"name": "store"}, "spec": canonical(claim)}]
        spec["persistentVolumeClaimRetentionPolicy"] = {"whenDeleted": "Delete", "whenScaled": "Retain"}
    return [_object(job, "apps/v1", "StatefulSet", f"{name}-nats", {"spec": spec}, "messaging")]


def render_trainer(job: AsyncRLJob, defaults: Defaults, attempt: DesiredTrainer) -> list[Json]:
    """Return the configuration and the Job of one attempt of the trainer.

    The Job itself never retries: collectives need the whole group and a clean start. The rules of its
    podFailurePolicy serve whoever reads its condition.

    Raises:
        SpecError: `spec.trainer.podTemplate` sets a field that the operator owns.
    """
    name, nodes = job.metadata.name, num_trainer_pods(job.spec, attempt.gpus)
    own = {ATTEMPT_LABEL: str(attempt.number)}
    spec = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _failure_rules(job.spec)},
        "template": trainer_template(job, defaults, attempt),
    }
    config = _config(job, f"{name}-config-{attempt.number}", "trainer.json", own)
    return [
        config,
        _object(job, "batch/v1", "Job", f"{name}-trainer-{attempt.number}", {"spec": spec}, "trainer", own),
    ]


def render_rollout(job: AsyncRLJob, defaults: Defaults, replicas: int, gpus_per_replica: int) -> list[Json]:
    """Return the configuration and the StatefulSet of the rollout group.

    The operator replaces pods, wave by wave (OnDelete), and there is never more than one pod for an ordinal,
    so that the budget is never exceeded.

    Raises:
        SpecError: `spec.rollout.podTemplate` sets a field that the operator owns.
    """
    name, template = job.metadata.name, rollout_hash(job.spec)
    own = {TEMPLATE_LABEL: template}
    spec = {
        "replicas": replicas,
        "serviceName": f"{name}-rollout",
        "podManagementPolicy": "Parallel",
        "updateStrategy": {"type": "OnDelete"},
        "selector": {"matchLabels": selector(job, "rollout")},
        "template": rollout_template(job, defaults, gpus_per_replica, template),
    }
    config = _config(job, f"{name}-rollout-{template}", "worker.json", own)
    return [config, _object(job, "apps/v1", "StatefulSet", f"{name}-rollout", {"spec": spec}, "rollout", own)]


# -- parts


def _failure_rules(spec: Spec) -> list[Json]:
    """Return the rules that end a Job at once and that its condition names: final exit codes, disruption."""
    disrupted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    codes = sorted(set(spec.failure_policy.trainer.fatal_exit_codes))
    if not codes:
        return [disrupted]
    fatal = {"containerName": "trainer", "operator": "In", "values": codes}
    return [{"action": "FailJob", "onExitCodes": fatal}, disrupted]


def _object(
    job: AsyncRLJob,
    api_version: str,
    kind: str,
    name: str,
    body: Json,
    group: str = "",
    more: dict[str, str] | None = None,
) -> Json:
    """Return an object that is deleted with its AsyncRLJob."""
    owner = {
        "apiVersion": job.api_version,
        "kind": job.kind,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    metadata = {
        "name": name,
        "namespace": job.metadata.namespace,
        "labels": labels(job, group, **(more or {})),
        "ownerReferences": [owner],
    }
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **body}


def _service(job: AsyncRLJob, suffix: str, port: int) -> Json:
    """Return a headless Service; peers must find each other before they are ready."""
    group = "messaging" if suffix == "nats" else suffix
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": selector(job, group),
        "ports": [{"name": suffix, "port": port, "protocol": "TCP"}],
    }
    return _object(job, "v1", "Service", f"{job.metadata.name}-{suffix}", {"spec": spec}, group)


def _config(job: AsyncRLJob, name: str, credentials: str, more: dict[str, str]) -> Json:
    """Return the run configuration of one attempt, or of one rollout template."""
    spec, shared = job.spec, job.spec.messaging.shared
    if spec.messaging.mode == "Shared":
        has_credentials = shared.credentials_secret_ref is not None
        address = NatsAddress(
            url=shared.url, credentials_file=f"{NATS}/nats.creds" if has_credentials else ""
        )
    else:
        url = f"nats://{job.metadata.name}-nats:{NATS_PORT}"
        address = NatsAddress(url=url, credentials_file=f"{NATS}/{credentials}")
    config = RunConfig(
        namespace=job.metadata.namespace or "",
        name=job.metadata.name,
        uid=job.metadata.uid or "",
        spec=spec,
        nats=address,
        job_folder=Path(job_folder(job)),
        live_file=Path(LIVE) / "live.json",
        report_file=Path(job_folder(job)) / "report.json",
        report_config_map=f"{job.metadata.name}-report",
        model_cache=Path(CACHE),
        import_paths=tuple(Path(CODE) / volume for volume in code_volumes(spec)),
    )
    text = config.model_dump_json(by_alias=True, exclude_none=True)
    return _object(job, "v1", "ConfigMap", name, {"immutable": True, "data": {"config.json": text}}, "", more)
