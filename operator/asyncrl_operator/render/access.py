"""Who may do what: service accounts, the trainer's one right, network policies, a disruption budget. Pure."""

from asyncrl_api.job import AsyncRLJob
from asyncrl_operator.layout import HEALTH_PORT
from asyncrl_operator.render.pod_parts import NATS_PORT, selector
from asyncrl_operator.resources import Json


def render_access(job: AsyncRLJob) -> list[Json]:
    """Return the objects that limit what the pods of a job may do, and what may be done to them."""
    name, account = job.metadata.name, job.spec.scheduling.service_account_name
    objects: list[Json] = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "name": f"{name}-rollout", "body": _NO_TOKEN}
    ]
    if not account:
        objects.append(
            {"apiVersion": "v1", "kind": "ServiceAccount", "name": f"{name}-trainer", "body": _NO_TOKEN}
        )
    rbac = "rbac.authorization.k8s.io"
    rule = {
        "apiGroups": [""],
        "resources": ["configmaps"],
        "resourceNames": [f"{name}-report"],
        "verbs": ["get", "patch"],
    }
    binding = {
        "roleRef": {"apiGroup": rbac, "kind": "Role", "name": f"{name}-trainer"},
        "subjects": [
            {
                "kind": "ServiceAccount",
                "name": account or f"{name}-trainer",
                "namespace": job.metadata.namespace,
            }
        ],
    }
    objects += [
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "name": f"{name}-trainer", "body": {"rules": [rule]}},
        {"apiVersion": f"{rbac}/v1", "kind": "RoleBinding", "name": f"{name}-trainer", "body": binding},
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "name": f"{name}-rollout",
            "body": {"spec": _disruption_budget(job)},
        },
    ]
    return objects + [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "name": f"{name}-{group}",
            "body": {"spec": spec},
        }
        for group, spec in _network_policies(job).items()
    ]


_NO_TOKEN: Json = {"automountServiceAccountToken": False}


def _disruption_budget(job: AsyncRLJob) -> Json:
    """Return the budget of the rollout group; one for the trainer would block drains and help nobody.

    Pods that are not ready sample nothing and may always be evicted: a job whose engines cannot start would
    otherwise keep its nodes from being drained.
    """
    return {
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "maxUnavailable": f"{job.spec.rollout.update.max_unavailable_percent}%",
        "selector": {"matchLabels": selector(job, "rollout")},
    }


def _network_policies(job: AsyncRLJob) -> dict[str, Json]:
    """Return the policies by group. They limit ingress only: the job's pods reach each other on any port.

    Trainer and engines form collectives on ports that the system chooses. The workers' probes can be reached
    from anywhere.
    """
    ours = [{"podSelector": {"matchLabels": selector(job)}}]
    rules: dict[str, list[Json]] = {
        "trainer": [{"from": ours}],
        "rollout": [{"from": ours}, {"ports": [{"port": HEALTH_PORT, "protocol": "TCP"}]}],
    }
    if job.spec.messaging.mode == "Embedded":
        rules["nats"] = [{"from": ours, "ports": [{"port": NATS_PORT, "protocol": "TCP"}]}]
    groups = {"nats": "messaging"}
    return {
        name: {
            "podSelector": {"matchLabels": selector(job, groups.get(name, name))},
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        }
        for name, ingress in rules.items()
    }
