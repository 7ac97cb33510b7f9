"""The pod templates of trainer, rollout and messaging. Pure.

Container names (`trainer`, `engine`, `worker`, `nats`) are part of the API, since overlays and `kubectl logs
-c` use them.
"""

from asyncrl_api.job import AsyncRLJob, Spec
from asyncrl_operator.decide.desired import DesiredTrainer
from asyncrl_operator.layout import (
    HEALTH_PORT,
    NATS_HEALTH_PATH,
    NATS_HEALTH_PORT,
    NATS_PROBE_SECONDS,
    TRAINER_PORT,
    Places,
    messaging_command,
    num_trainer_pods,
    rollout_commands,
    trainer_command,
)
from asyncrl_operator.render.overlay import lay_over
from asyncrl_operator.render.pod_parts import (
    CODE,
    ENGINE_LINGERS_SECONDS,
    NATS,
    NATS_PORT,
    NATS_STARTUP_SECONDS,
    NATS_STORE,
    NOT_EVICTABLE,
    ROLLOUT_GRACE_SECONDS,
    Defaults,
    PodPlaces,
    claim,
    common_volumes,
    config_map,
    container_security,
    credentials_mount,
    credentials_volume,
    environment,
    labels,
    mounts,
    probe,
    probes,
    render_pod,
    resources,
    secrets_as_variables,
)
from asyncrl_operator.render.quantities import canonical
from asyncrl_operator.resources import ATTEMPT_LABEL, GPUS_ANNOTATION, TEMPLATE_LABEL, Json

READY_FAILURES = 3
"""Failures in a row: in each step an engine takes in weights and is not ready for a moment."""


def trainer_template(job: AsyncRLJob, defaults: Defaults, attempt: DesiredTrainer) -> Json:
    """Return the template of one attempt's pods.

    Raises:
        SpecError: the overlay sets a field that the operator owns.
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
            *environment(spec),
            {"name": "MASTER_ADDR", "value": master},
            {"name": "MASTER_PORT", "value": str(TRAINER_PORT)},
        ],
        **secrets_as_variables(spec.model.secret_ref, spec.dataset.secret_ref),
        "ports": [{"name": "rendezvous", "containerPort": TRAINER_PORT}],
        "volumeMounts": [
            *mounts("config", "live", "checkpoints", "cache", "shm", "tmp"),
            *credentials_mount(spec),
        ],
        **resources(spec, ranks),
        "securityContext": container_security(),
    }
    pod = render_pod(job, defaults, "trainer", [container])
    pod |= {
        "restartPolicy": "Never",
        "subdomain": f"{name}-trainer",
        "terminationGracePeriodSeconds": spec.trainer.termination_grace_period_seconds,
        "serviceAccountName": spec.scheduling.service_account_name or f"{name}-trainer",
        "automountServiceAccountToken": True,  # to patch its report
        "volumes": [
            config_map("config", f"{name}-config-{attempt.number}"),
            config_map("live", f"{name}-live"),
            claim("checkpoints", spec.checkpoint.location.claim_name),
            *common_volumes(job),
            *credentials_volume(job, "trainer.json"),
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
    """Return the template of a rollout pod: one engine with `gpus` GPUs, and its worker.

    Raises:
        SpecError: the overlay sets a field that the operator owns.
    """
    spec, name = job.spec, job.metadata.name
    image = spec.rollout.engine.image or defaults.runtime_image
    engine_command, worker_command = rollout_commands(spec, gpus, PodPlaces(), "$(POD_NAME)")
    engine = {
        "name": "engine",
        "image": image,
        "command": list(engine_command),
        "env": environment(spec),
        **secrets_as_variables(spec.model.secret_ref),
        "volumeMounts": mounts("config", "cache", "shm", "tmp"),
        **resources(spec, gpus),
        **probes("/engine", failures=6),
        "lifecycle": {"preStop": {"sleep": {"seconds": ENGINE_LINGERS_SECONDS}}},
        "securityContext": container_security(),
    }
    worker = {
        "name": "worker",
        "image": image,
        "command": list(worker_command),
        "env": environment(spec),
        **secrets_as_variables(spec.model.secret_ref),
        "ports": [{"name": "health", "containerPort": HEALTH_PORT}],
        "volumeMounts": [
            *mounts("config", "cache", "tmp"),
            *credentials_mount(spec),
            *({"name": each, "mountPath": f"{CODE}/{each}", "readOnly": True} for each in code_volumes(spec)),
        ],
        **probes("/worker", failures=3),
        "readinessProbe": probe("/ready") | {"periodSeconds": 2, "failureThreshold": READY_FAILURES},
        "securityContext": container_security(),
    }
    pod = render_pod(job, defaults, "rollout", [engine, worker])
    pod |= {
        "terminationGracePeriodSeconds": ROLLOUT_GRACE_SECONDS,
        "serviceAccountName": spec.scheduling.service_account_name or f"{name}-rollout",
        "automountServiceAccountToken": False,
        "volumes": [
            config_map("config", f"{name}-rollout-{template_hash}"),
            *common_volumes(job),
            *credentials_volume(job, "worker.json"),
            *(config_map(volume, source) for volume, source in code_volumes(spec).items()),
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
        "command": list(messaging_command(f"{NATS}/nats.conf", NATS_HEALTH_PORT)),
        "ports": [
            {"name": "nats", "containerPort": NATS_PORT},
            {"name": "health", "containerPort": NATS_HEALTH_PORT},
        ],
        "volumeMounts": [
            {"name": "credentials", "mountPath": NATS, "readOnly": True},
            {"name": "store", "mountPath": NATS_STORE},
            *mounts("tmp"),
        ],
        "readinessProbe": {"tcpSocket": {"port": NATS_PORT}, "periodSeconds": 2, "failureThreshold": 3},
        # It listens once it has read its files, which may be many.
        "startupProbe": {
            "tcpSocket": {"port": NATS_PORT},
            "periodSeconds": 2,
            "failureThreshold": NATS_STARTUP_SECONDS // 2,
        },
        "livenessProbe": {
            "httpGet": {"path": NATS_HEALTH_PATH, "port": NATS_HEALTH_PORT},
            "timeoutSeconds": 5,
            "periodSeconds": int(NATS_PROBE_SECONDS),
            "failureThreshold": 3,
        },
        "securityContext": container_security(),
    }
    pod = render_pod(job, defaults, "messaging", [container])
    storage = job.spec.messaging.embedded.storage
    volumes: list[Json] = [{"name": "tmp", "emptyDir": {}}, *credentials_volume(job, "nats.conf")]
    if storage.type == "Ephemeral":
        volumes.append({"name": "store", "emptyDir": {"sizeLimit": storage.size}})
    pod |= {
        "terminationGracePeriodSeconds": 30,
        "serviceAccountName": f"{job.metadata.name}-rollout",
        "automountServiceAccountToken": False,
        "volumes": volumes,
    }
    annotations = {GPUS_ANNOTATION: "0", **NOT_EVICTABLE}
    meta = {"labels": labels(job, "messaging"), "annotations": annotations}
    return {"metadata": meta, "spec": canonical(pod)}


def code_volumes(spec: Spec) -> dict[str, str]:
    """Return the names of the ConfigMaps with user code, by volume."""
    found = {}
    if spec.workflow.config_map_ref is not None:
        found["workflow-code"] = spec.workflow.config_map_ref.name
    if spec.reward.config_map_ref is not None:
        found["reward-code"] = spec.reward.config_map_ref.name
    return found
