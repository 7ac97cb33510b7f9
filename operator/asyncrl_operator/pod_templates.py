"""Pod templates of trainer, rollout and messaging. Pure.

Container names (`trainer`, `engine`, `worker`, `nats`) are API: overlays and `kubectl logs -c` use them.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from asyncrl_api.job import AsyncRLJob, Spec
from asyncrl_operator.layout import (
    ENGINE_PORT,
    HEALTH_PORT,
    TRAINER_PORT,
    Places,
    num_trainer_pods,
    rollout_commands,
    trainer_command,
)
from asyncrl_operator.observed import Attempt
from asyncrl_operator.overlay import lay_over
from asyncrl_operator.resources import (
    ATTEMPT_LABEL,
    GPUS_ANNOTATION,
    GROUP_LABEL,
    JOB_LABEL,
    JOB_UID_LABEL,
    TEMPLATE_LABEL,
)

Json = dict[str, Any]

CONFIG = "/etc/asyncrl/config"
LIVE = "/etc/asyncrl/live"
NATS = "/etc/asyncrl/nats"
CODE = "/etc/asyncrl/code"
CHECKPOINTS = "/checkpoints"
CACHE = "/cache"
NATS_PORT = 4222
NATS_STORE = "/data"
USER = 10001
LEAVE_NODE_SECONDS = 30
"""How long pods bear a node that is not ready or not reached."""
ROLLOUT_GRACE_SECONDS = 60
ENGINE_LINGERS_SECONDS = 5
"""The engine stays a little, so that its worker can put away what is unfinished."""
STARTUP_SECONDS = 1800
"""For a model to be loaded, or fetched first."""
NOT_EVICTABLE = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}


@dataclass(frozen=True)
class Defaults:
    """What the operator was installed with."""

    runtime_image: str
    nats_image: str
    image_pull_secrets: tuple[str, ...] = ()


@dataclass(frozen=True)
class PodPlaces:
    """Implements layout.Places: engine and worker meet on their pod's loopback, the trainer is in DNS."""

    host: str = "127.0.0.1"
    config: str = f"{CONFIG}/config.json"
    nats_config: str | None = f"{NATS}/nats.conf"

    def trainer_host(self) -> str:
        return self.host

    def engine_address(self, replica: int) -> tuple[str, int]:
        return "127.0.0.1", ENGINE_PORT

    def health_address(self, replica: int) -> tuple[str, int]:
        return "0.0.0.0", HEALTH_PORT  # kubelet asks from outside


def labels(job: AsyncRLJob, group: str = "", **more: str) -> dict[str, str]:
    """Return the labels of an object; nothing is taken over from the AsyncRLJob's own."""
    found = {
        "app.kubernetes.io/name": "asyncrl",
        "app.kubernetes.io/managed-by": "asyncrl-operator",
        "app.kubernetes.io/part-of": job.metadata.name,
        JOB_LABEL: job.metadata.name,
        JOB_UID_LABEL: job.metadata.uid or "",
    }
    if group:
        found |= {"app.kubernetes.io/component": group, GROUP_LABEL: group}
    return found | more


def selector(job: AsyncRLJob, group: str = "") -> dict[str, str]:
    """Return what the pods of a job, or of one of its groups, are selected by."""
    found = {JOB_UID_LABEL: job.metadata.uid or ""}
    return found | ({GROUP_LABEL: group} if group else {})


def job_folder(job: AsyncRLJob) -> PurePosixPath:
    """Return the job's folder on its claim, as the trainer sees it."""
    path = job.spec.checkpoint.location.path or f"{job.metadata.namespace}/{job.metadata.name}"
    return PurePosixPath(CHECKPOINTS) / path.lstrip("/")


def credentials_name(job: AsyncRLJob) -> str:
    """Return the name of the Secret; with the UID in it, so that one that exists is this job's."""
    return f"{job.metadata.name}-nats-{(job.metadata.uid or '')[:8]}"


