"""A cluster in memory for the planner: its controllers, kubelets and nodes, as far as it matters.

Everything happens one step at a time and only when a test says so; it decides what happens between which two
passes of the operator.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from asyncrl_api.job import Spec
from asyncrl_api.job_status import Status
from asyncrl_api.marks import merge
from asyncrl_api.parsing import parse_spec
from asyncrl_api.report import Report
from asyncrl_api.times import to_text
from asyncrl_operator.decide.desired import DeleteChildren, DeletePod, DeleteTrainerJob, Event, Outcome
from asyncrl_operator.decide.edits import rollout_hash
from asyncrl_operator.decide.observed import (
    ContainerEnd,
    Node,
    Observed,
    Pod,
    Problem,
    StatefulSet,
    TrainerJob,
    Values,
)
from asyncrl_operator.decide.planner import plan
from asyncrl_operator.decide.status import JobObject
from asyncrl_operator.layout import gpus_per_replica, num_trainer_pods

NAME, UID = "gsm8k", "0b5e"
GRACE = 30.0

SMALL: dict[str, Any] = {
    "model": {"source": "file:///m"},
    "dataset": {"source": "file:///d"},
    "reward": {"type": "Math"},
    "training": {"batchSize": 4, "maxSteps": 9},
    "gpuBudget": {"total": 8},
    "checkpoint": {"location": {"claimName": "c"}},
}


def make_spec(**overrides: Any) -> Spec:
    """Return a small spec; `overrides` are merged into it."""
    return parse_spec(merge(SMALL, overrides))


@dataclass
class ModelCluster:
    """One job, its children, and four nodes."""

    spec: Spec = field(default_factory=make_spec)
    now: float = 1_800_000_000.0
    generation: int = 1
    status: Status = field(default_factory=Status)
    jobs: dict[str, TrainerJob] = field(default_factory=dict)
    job_gpus: dict[str, int] = field(default_factory=dict)
    rollout: StatefulSet | None = None
    messaging: StatefulSet | None = None
    pods: dict[str, Pod] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=lambda: {f"n{i}": Node(True, 0.0) for i in range(4)})
    report: Report | None = None
    attempts_began: dict[int, Values] = field(default_factory=dict)
    templates_began: dict[str, Values] = field(default_factory=dict)
    """The contents of the run configurations, which never change."""
    problem: Problem | None = None
    has_children: bool = False
    events: list[Event] = field(default_factory=list)
    num_made: int = 0

    # -- the operator

    def observe(self) -> Observed:
        return Observed(
            trainer_jobs=tuple(self.jobs.values()),
            rollout=self.rollout,
            messaging=self.messaging,
            pods=tuple(self.pods.values()),
            nodes=self.nodes,
            report=self.report,
            attempts_began=dict(self.attempts_began),
            templates_began=dict(self.templates_began),
            problem=self.problem,
            has_children=self.has_children,
        )

    def decide(self) -> Outcome:
        return plan(JobObject(NAME, UID, self.generation, self.spec), self.status, self.observe(), self.now)

    def pass_once(self, dies_after: int | None = None) -> Outcome:
        """Run one pass.

        Args:
            dies_after: the number of writes after which the operator is killed; None: it is not killed.
        """
        outcome = self.decide()
        writes = self._writes(outcome)
        for write in writes[:dies_after]:
            write()
        if dies_after is None or dies_after >= len(writes):
            self.events += outcome.events
        return outcome

    def _writes(self, outcome: Outcome) -> list[Callable[[], object]]:
        def store() -> None:
            self.status = outcome.status

        writes: list[Callable[[], object]] = [store] if outcome.write_status_first else []
        desired, values = outcome.desired, self.values
        if desired is not None:
            if desired.shared:
                writes.append(lambda: setattr(self, "has_children", True))
            if (broker := desired.messaging_replicas) is not None:
                writes.append(lambda: setattr(self, "messaging", StatefulSet(f"{NAME}-nats", broker)))
            if (attempt := desired.trainer) is not None:
                writes.append(lambda: self.attempts_began.setdefault(attempt.number, values))
                writes.append(lambda: self._make_job(attempt.number, attempt.gpus))
            if (replicas := desired.rollout_replicas) is not None:
                template = rollout_hash(self.spec)
                if desired.shared:
                    writes.append(lambda: self.templates_began.setdefault(template, values))
                elif self.rollout is not None:  # at rest it is scaled alone
                    template = self.rollout.template
                rollout = StatefulSet(f"{NAME}-rollout", replicas, template)
                writes.append(lambda: setattr(self, "rollout", rollout))
        writes += [partial(self._delete, each) for each in outcome.deletions]
        if desired is not None and desired.shared:
            number = desired.trainer.number if desired.trainer is not None else 0
            writes.append(partial(self._drop_outlived, number, rollout_hash(self.spec)))
        return [*writes, store]

    def _drop_outlived(self, attempt: int, template: str) -> None:
        """Delete the configurations that no pod will read any more."""
        attempts = {attempt, *(job.attempt for job in self.jobs.values())}
        templates = {template, *(pod.template for pod in self.pods.values() if pod.is_alive)}
        templates |= {self.rollout.template} if self.rollout is not None else set()
        self.attempts_began = {n: began for n, began in self.attempts_began.items() if n in attempts}
        self.templates_began = {n: began for n, began in self.templates_began.items() if n in templates}

    def _make_job(self, attempt: int, gpus: int) -> None:
        name = f"{NAME}-trainer-{attempt}"
        if name not in self.jobs:
            self.jobs[name] = TrainerJob(name, attempt)
            self.job_gpus[name] = gpus

    def _delete(self, deletion: DeletePod | DeleteTrainerJob | DeleteChildren) -> None:
        if isinstance(deletion, DeleteChildren):
            self.jobs, self.rollout, self.messaging, self.has_children = {}, None, None, False
            self.attempts_began, self.templates_began = {}, {}
            for name in list(self.pods):
                self.delete_pod(name)
        elif isinstance(deletion, DeleteTrainerJob):
            self.delete_job(deletion.name)
        elif (pod := self.pods.get(deletion.name)) is not None and pod.uid == deletion.uid:
            if deletion.is_forced:
                del self.pods[deletion.name]
            else:
                self.delete_pod(deletion.name)

    # -- the cluster's controllers, kubelets and nodes

    def settle(self) -> None:
        """Let controllers and kubelets do everything that there is to do."""
        self._run_jobs()
        self._run_set(self.messaging, "messaging", 0)
        self._run_set(self.rollout, "rollout", gpus_per_replica(self.spec))
        for pod in list(self.pods.values()):
            self._run_kubelet(pod)

    def _run_jobs(self) -> None:
        for job in list(self.jobs.values()):
            pods = [
                pod for pod in self.pods.values() if pod.group == "trainer" and pod.attempt == job.attempt
            ]
            if job.is_deleting:
                if not pods:
                    del self.jobs[job.name]
                continue
            wanted = num_trainer_pods(self.spec, self.job_gpus[job.name])
            if any(pod.phase == "Failed" or pod.deleted_at is not None for pod in pods):
                self.jobs[job.name] = replace(job, is_failed=True, message="BackoffLimitExceeded")
                for pod in pods:
                    if pod.is_alive:
                        self.delete_pod(pod.name)
            elif len(pods) == wanted and all(pod.phase == "Succeeded" for pod in pods):
                self.jobs[job.name] = replace(job, is_complete=True)
            elif not job.is_failed and not job.is_complete:
                for index in range(len(pods), wanted):
                    gpus = self.job_gpus[job.name] // wanted
                    self._make_pod(f"{job.name}-{index}", "trainer", gpus, attempt=job.attempt)

    def _run_set(self, wanted: StatefulSet | None, group: str, gpus: int) -> None:
        pods = {pod.name for pod in self.pods.values() if pod.group == group}
        names = [f"{wanted.name}-{index}" for index in range(wanted.replicas)] if wanted else []
        for name in pods - set(names):
            self.delete_pod(name)
        for name in names:
            if name not in self.pods:
                self._make_pod(name, group, gpus, template=wanted.template if wanted else "")

    def _make_pod(self, name: str, group: Any, gpus: int, attempt: int = 0, template: str = "") -> None:
        self.num_made += 1
        self.pods[name] = Pod(
            name,
            f"u{self.num_made}",
            group,
            attempt=attempt,
            template=template,
            gpus=gpus,
            created_at=self.now,
            ready_changed_at=self.now,
        )

    def _run_kubelet(self, pod: Pod) -> None:
        if not pod.node:
            alive = sorted(name for name, node in self.nodes.items() if node.is_ready)
            if alive and pod.deleted_at is None:
                pod = replace(pod, node=alive[hash(pod.uid) % len(alive)])
        node = self.nodes.get(pod.node)
        if pod.node and (node is None or not node.is_ready):
            self.pods[pod.name] = pod if pod.deleted_at else replace(pod, deleted_at=self.now + GRACE)
            return  # the taint manager deletes it, nobody confirms
        if pod.deleted_at is not None:
            del self.pods[pod.name]
        elif pod.phase == "Pending" and pod.node and not pod.waiting:
            self.pods[pod.name] = replace(pod, phase="Running", is_ready=True, ready_changed_at=self.now)
        else:
            self.pods[pod.name] = pod

    # -- what happens to it

    def edit(self, **overrides: Any) -> None:
        """Change the spec, as `kubectl apply` would."""
        self.replace(parse_spec(merge(self.values, overrides)))

    def replace(self, spec: Spec) -> None:
        """Replace the spec with another one, as `kubectl replace` would."""
        self.spec = spec
        self.generation += 1

    def delete_pod(self, name: str) -> None:
        pod = self.pods[name]
        if pod.deleted_at is None:
            self.pods[name] = replace(pod, deleted_at=self.now + GRACE)

    def delete_job(self, name: str) -> None:
        job = self.jobs.get(name)
        if job is None:
            return
        self.jobs[name] = replace(job, is_deleting=True)
        for pod in list(self.pods.values()):
            if pod.group == "trainer" and pod.attempt == job.attempt:
                self.delete_pod(pod.name)

    def trainer_exits(self, code: int, reason: str = "Error") -> None:
        """End the running trainer: with code 0 all its pods end, with another code only the first."""
        pods = [pod for pod in self.pods.values() if pod.group == "trainer" and pod.phase == "Running"]
        for pod in pods if code == 0 else pods[:1]:
            self.pods[pod.name] = replace(
                pod,
                phase="Failed" if code else "Succeeded",
                is_ready=False,
                ends=(ContainerEnd("trainer", code, reason),),
            )

    def node_dies(self, name: str) -> None:
        self.nodes[name] = Node(False, self.now)

    def node_comes_back(self, name: str) -> None:
        self.nodes[name] = Node(True, self.now)

    def reports(self, **values: Any) -> None:
        """Let the present attempt report."""
        number = self.status.attempt.number if self.status.attempt else 1
        base = {"attempt": number, "step": 1, "max_steps": 9, "state": "Training", "time": to_text(self.now)}
        self.report = Report.model_validate(base | values)

    def run_until_still(self, rounds: int = 60) -> None:
        """Run until nothing happens any more, letting time pass whenever the operator waits for it.

        Raises:
            AssertionError: it does not come to rest.
        """
        for _ in range(rounds):
            before = self.snapshot()
            outcome = self.pass_once()
            self.settle()
            if self.snapshot() == before:
                if outcome.wake_at is None or self.is_at_rest:
                    return
                self.now = max(self.now + 1, outcome.wake_at)
        raise AssertionError(f"it does not come to rest: {self.status}")

    @property
    def phase(self) -> str:
        """The status, parsed anew each time."""
        return str(self.status.phase)

    @property
    def is_at_rest(self) -> bool:
        """Whether only its user or a fault can move the job on, whatever clocks still run."""
        is_settled = self.status.phase in ("Running", "Suspended", "Succeeded", "Failed")
        return is_settled and not any(pod.deleted_at for pod in self.pods.values())

    def snapshot(self) -> Mapping[str, Any]:
        children = ("jobs", "rollout", "messaging", "pods", "attempts_began", "templates_began")
        names = ("status", *children, "has_children")
        return {name: dict(v) if isinstance(v := getattr(self, name), dict) else v for name in names}

    # -- what is seen

    @property
    def values(self) -> Values:
        """The spec as the API server holds it: with all defaults."""
        return self.spec.model_dump(by_alias=True, exclude_none=True)

    @property
    def held(self) -> int:
        return sum(pod.gpus for pod in self.pods.values() if pod.is_alive)

    @property
    def claimed(self) -> int:
        """The GPUs that pods hold, or will hold once the controllers have acted."""
        trainers = sum(pod.gpus for pod in self.pods.values() if pod.group == "trainer" and pod.is_alive)
        rollouts = sum(pod.gpus for pod in self.pods.values() if pod.group == "rollout" and pod.is_alive)
        jobs = [
            self.job_gpus[job.name]
            for job in self.jobs.values()
            if not (job.is_deleting or job.is_failed or job.is_complete)
        ]
        replicas = self.rollout.replicas * gpus_per_replica(self.spec) if self.rollout else 0
        return max(trainers, sum(jobs)) + max(rollouts, replicas)

    def condition(self, kind: str) -> str:
        """Return "True/Reason" of a condition; "absent"."""
        found = self.status.condition(kind)
        return f"{found.status}/{found.reason}" if found else "absent"
