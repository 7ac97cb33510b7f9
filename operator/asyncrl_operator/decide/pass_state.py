"""What one pass decides on: job, status, cluster and time, and what follows directly from them. Pure."""

from dataclasses import dataclass

from asyncrl_api.job import Spec
from asyncrl_api.job_status import AttemptStatus, ClocksStatus, Status
from asyncrl_api.report import Report
from asyncrl_operator.decide import attempts, reasons
from asyncrl_operator.decide.observed import Observed, Pod
from asyncrl_operator.decide.status import JobObject, Memory, heard_at
from asyncrl_operator.layout import num_trainer_pods


@dataclass(frozen=True)
class PassState:
    """Everything that one pass knows."""

    job: JobObject
    status: Status
    """The status as the last pass left it."""
    seen: Observed
    now: float
    """Unix time, seconds."""

    @property
    def spec(self) -> Spec:
        return self.job.spec

    @property
    def memory(self) -> Memory:
        """What the last pass remembered for this one."""
        status = self.status
        return Memory(status.attempt, status.split, status.clocks or ClocksStatus(), status.start_time)

    @property
    def ours(self) -> list[Pod]:
        """The pods of this job, including those that have ended."""
        return [pod for pod in self.seen.pods if pod.is_ours]

    @property
    def alive(self) -> list[Pod]:
        """The pods of this job that may still run."""
        return [pod for pod in self.ours if pod.is_alive]

    def alive_in(self, group: str) -> list[Pod]:
        return [pod for pod in self.alive if pod.group == group]

    def claim(self, group: str, least: int) -> int:
        """Return the GPUs that count as taken by a group: those of its pods, or `least` if that is more.

        Args:
            least: the GPUs that the group is about to have.
        """
        return max(least, sum(pod.gpus for pod in self.alive_in(group)))

    @property
    def replicas(self) -> int:
        """The number of engines that the StatefulSet is set to have."""
        return self.seen.rollout.replicas if self.seen.rollout is not None else 0

    @property
    def num_ready_engines(self) -> int:
        return sum(pod.is_ready and pod.deleted_at is None for pod in self.alive_in("rollout"))

    @property
    def is_messaging_ready(self) -> bool:
        is_shared = self.spec.messaging.mode == "Shared"
        return is_shared or any(pod.is_ready for pod in self.alive_in("messaging"))

    @property
    def report(self) -> Report | None:
        """The report of the present attempt. An earlier attempt may still write one, which is ignored."""
        report, attempt = self.seen.report, self.status.attempt
        is_present = report is not None and attempt is not None and report.attempt == attempt.number
        return report if is_present else None

    def heard_at(self, attempt: AttemptStatus) -> float | None:
        """When an attempt last reported, or else began to run, by the operator's clock; None before that."""
        began = attempts.began_at(attempt, self.seen)
        if began is None or self.report is None or self.report.attempt != attempt.number:
            return began
        return max(began, heard_at(self.status, self.report, self.now))

    @property
    def is_suspending(self) -> bool:
        """Whether a suspension has begun and is not complete. The job may not go on until it is."""
        condition = self.status.condition("Suspended")
        return condition is not None and condition.reason == reasons.SUSPENDING

    def trainer_runs(self, attempt: AttemptStatus | None) -> bool:
        """Whether all pods of an attempt are running, and thus have their GPUs."""
        if attempt is None or attempt.next_retry_time is not None:
            return False
        pods = attempts.pods_of(attempt, self.seen)
        running = sum(pod.phase == "Running" and pod.deleted_at is None for pod in pods)
        return running >= num_trainer_pods(self.spec, attempt.gpus)
