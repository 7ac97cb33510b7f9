"""RunConfig, which every process of a job is given, and the fields that change while the job runs."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import Spec
from asyncrl_api.marks import FieldNode, merge, split_live, tree
from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_api.parsing import FieldError, SpecError, parse_spec
from asyncrl_api.spec_views import FrozenSpec, LiveSpec
from asyncrl_api.wire import Wire

SGLANG_PYTHON = "ASYNCRL_SGLANG_PYTHON"
"""The environment variable with the path of the Python that has SGLang, if it is not ours (pins differ)."""

DISRUPTION_FILE = "disruption"
"""The file beside the live values in which the operator says what is about to end the trainer's pods; it is
empty if nothing is announced."""


class RunConfig(Wire):
    """What every process of a job is given: one file that does not change during an attempt."""

    namespace: str
    name: str
    uid: str
    spec: Spec
    nats: NatsAddress
    job_folder: Path
    """The job's folder on its claim; it holds checkpoints/, export/, ledger.jsonl and metrics.jsonl."""
    live_file: Path
    """The file with the current values of the fields marked L; the trainer reads it again and again."""
    report_file: Path
    report_config_map: str = ""
    """The ConfigMap whose key `report` is a copy of the report, in a cluster; empty elsewhere."""
    model_cache: Path
    import_paths: tuple[Path, ...] = ()
    """The folders from which user code is imported."""

    @property
    def names(self) -> JobNames:
        if self.spec.messaging.mode == "Shared":
            prefix = self.spec.messaging.shared.subject_prefix
            return JobNames.on_shared_server(self.namespace, self.name, self.uid, prefix)
        return JobNames.on_own_server(self.namespace, self.name)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file that `save` wrote.

        Raises:
            ExitError: the file is missing or does not parse; names the path.
        """
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ExitError(ExitCode.REFUSED, f"run configuration {path}: {error}") from error

    def save(self, path: Path) -> None:
        """Replace the file atomically, so that a kill never leaves half of it."""
        scratch = path.with_suffix(".tmp")
        scratch.write_text(self.model_dump_json(by_alias=True, exclude_none=True, indent=1))
        scratch.replace(path)


def live_values(spec: Spec) -> dict[str, Any]:
    """Return the fields of `spec` that are marked L, nested as in the manifest."""
    return split_live(spec)[0]


def with_live_values(spec: Spec, values: dict[str, Any]) -> Spec:
    """Return `spec` with its L fields replaced by `values`; those not in `values` take their defaults.

    Values of an optional block that `spec` lacks, and that has fields of other marks too, are passed over:
    the block as a whole comes with the next attempt.

    Raises:
        SpecError: a value is out of bounds, or a field is not marked L.
    """
    rest = split_live(spec)[1]
    changed = parse_spec(merge(rest, _without_new_blocks(tree(type(spec)), rest, values)))
    rule = "only fields marked L may change while the job runs"
    if others := list(_differences(rest, split_live(changed)[1], "spec")):
        raise SpecError(FieldError(path=path, rule=rule, value=value) for path, value in others)
    return changed


class RunningSpec:
    """The spec of an attempt, as the attempt began with it and with the fields marked L as they are now."""

    def __init__(self, spec: Spec) -> None:
        self._began = self._now = spec

    @property
    def frozen(self) -> FrozenSpec:
        """The fields that do not change while the attempt lasts."""
        return self._began

    @property
    def live(self) -> LiveSpec:
        """The fields that may change at any time; read them anew at every use."""
        return self._now

    def live_values(self) -> dict[str, Any]:
        """Return the fields marked L as they are now, nested as in the manifest."""
        return live_values(self._now)

    def take_over(self, values: Any) -> str:
        """Replace the fields marked L, except for a `training.maxSteps` that would shrink.

        Args:
            values: what a file or a message holds, so perhaps anything that JSON can say.

        Returns:
            What was not taken over, in a sentence; empty if everything was.

        Raises:
            SpecError: a value is out of bounds, or a field is not marked L; nothing is replaced.
        """
        if not isinstance(values, dict):
            raise SpecError([FieldError(path="spec", rule="must be an object of fields", value=values)])
        spec, reached = with_live_values(self._began, values), self._now.training.max_steps
        if spec.training.max_steps >= reached:
            self._now = spec
            return ""
        training = spec.training.model_copy(update={"max_steps": reached})
        self._now = spec.model_copy(update={"training": training})
        return f"spec.training.maxSteps may only grow; it stays {reached}"


def _without_new_blocks(
    nodes: Iterable[FieldNode], rest: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    kept = dict(values)
    for node in nodes:
        is_mixed = "L" in node.mark and node.mark != "L"
        if not is_mixed or not isinstance(kept.get(node.name), dict):
            continue
        if node.is_optional and node.name not in rest:
            del kept[node.name]
        else:
            kept[node.name] = _without_new_blocks(node.children, rest.get(node.name, {}), kept[node.name])
    return kept


def _differences(before: Any, after: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield path and new value of every field that has changed."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(name), after.get(name), f"{path}.{name}")
    elif before != after:
        yield path, after
