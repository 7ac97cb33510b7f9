"""The kinds of objects that the operator handles: their place in the API, and the order of their creation."""

from dataclasses import dataclass
from typing import Any, Final

from asyncrl_api.job import API_VERSION, KIND

Json = dict[str, Any]
"""An object, or a part of one, in the API's form."""

JOB_LABEL: Final = "asyncrl.dev/job"
JOB_UID_LABEL: Final = "asyncrl.dev/job-uid"
GROUP_LABEL: Final = "asyncrl.dev/group"
ATTEMPT_LABEL: Final = "asyncrl.dev/attempt"
TEMPLATE_LABEL: Final = "asyncrl.dev/template"
GPUS_ANNOTATION: Final = "asyncrl.dev/gpus"
DISRUPTION_ANNOTATION: Final = "asyncrl.dev/disruption"
"""The annotation, on a node or on a trainer's pod, by which anybody announces its end; its value says why."""
SELECTOR: Final = JOB_UID_LABEL
"""The label that selects all objects of a job. It is our own: tools that adopt objects set `managed-by`."""


@dataclass(frozen=True)
class Resource:
    """A kind of object."""

    api_version: str
    kind: str
    plural: str

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """Return the path of an object or a collection; None: all namespaces, or a kind that has none."""
        root = "/api/v1" if self.api_version == "v1" else f"/apis/{self.api_version}"
        parts = [root, *(["namespaces", namespace] if namespace else []), self.plural, name, subresource]
        return "/".join(filter(None, parts))


SERVICE_ACCOUNTS: Final = Resource("v1", "ServiceAccount", "serviceaccounts")
ROLES: Final = Resource("rbac.authorization.k8s.io/v1", "Role", "roles")
ROLE_BINDINGS: Final = Resource("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings")
SERVICES: Final = Resource("v1", "Service", "services")
CONFIG_MAPS: Final = Resource("v1", "ConfigMap", "configmaps")
DISRUPTION_BUDGETS: Final = Resource("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
NETWORK_POLICIES: Final = Resource("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
STATEFUL_SETS: Final = Resource("apps/v1", "StatefulSet", "statefulsets")
JOBS: Final = Resource("batch/v1", "Job", "jobs")
PODS: Final = Resource("v1", "Pod", "pods")
NODES: Final = Resource("v1", "Node", "nodes")
SECRETS: Final = Resource("v1", "Secret", "secrets")
EVENTS: Final = Resource("v1", "Event", "events")
ASYNCRL_JOBS: Final = Resource(API_VERSION, KIND, "asyncrljobs")

CHILDREN: Final = (
    SERVICE_ACCOUNTS,
    ROLES,
    ROLE_BINDINGS,
    SERVICES,
    CONFIG_MAPS,
    DISRUPTION_BUDGETS,
    NETWORK_POLICIES,
    STATEFUL_SETS,
    JOBS,
)
"""The kinds that are applied, compared and deleted. Secrets are not: the operator may only create them."""

_BY_KIND: Final = {each.kind: each for each in (*CHILDREN, SECRETS)}


def resource_in(path: str) -> tuple[str, bool]:
    """Return the resource of an API path (`jobs`, `asyncrljobs/status`), and whether it names one object."""
    parts = path.strip("/").split("/")
    if parts[0] not in ("api", "apis"):
        return parts[0], False
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if parts[0] == "namespaces" and len(parts) > 2:
        parts = parts[2:]
    return "/".join((parts[0], *parts[2:])), len(parts) > 1


def resource_of(manifest: dict[str, Any]) -> Resource:
    """Return the kind of a rendered object."""
    return _BY_KIND[manifest["kind"]]


def is_made_once(manifest: dict[str, Any]) -> bool:
    """Return whether an object stays as it was made, even by an earlier version of the operator."""
    return resource_of(manifest) is JOBS or bool(manifest.get("immutable"))
