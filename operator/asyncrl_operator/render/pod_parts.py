"""What the pods of all groups have in common: names, places, volumes, scheduling, security. Pure."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from asyncrl_api.base import SecretReference
from asyncrl_api.job import AsyncRLJob, Spec
from asyncrl_operator.layout import ENGINE_PORT, HEALTH_PORT, NATS_HEALTH_PORT
from asyncrl_operator.resources import GROUP_LABEL, JOB_LABEL, JOB_UID_LABEL, Json

CONFIG = "/etc/asyncrl/config"
LIVE = "/etc/asyncrl/live"
NATS = "/etc/asyncrl/nats"
CODE = "/etc/asyncrl/code"
CHECKPOINTS = "/checkpoints"
CACHE = "/cache"
NATS_PORT = 4222
NATS_STORE = "/data"
NATS_STARTUP_SECONDS = 600
"""The time that a server has to read its files: some 10 GiB, on a slow disk."""
USER = 10001
LEAVE_NODE_SECONDS = 30
"""The time after which pods leave a node that is not ready or not reachable."""
ROLLOUT_GRACE_SECONDS = 60
ENGINE_LINGERS_SECONDS = 5
"""The time that the engine stays up at its end, so that its worker can save unfinished samples."""
STARTUP_SECONDS = 1800
"""The time that a model has to be loaded, and fetched before that."""
NOT_EVICTABLE = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}


@dataclass(frozen=True)
class Defaults:
    """The settings that the operator was installed with."""

    runtime_image: str
    nats_image: str
    image_pull_secrets: tuple[str, ...] = ()


@dataclass(frozen=True)
class PodPlaces:
    """Implements layout.Places: engine and worker meet on their pod's loopback, and DNS has the trainer."""

    host: str = "127.0.0.1"
    config: str = f"{CONFIG}/config.json"
    nats_config: str | None = f"{NATS}/nats.conf"

    def trainer_host(self) -> str:
        return self.host

    def nats_health_address(self) -> tuple[str, int]:
        return "0.0.0.0", NATS_HEALTH_PORT

    def engine_address(self, replica: int) -> tuple[str, int]:
        return "127.0.0.1", ENGINE_PORT

    def health_address(self, replica: int) -> tuple[str, int]:
        return "0.0.0.0", HEALTH_PORT  # kubelet asks from outside


def labels(job: AsyncRLJob, group: str = "", **more: str) -> dict[str, str]:
    """Return the labels of an object; those of the AsyncRLJob itself are not copied."""
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
    """Return the labels that select the pods of a job, or of one of its groups."""
    found = {JOB_UID_LABEL: job.metadata.uid or ""}
    return found | ({GROUP_LABEL: group} if group else {})


def job_folder(job: AsyncRLJob) -> PurePosixPath:
    """Return the job's folder on its claim, as the trainer sees it."""
    path = job.spec.checkpoint.location.path or f"{job.metadata.namespace}/{job.metadata.name}"
    return PurePosixPath(CHECKPOINTS) / path.lstrip("/")


def credentials_name(job: AsyncRLJob) -> str:
    """Return the name of the Secret, which contains the UID, so that an existing one is this job's."""
    return f"{job.metadata.name}-nats-{(job.metadata.uid or '')[:8]}"


def render_pod(job: AsyncRLJob, defaults: Defaults, group: str, containers: list[Json]) -> Json:
    """Return what pods of all groups have in common, at the restricted security level."""
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
    """Return the user's affinity; with a topology key, the pods of a group prefer to be near each other."""
    affinity: Json = dict(job.spec.scheduling.affinity)
    if (key := job.spec.scheduling.topology_key) and group != "messaging":
        term = {"labelSelector": {"matchLabels": selector(job, group)}, "topologyKey": key}
        near = dict(affinity.get("podAffinity", {}))
        preferred = "preferredDuringSchedulingIgnoredDuringExecution"
        near[preferred] = [*near.get(preferred, ()), {"weight": 100, "podAffinityTerm": term}]
        affinity["podAffinity"] = near
    return affinity