def trainer_template(job: AsyncRLJob, defaults: Defaults, attempt: Attempt) -> Json:
    """Return the template of one attempt's pods.

    Raises:
        SpecError: the overlay sets what is the operator's.
    """
    spec, name = job.spec, job.metadata.name
    nodes = num_trainer_pods(spec, attempt.gpus)
    master = f"{name}-trainer-{attempt.number}-0.{name}-trainer"
    places: Places = PodPlaces(host=master)
    ranks = attempt.gpus // nodes
    command = trainer_command(places, attempt=attempt.number, ranks=ranks, nodes=nodes)
    container = {
        "name": "trainer",
        "image": spec.trainer.image or defaults.runtime_image,
        "command": list(command),
        "env": [
            *_environment(spec),
            {"name": "MASTER_ADDR", "value": master},
            {"name": "MASTER_PORT", "value": str(TRAINER_PORT)},
            *_hub_token(spec, with_dataset=True),
        ],
        "ports": [{"name": "rendezvous", "containerPort": TRAINER_PORT}],
        "volumeMounts": [
            *_mounts("config", "live", "checkpoints", "cache", "shm", "tmp"),
            *_credentials_mount(spec),
        ],
        **_resources(spec, ranks),
        "securityContext": _container_security(),
    }
    pod = _pod(job, defaults, "trainer", [container])
    pod |= {
        "restartPolicy": "Never",
        "subdomain": f"{name}-trainer",
        "terminationGracePeriodSeconds": spec.trainer.termination_grace_period_seconds,
        "serviceAccountName": spec.scheduling.service_account_name or f"{name}-trainer",
        "automountServiceAccountToken": True,  # to patch its report
        "volumes": [
            _config_map("config", f"{name}-config-{attempt.number}"),
            _config_map("live", f"{name}-live"),
            _claim("checkpoints", spec.checkpoint.location.claim_name),
            *_common_volumes(job),
            *_credentials_volume(job, "trainer.json"),
        ],
    }
    meta = {
        "labels": labels(job, "trainer", **{ATTEMPT_LABEL: str(attempt.number)}),
        "annotations": {GPUS_ANNOTATION: str(ranks), **NOT_EVICTABLE},
    }
    template = {"metadata": meta, "spec": pod}
    resource = spec.gpu_budget.resource_name
    return lay_over(template, spec.trainer.pod_template, "spec.trainer.podTemplate", resource)


def rollout_template(job: AsyncRLJob, defaults: Defaults, gpus: int, template_hash: str) -> Json:
    """Return the template of a rollout pod: one engine of `gpus` GPUs, and its worker.

    Raises:
        SpecError: the overlay sets what is the operator's.
    """
    spec, name = job.spec, job.metadata.name
    image = spec.rollout.engine.image or defaults.runtime_image
    engine_command, worker_command = rollout_commands(spec, gpus, PodPlaces(), "$(POD_NAME)")
    engine = {
        "name": "engine",
        "image": image,
        "command": list(engine_command),
        "env": [*_environment(spec), *_hub_token(spec)],
        "volumeMounts": _mounts("config", "cache", "shm", "tmp"),
        **_resources(spec, gpus),
        **_probes("/engine", failures=6),
        "lifecycle": {"preStop": {"sleep": {"seconds": ENGINE_LINGERS_SECONDS}}},
        "securityContext": _container_security(),
    }
    worker = {
        "name": "worker",
        "image": image,
        "command": list(worker_command),
        "env": [*_environment(spec), *_hub_token(spec)],
        "ports": [{"name": "health", "containerPort": HEALTH_PORT}],
        "volumeMounts": [
            *_mounts("config", "cache", "tmp"),
            *_credentials_mount(spec),
            *({"name": each, "mountPath": f"{CODE}/{each}", "readOnly": True} for each in code_volumes(spec)),
        ],
        **_probes("/worker", failures=3),
        "readinessProbe": _probe("/ready") | {"periodSeconds": 2, "failureThreshold": 1},
        "securityContext": _container_security(),
    }
    pod = _pod(job, defaults, "rollout", [engine, worker])
    pod |= {
        "terminationGracePeriodSeconds": ROLLOUT_GRACE_SECONDS,
        "serviceAccountName": spec.scheduling.service_account_name or f"{name}-rollout",
        "automountServiceAccountToken": False,
        "volumes": [
            _config_map("config", f"{name}-rollout-{template_hash}"),
            *_common_volumes(job),
            *_credentials_volume(job, "worker.json"),
            *(_config_map(volume, source) for volume, source in code_volumes(spec).items()),
        ],
    }
    meta = {
        "labels": labels(job, "rollout", **{TEMPLATE_LABEL: template_hash}),
        "annotations": {GPUS_ANNOTATION: str(gpus)},
    }
    template = {"metadata": meta, "spec": pod}
    resource = spec.gpu_budget.resource_name
    return lay_over(template, spec.rollout.pod_template, "spec.rollout.podTemplate", resource)


