"""The planner against a cluster in memory, with everything that can happen in any order.

Held at every moment: no pass claims more than the budget (or, once that was lowered, more than before);
a verdict stays. Held at the end, once nothing more goes wrong: it comes to rest, a second pass does nothing,
a suspended job has no pod.
"""

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncrl_api.parsing import parse_spec
from support.cluster.model_cluster import ModelCluster, make_spec

CODES = st.sampled_from([0, 1, 65, 75, 137, 143])


class PlannerMachine(RuleBasedStateMachine):
    cluster: ModelCluster

    @initialize(
        suspend=st.booleans(), resize=st.sampled_from(["AtCheckpoint", "Never"]), total=st.integers(2, 12)
    )
    def begin(self, suspend: bool, resize: str, total: int) -> None:
        self.cluster = ModelCluster(
            make_spec(
                suspend=suspend,
                gpuBudget={"total": total, "auto": {"cooldownSeconds": 60, "trainerResize": resize}},
                trainer={"gpusPerNode": 2},
                failurePolicy={
                    "trainer": {"maxRestarts": 2, "maxDisruptions": 3},
                    "deadNodeForceDeleteSeconds": 60,
                },
            )
        )
        self.verdict: str | None = None

    # -- the operator and the cluster

    @rule(dies_after=st.none() | st.integers(0, 9))
    def operator_passes(self, dies_after: int | None) -> None:
        cluster = self.cluster
        claimed, total = cluster.claimed, cluster.spec.gpu_budget.total
        cluster.pass_once(dies_after)
        assert cluster.claimed <= max(total, claimed), (cluster.claimed, total, claimed)

    @rule()
    def controllers_act(self) -> None:
        self.cluster.settle()

    @rule(seconds=st.integers(1, 400))
    def time_passes(self, seconds: int) -> None:
        self.cluster.now += seconds

    @rule(rounds=st.integers(2, 6), seconds=st.integers(1, 40))
    def all_is_calm_for_a_while(self, rounds: int, seconds: int) -> None:
        """Without this rule a job would hardly ever run."""
        for _ in range(rounds):
            self.operator_passes(None)
            self.cluster.settle()
            self.cluster.now += seconds

    # -- faults

    @rule(code=CODES, reason=st.sampled_from(["Error", "OOMKilled"]))
    def trainer_exits(self, code: int, reason: str) -> None:
        self.cluster.trainer_exits(code, reason)

    @rule(index=st.integers(0, 20), data=st.sampled_from(["delete", "disrupt", "unready"]))
    def something_befalls_a_pod(self, index: int, data: str) -> None:
        pods = sorted(self.cluster.pods)
        if not pods:
            return
        pod = self.cluster.pods[pods[index % len(pods)]]
        if data == "delete":
            self.cluster.delete_pod(pod.name)
        elif data == "disrupt":
            self.cluster.pods[pod.name] = replace(pod, disruption="EvictionByEvictionAPI")
        else:
            self.cluster.pods[pod.name] = replace(pod, is_ready=False)

    @rule(index=st.integers(0, 3))
    def a_node_dies(self, index: int) -> None:
        if f"n{index}" in self.cluster.nodes:
            self.cluster.node_dies(f"n{index}")

    @rule(index=st.integers(0, 3))
    def a_node_comes_back(self, index: int) -> None:
        self.cluster.node_comes_back(f"n{index}")

    @precondition(lambda self: self.cluster.jobs)
    @rule()
    def the_trainer_job_is_deleted_by_hand(self) -> None:
        self.cluster.delete_job(sorted(self.cluster.jobs)[-1])

    # -- the user and the trainer

    @rule(total=st.integers(2, 12))
    def budget_changes(self, total: int) -> None:
        self.cluster.edit(gpuBudget={"total": total})

    @rule(suspend=st.booleans())
    def suspend_changes(self, suspend: bool) -> None:
        self.cluster.edit(suspend=suspend)

    @rule(rate=st.sampled_from([1e-6, 2e-6]), args=st.sampled_from([[], ["--x"]]))
    def fields_change(self, rate: float, args: list[str]) -> None:
        self.cluster.edit(training={"learningRate": rate}, rollout={"engine": {"args": args}})

    @rule(held_out=st.booleans(), is_penalized=st.booleans())
    def blocks_come_and_go(self, held_out: bool, is_penalized: bool) -> None:
        values = {**self.cluster.values, "algorithm": {**self.cluster.values["algorithm"]}}
        for below, name, block, is_there in (
            (values, "evaluation", {"source": "file:///e"}, held_out),
            (values["algorithm"], "overlongPenalty", {}, is_penalized),
        ):
            below.pop(name, None)
            below |= {name: block} if is_there else {}
        self.cluster.replace(parse_spec(values))

    @rule(what=st.sampled_from(["attempts", "templates"]))
    def configurations_are_deleted_by_hand(self, what: str) -> None:
        (self.cluster.attempts_began if what == "attempts" else self.cluster.templates_began).clear()

    @rule(
        wait=st.sampled_from([0.0, 0.1, 0.5]), load=st.sampled_from([None, 0.3, 1.0]), step=st.integers(0, 9)
    )
    def trainer_reports(self, wait: float, load: float | None, step: int) -> None:
        self.cluster.reports(wait_share=wait, rollout_load=load, step=step)

    # -- what always holds

    @invariant()
    def a_verdict_stays(self) -> None:
        if not hasattr(self, "cluster"):
            return
        finished = self.cluster.status.condition("Finished")
        if self.verdict is not None:
            assert self.cluster.status.phase == self.verdict
        elif finished is not None and finished.status == "True":
            self.verdict = self.cluster.status.phase

    @invariant()
    def conditions_do_not_contradict(self) -> None:
        if not hasattr(self, "cluster"):
            return
        status = self.cluster.status
        assert not (status.is_true("Reconciling") and status.is_true("Stalled"))
        assert not (status.is_true("Complete") and status.is_true("Failed"))
        if status.is_true("Suspended"):
            assert status.phase == "Suspended"

    def teardown(self) -> None:
        if not hasattr(self, "cluster"):
            return
        cluster = self.cluster
        cluster.node_comes_back("n0")  # pods on the others, if they are dead, are never confirmed to be gone
        for pod in list(cluster.pods.values()):
            cluster.pods[pod.name] = replace(pod, disruption="", is_ready=pod.phase == "Running")
        cluster.run_until_still()
        assert cluster.is_at_rest, cluster.status
        assert cluster.held <= cluster.spec.gpu_budget.total or cluster.status.is_true("Finished")
        if cluster.status.phase != "Running":
            assert not any(pod.is_alive for pod in cluster.pods.values())
        outcome = cluster.decide()
        assert outcome.status == cluster.status and not outcome.deletions and not outcome.events


PlannerMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, suppress_health_check=list(HealthCheck)
)
TestPlannerMachine = PlannerMachine.TestCase