def resources(spec: Spec, gpus: int) -> Json:
    """Return a container's share of the budget's resource and of RDMA; nothing if it needs neither."""
    counts = {}
    if spec.gpu_budget.allocation == "ExtendedResource":
        counts[spec.gpu_budget.resource_name] = str(gpus)
    if spec.scheduling.network.rdma_count:
        counts[spec.scheduling.network.rdma_resource] = str(spec.scheduling.network.rdma_count)
    return {"resources": {"requests": counts, "limits": counts}} if counts else {}


def environment(spec: Spec) -> list[Json]:
    """Return the environment variables of all our processes. Only /tmp and the cache are writable."""
    values = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HOME": "/tmp",
        "USER": "asyncrl",  # the image has no name for our user id, and torch asks for one
        "HF_HOME": f"{CACHE}/hf",
    }
    if spec.gpu_budget.allocation == "None":
        values["OMP_NUM_THREADS"] = "1"  # as on one machine: there are many processes
    pod_name = {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    return [pod_name, *({"name": name, "value": value} for name, value in values.items())]


def secrets_as_variables(*references: SecretReference | None) -> Json:
    """Return the Secrets whose keys become variables; if several have a key, the last one's value counts.

    They are not mounted as a volume, because a missing Secret then shows in the pod's status.
    """
    names = dict.fromkeys(each.name for each in references if each is not None)
    return {"envFrom": [{"secretRef": {"name": name}} for name in names]} if names else {}


def mounts(*names: str) -> list[Json]:
    """Return the mounts of the volumes with these names."""
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


def common_volumes(job: AsyncRLJob) -> list[Json]:
    """Return the volumes of trainer and rollout; collectives need more shared memory than the usual 64 MB."""
    spec, cache = job.spec, job.spec.model.cache
    shm = {"medium": "Memory", "sizeLimit": spec.scheduling.shared_memory}
    return [
        claim("cache", cache.claim_name) if cache is not None else {"name": "cache", "emptyDir": {}},
        {"name": "shm", "emptyDir": shm},
        {"name": "tmp", "emptyDir": {}},
    ]


def credentials_mount(spec: Spec) -> list[Json]:
    """Return the mount of a process's NATS credentials; nothing if the server asks for none."""
    is_shared = spec.messaging.mode == "Shared"
    if is_shared and spec.messaging.shared.credentials_secret_ref is None:
        return []
    return [{"name": "credentials", "mountPath": NATS, "readOnly": True}]


def credentials_volume(job: AsyncRLJob, key: str) -> list[Json]:
    """Return the volume with a role's credentials, and only those of that role."""
    messaging = job.spec.messaging
    if messaging.mode == "Shared":
        reference = messaging.shared.credentials_secret_ref
        return (
            [] if reference is None else [{"name": "credentials", "secret": {"secretName": reference.name}}]
        )
    secret = {"secretName": credentials_name(job), "items": [{"key": key, "path": key}]}
    return [{"name": "credentials", "secret": secret}]


def config_map(volume: str, name: str) -> Json:
    return {"name": volume, "configMap": {"name": name}}


def claim(volume: str, name: str) -> Json:
    return {"name": volume, "persistentVolumeClaim": {"claimName": name}}


def probe(path: str) -> Json:
    return {"httpGet": {"path": path, "port": HEALTH_PORT}, "timeoutSeconds": 2}


def probes(path: str, *, failures: int) -> Json:
    """Return the probes of a container; the worker answers them, for itself or for its engine."""
    startup = probe(path) | {"periodSeconds": 5, "failureThreshold": STARTUP_SECONDS // 5}
    return {
        "startupProbe": startup,
        "livenessProbe": probe(path) | {"periodSeconds": 5, "failureThreshold": failures},
    }


def container_security() -> Json:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