def messaging_template(job: AsyncRLJob, defaults: Defaults) -> Json:
    """Return the template of the NATS pod."""
    container = {
        "name": "nats",
        "image": defaults.nats_image,
        "command": ["nats-server", "-c", f"{NATS}/nats.conf"],
        "ports": [{"name": "nats", "containerPort": NATS_PORT}],
        "volumeMounts": [
            {"name": "credentials", "mountPath": NATS, "readOnly": True},
            {"name": "store", "mountPath": NATS_STORE},
            *_mounts("tmp"),
        ],
        "readinessProbe": {"tcpSocket": {"port": NATS_PORT}, "periodSeconds": 2, "failureThreshold": 3},
        "livenessProbe": {"tcpSocket": {"port": NATS_PORT}, "periodSeconds": 10, "failureThreshold": 3},
        "securityContext": _container_security(),
    }
    pod = _pod(job, defaults, "messaging", [container])
    storage = job.spec.messaging.embedded.storage
    volumes: list[Json] = [{"name": "tmp", "emptyDir": {}}, *_credentials_volume(job, "nats.conf")]
    if storage.type == "Ephemeral":
        volumes.append({"name": "store", "emptyDir": {"sizeLimit": storage.size}})
    pod |= {
        "terminationGracePeriodSeconds": 30,
        "serviceAccountName": f"{job.metadata.name}-rollout",
        "automountServiceAccountToken": False,
        "volumes": volumes,
    }
    annotations = {GPUS_ANNOTATION: "0", **NOT_EVICTABLE}
    return {"metadata": {"labels": labels(job, "messaging"), "annotations": annotations}, "spec": pod}


def code_volumes(spec: Spec) -> dict[str, str]:
    """Return the ConfigMaps with user code, by volume."""
    found = {}
    if spec.workflow.config_map_ref is not None:
        found["workflow-code"] = spec.workflow.config_map_ref.name
    if spec.reward.config_map_ref is not None:
        found["reward-code"] = spec.reward.config_map_ref.name
    return found


# -- parts of a pod


def _pod(job: AsyncRLJob, defaults: Defaults, group: str, containers: list[Json]) -> Json:
    scheduling = job.spec.scheduling
    secrets = [*(each.name for each in scheduling.image_pull_secrets), *defaults.image_pull_secrets]
    pod: Json = {
        "containers": containers,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "enableServiceLinks": False,
        "tolerations": [
            *(
                {
                    "key": f"node.kubernetes.io/{key}",
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": LEAVE_NODE_SECONDS,
                }
                for key in ("not-ready", "unreachable")
            ),
            *scheduling.tolerations,
        ],
    }
    if secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in dict.fromkeys(secrets)]
    if scheduling.node_selector:
        pod["nodeSelector"] = dict(scheduling.node_selector)
    if scheduling.priority_class_name:
        pod["priorityClassName"] = scheduling.priority_class_name
    if scheduling.network.mode == "Host" and group != "messaging":
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if affinity := _affinity(job, group):
        pod["affinity"] = affinity
    return pod


def _affinity(job: AsyncRLJob, group: str) -> Json:
    """Return the user's affinity; with a topology key, pods of a group prefer to be near each other."""
    affinity: Json = dict(job.spec.scheduling.affinity)
    if (key := job.spec.scheduling.topology_key) and group != "messaging":
        term = {"labelSelector": {"matchLabels": selector(job, group)}, "topologyKey": key}
        near = dict(affinity.get("podAffinity", {}))
        preferred = "preferredDuringSchedulingIgnoredDuringExecution"
        near[preferred] = [*near.get(preferred, ()), {"weight": 100, "podAffinityTerm": term}]
        affinity["podAffinity"] = near
    return affinity


