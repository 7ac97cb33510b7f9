"""The metrics that the operator exports to Prometheus. All series of a job vanish with it."""

from collections import Counter
from collections.abc import Iterable
from typing import get_args

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client import Counter as Total

from asyncrl_api.job_status import Phase, Status
from asyncrl_api.times import to_seconds
from asyncrl_operator.decide.observed import Observed, Pod
from asyncrl_operator.workqueue import Key

JOB = ("namespace", "job")
TIME_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

Labels = tuple[str, ...]


class Telemetry:
    """The operator's metrics, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._info = self._gauge("asyncrl_job_info", "An AsyncRLJob that exists; always 1.", "uid")
        self._phase = self._gauge("asyncrl_job_phase", "1 for the phase that a job is in.", "phase")
        self._condition = self._gauge("asyncrl_job_condition", "1 while a condition is True.", "condition")
        self._pods = self._gauge("asyncrl_group_pods", "Pods of a job.", "group", "state")
        self._gpus = self._gauge("asyncrl_gpus", "GPUs: budget, allocated or idle.", "group", "kind")
        self._restarts = self._gauge(
            "asyncrl_trainer_restarts_total",
            "Ended attempts of the trainer, by what they count as.",
            "reason",
        )
        self._to_running = self._gauge(
            "asyncrl_job_time_to_running_seconds", "Time from the start of a job until it first ran."
        )
        self._reported = self._gauge(
            "asyncrl_job_report_timestamp_seconds", "When the trainer last reported, as the status shows it."
        )
        self._durations = Histogram(
            "asyncrl_reconcile_duration_seconds",
            "Duration of a pass.",
            buckets=TIME_BUCKETS,
            registry=self.registry,
        )
        self._errors = Total(
            "asyncrl_reconcile_errors_total", "Passes that failed.", ("reason",), registry=self.registry
        )
        self._calls = Total(
            "asyncrl_api_calls_total",
            "Calls of the Kubernetes API.",
            ("verb", "resource", "status"),
            registry=self.registry,
        )
        self._depth = Gauge(
            "asyncrl_queue_depth", "Jobs that wait for a pass, including later ones.", registry=self.registry
        )
        self._signs = Gauge(
            "asyncrl_watch_last_event_timestamp_seconds",
            "When a watch last gave a sign of life, such as a bookmark.",
            ("resource",),
            registry=self.registry,
        )
        self._shown: dict[Key, set[tuple[Gauge, Labels]]] = {}
        self._ran: dict[Key, tuple[str, float]] = {}

    def show(self, key: Key, uid: str, status: Status, seen: Observed) -> None:
        """Show the state of a job after a pass."""
        values: dict[tuple[Gauge, Labels], float] = {(self._info, (uid,)): 1.0}
        for phase in get_args(Phase):
            values[self._phase, (phase,)] = float(phase == status.phase)
        for condition in status.conditions:
            values[self._condition, (condition.type,)] = float(condition.status == "True")
        for (group, state), number in _pod_states(seen.pods).items():
            values[self._pods, (group, state)] = number
        if status.gpus is not None:
            values[self._gpus, ("all", "budget")] = status.gpus.budget
            values[self._gpus, ("all", "idle")] = max(0, status.gpus.budget - status.gpus.allocated)
        for group_status in status.groups:
            values[self._gpus, (group_status.name, "allocated")] = group_status.gpus
        if (attempt := status.attempt) is not None:
            values[self._restarts, ("restart",)] = attempt.restarts
            values[self._restarts, ("disruption",)] = attempt.disruptions
        if (seconds := self._time_to_running(key, uid, status)) is not None:
            values[self._to_running, ()] = seconds
        if status.report_time is not None:
            values[self._reported, ()] = to_seconds(status.report_time)
        for series in self._shown.get(key, set()) - values.keys():
            series[0].remove(*key, *series[1])
        for (gauge, labels), value in values.items():
            gauge.labels(*key, *labels).set(value)
        self._shown[key] = set(values)

    def forget(self, key: Key) -> None:
        """Drop all series of a job that is gone."""
        for gauge, labels in self._shown.pop(key, ()):
            gauge.remove(*key, *labels)
        self._ran.pop(key, None)

    def passed(self, seconds: float) -> None:
        self._durations.observe(seconds)

    def failed(self, reason: str) -> None:
        self._errors.labels(reason).inc()

    def called(self, verb: str, resource: str, status: int) -> None:
        self._calls.labels(verb, resource, str(status)).inc()

    def queue_depth(self, depth: int) -> None:
        self._depth.set(depth)

    def watches(self, signs: Iterable[tuple[str, float]]) -> None:
        """Show for each watch when it last gave a sign of life, in Unix time."""
        for resource, at in signs:
            self._signs.labels(resource).set(at)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, (*JOB, *labels), registry=self.registry)

    def _time_to_running(self, key: Key, uid: str, status: Status) -> float | None:
        """Return how long the job took to run first; the condition tells when, as long as it still holds."""
        known = self._ran.get(key)
        if known is None or known[0] != uid:
            running = status.condition("Running")
            is_first = status.attempt is not None and status.attempt.number == 1
            if running is None or running.status != "True" or not is_first or status.start_time is None:
                return None
            seconds = to_seconds(running.last_transition_time) - to_seconds(status.start_time)
            known = self._ran[key] = (uid, seconds)
        return known[1]


def _pod_states(pods: Iterable[Pod]) -> Counter[tuple[str, str]]:
    """Count pods by group and state; the state is Ready, or else the phase."""
    return Counter((pod.group, "Ready" if pod.is_ready else pod.phase) for pod in pods if pod.is_ours)
