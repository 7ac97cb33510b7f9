"""Lays a user's `podTemplate` over ours: a strategic merge, except for the fields that we own. Pure."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from asyncrl_api.parsing import FieldError, SpecError
from asyncrl_operator.render.quantities import canonical
from asyncrl_operator.resources import Json

MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "imagePullSecrets": "name",
    "topologySpreadConstraints": "topologyKey",
}
"""Lists whose entries are merged by a key, as in a strategic merge patch; others are replaced."""
APPENDED = {"tolerations", "envFrom"}
"""Lists to which entries are only added: pods must still leave dead nodes and get the spec's Secrets."""
OWNED = (
    "metadata.name",
    "metadata.namespace",
    "metadata.labels.asyncrl.dev/*",
    "metadata.labels.app.kubernetes.io/*",
    "metadata.labels.kueue.x-k8s.io/*",  # each pod would be admitted separately
    "metadata.annotations.asyncrl.dev/*",
    "spec.restartPolicy",
    "spec.subdomain",
    "spec.hostname",
    "spec.setHostnameAsFQDN",
    "spec.terminationGracePeriodSeconds",
    "spec.serviceAccountName",
    "spec.automountServiceAccountToken",
    "spec.containers[*].image",
    "spec.containers[*].command*",
    "spec.containers[*].args*",
)
"""The fields that the operator owns; `image` and some others have their own fields in the spec."""


def lay_over(template: Json, patch: Json, path: str, gpu_resource: str) -> Json:
    """Return a pod template with a user's overlay, as the API server stores it.

    Args:
        template: our template; we own its containers, volumes and environment.
        patch: the user's PodTemplateSpec, which may be partial.
        path: the place of the patch in the manifest, for errors.
        gpu_resource: the name of the resource that the budget counts.

    Raises:
        SpecError: the overlay sets a field that the operator owns, or has a list that cannot be merged;
            names the field.
    """
    if errors := [FieldError(f"{path}.{name}", rule) for name, rule in _unmergeable(patch)]:
        raise SpecError(errors)
    if errors := [
        FieldError(f"{path}.{name}", "is set by the operator: leave it out, or use its field in the spec")
        for name in touched(patch)
        if _is_owned(name, template, gpu_resource)
    ]:
        raise SpecError(errors)
    merged: Json = canonical(_merge(template, patch, ""))
    return merged


def _unmergeable(patch: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and rule of every list that is merged by a key and has entries without it, or twice."""
    if isinstance(patch, Mapping):
        for name, value in patch.items():
            yield from _unmergeable(value, f"{path}.{name}" if path else str(name))
    elif isinstance(patch, list) and (key := MERGE_KEYS.get(_last(path))):
        seen: set[str | int] = set()
        for number, entry in enumerate(patch):
            found = entry.get(key) if isinstance(entry, Mapping) else None
            if not isinstance(found, str | int):
                yield f"{path}[{number}]", f"must be a map with {key}: entries are merged by it"
            elif found in seen:
                yield f"{path}[{number}].{key}", f"{found} appears twice: merge the two entries"
            else:
                seen.add(found)
                yield from _unmergeable(entry, f"{path}[{found}]")


def touched(patch: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every value that a patch sets: `spec.containers[engine].command`."""
    if isinstance(patch, Mapping) and patch:
        for name, value in patch.items():
            yield from touched(value, f"{path}.{name}" if path else str(name))
    elif isinstance(patch, list) and (key := MERGE_KEYS.get(_last(path))):
        for entry in patch:
            inner = {k: v for k, v in entry.items() if k != key}
            yield from touched(inner, f"{path}[{entry[key]}]") if inner else iter((f"{path}[{entry[key]}]",))
    else:
        yield path


def _is_owned(path: str, template: Json, gpu_resource: str) -> bool:
    containers = {each["name"]: each for each in template["spec"]["containers"]}
    for pattern in OWNED:
        if fnmatchcase(path, pattern.replace("[", "[[]")) and _container(path) in {None, *containers}:
            return True
    for name, container in containers.items():
        root = f"spec.containers[{name}]"
        env = {each["name"] for each in container.get("env", ())}
        mounts = {each["mountPath"] for each in container.get("volumeMounts", ())}
        if any(path.startswith(f"{root}.env[{each}]") for each in env):
            return True
        if any(path.startswith(f"{root}.volumeMounts[{each}]") for each in mounts):
            return True
        if path in (f"{root}.resources.requests.{gpu_resource}", f"{root}.resources.limits.{gpu_resource}"):
            return True
    volumes = {each["name"] for each in template["spec"].get("volumes", ())}
    return any(path.startswith(f"spec.volumes[{each}]") for each in volumes)


def _container(path: str) -> str | None:
    """Return the container that a path is in; None if it is in none."""
    if not path.startswith("spec.containers["):
        return None
    return path.removeprefix("spec.containers[").partition("]")[0]


def _merge(under: Any, over: Any, name: str) -> Any:
    if isinstance(under, Mapping) and isinstance(over, Mapping):
        merged = dict(under)
        for key, value in over.items():
            merged[key] = _merge(under[key], value, key) if key in under else value
        return merged
    if isinstance(under, list) and isinstance(over, list):
        if name in APPENDED:
            return under + [each for each in over if each not in under]
        if key := MERGE_KEYS.get(name):
            return _merge_by(key, under, over)
    return over


def _merge_by(key: str, under: list[Any], over: list[Any]) -> list[Any]:
    patches = {each[key]: each for each in over}
    merged = [_merge(each, patches.pop(each[key], {}), "") for each in under]
    return [*merged, *patches.values()]


def _last(path: str) -> str:
    return path.rpartition(".")[2]