def _resources(spec: Spec, gpus: int) -> Json:
    counts = {}
    if spec.gpu_budget.allocation == "ExtendedResource":
        counts[spec.gpu_budget.resource_name] = str(gpus)
    if spec.scheduling.network.rdma_count:
        counts[spec.scheduling.network.rdma_resource] = str(spec.scheduling.network.rdma_count)
    return {"resources": {"requests": counts, "limits": counts}} if counts else {}


def _environment(spec: Spec) -> list[Json]:
    values = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HOME": "/tmp",
        "HF_HOME": f"{CACHE}/hf",
    }
    if spec.gpu_budget.allocation == "None":
        values["OMP_NUM_THREADS"] = "1"  # as on one machine: there are many processes
    pod_name = {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    return [pod_name, *({"name": name, "value": value} for name, value in values.items())]


def _hub_token(spec: Spec, *, with_dataset: bool = False) -> list[Json]:
    """Return the hub's token, key `token` of the Secret, by environment: a missing Secret then shows."""
    reference = spec.model.secret_ref or (spec.dataset.secret_ref if with_dataset else None)
    if reference is None:
        return []
    source = {"secretKeyRef": {"name": reference.name, "key": "token"}}
    return [{"name": "HF_TOKEN", "valueFrom": source}]


def _mounts(*names: str) -> list[Json]:
    paths = {
        "config": CONFIG,
        "live": LIVE,
        "checkpoints": CHECKPOINTS,
        "cache": CACHE,
        "shm": "/dev/shm",
        "tmp": "/tmp",
    }
    read_only = {"config", "live"}
    return [
        {"name": name, "mountPath": paths[name]} | ({"readOnly": True} if name in read_only else {})
        for name in names
    ]


def _common_volumes(job: AsyncRLJob) -> list[Json]:
    spec, cache = job.spec, job.spec.model.cache
    shm = {"medium": "Memory", "sizeLimit": spec.scheduling.shared_memory}
    return [
        _claim("cache", cache.claim_name) if cache is not None else {"name": "cache", "emptyDir": {}},
        {"name": "shm", "emptyDir": shm},
        {"name": "tmp", "emptyDir": {}},
    ]


def _credentials_mount(spec: Spec) -> list[Json]:
    is_shared = spec.messaging.mode == "Shared"
    if is_shared and spec.messaging.shared.credentials_secret_ref is None:
        return []
    return [{"name": "credentials", "mountPath": NATS, "readOnly": True}]


def _credentials_volume(job: AsyncRLJob, key: str) -> list[Json]:
    """Return what a role may see of the credentials: its own."""
    messaging = job.spec.messaging
    if messaging.mode == "Shared":
        reference = messaging.shared.credentials_secret_ref
        return (
            [] if reference is None else [{"name": "credentials", "secret": {"secretName": reference.name}}]
        )
    secret = {"secretName": credentials_name(job), "items": [{"key": key, "path": key}]}
    return [{"name": "credentials", "secret": secret}]


def _config_map(volume: str, name: str) -> Json:
    return {"name": volume, "configMap": {"name": name}}


def _claim(volume: str, name: str) -> Json:
    return {"name": volume, "persistentVolumeClaim": {"claimName": name}}


def _probe(path: str) -> Json:
    return {"httpGet": {"path": path, "port": HEALTH_PORT}, "timeoutSeconds": 2}


def _probes(path: str, *, failures: int) -> Json:
    """Return the probes of a container for whom the worker answers, itself or its engine."""
    startup = _probe(path) | {"periodSeconds": 5, "failureThreshold": STARTUP_SECONDS // 5}
    return {
        "startupProbe": startup,
        "livenessProbe": _probe(path) | {"periodSeconds": 5, "failureThreshold": failures},
    }


def _container_security() -> Json:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
