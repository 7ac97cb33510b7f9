"""What stands in a job's way, and how seldom the API server is asked for it."""

from typing import Any, cast

from asyncrl_api.job import Spec
from asyncrl_api.marks import merge
from asyncrl_operator.api_server.cluster import Cluster
from asyncrl_operator.decide.observed import Observed, Problem, StatefulSet
from asyncrl_operator.obstacles import EVENTS_SHARE, PODS_SECONDS, Obstacles
from asyncrl_operator.workqueue import Key
from support.cluster.model_cluster import SMALL, make_spec

SHORT = Observed(rollout=StatefulSet("gsm8k-rollout", 2, "template"))
"""Two engines are ordered, and no pod is there."""
REFUSED = {("StatefulSet", "gsm8k-rollout"): "pods are forbidden: exceeded quota: few"}


class Answers:
    """Stands for an API server with Events of refused pods, which takes its time to read them."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.takes = 0.0
        self.num_asked = 0

    async def served_problem(self) -> Problem | None:
        return None

    async def last_events(self, namespace: str, reason: str) -> dict[tuple[str, str], str]:
        assert reason == "FailedCreate"
        self.num_asked += 1
        self.now += self.takes
        return REFUSED if namespace == "team" else {}


def make_obstacles() -> tuple[Obstacles, Answers]:
    answers = Answers()
    return Obstacles(cast(Cluster, cast(Any, answers)), lambda: answers.now), answers


async def reason_of(obstacles: Obstacles, name: str = "gsm8k", namespace: str = "team") -> str:
    found = await obstacles.find(Key(namespace, name), "uid", 1, make_spec(), SHORT)
    return found.blocked.reason if found.blocked is not None else ""


async def test_pods_that_are_missing_for_a_while_are_asked_for() -> None:
    obstacles, answers = make_obstacles()
    assert await reason_of(obstacles) == "" and answers.num_asked == 0
    answers.now += PODS_SECONDS
    assert await reason_of(obstacles) == "QuotaExceeded"


async def test_what_lies_in_a_free_form_field_is_looked_at() -> None:
    obstacles, _ = make_obstacles()
    spec = Spec.model_validate(merge(SMALL, {"trainer": {"deepspeed": {"config": {"fp16": {}}}}}))
    found = await obstacles.find(Key("team", "gsm8k"), "uid", 1, spec, SHORT)
    assert found.problem is not None and found.problem.reason == "InvalidSpec"
    assert found.problem.message.startswith("trainer.deepspeed.config.fp16 is set, but the trainer decides")


async def test_one_question_serves_all_jobs_of_a_namespace() -> None:
    obstacles, answers = make_obstacles()
    for name in ("gsm8k", "other"):
        await reason_of(obstacles, name)
    answers.now += PODS_SECONDS
    for name in ("gsm8k", "other"):
        assert await reason_of(obstacles, name) == "QuotaExceeded"
    assert answers.num_asked == 1
    await reason_of(obstacles, namespace="elsewhere")
    answers.now += PODS_SECONDS
    assert await reason_of(obstacles, namespace="elsewhere") == ""
    assert answers.num_asked == 2


async def test_who_answers_slowly_is_asked_more_seldom() -> None:
    obstacles, answers = make_obstacles()
    answers.takes = 3.0
    await reason_of(obstacles)
    answers.now += PODS_SECONDS
    await reason_of(obstacles)
    answers.now += 3.0 / EVENTS_SHARE - 1
    await reason_of(obstacles)
    assert answers.num_asked == 1
    answers.now += PODS_SECONDS
    await reason_of(obstacles)
    assert answers.num_asked == 2
