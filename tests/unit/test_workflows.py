"""How a sample is made, by the built-in workflows on a session that answers as told and by a user's own."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from asyncrl_api.job import WorkflowSpec
from asyncrl_api.protocols import RewardFailed, Row, Score, Turn
from asyncrl_runtime.contract.imports import ImportFailed
from asyncrl_runtime.rollout.workflows import RETRY_MESSAGE, MultiTurn, SingleTurn, make_workflow


class ScriptedSession:
    """Answers with `answer 1`, `answer 2` ..., scores as told, and remembers everything."""

    def __init__(self, scores: Sequence[Score | Exception], num_answers: int = 99) -> None:
        self.row: Row = {"question": "?"}
        self.prompt = "?"
        self.told: list[str] = []
        self.scored: list[str] = []
        self.num_generated = 0
        self._scores = iter(scores)
        self._num_answers = num_answers

    async def generate(self, max_new_tokens: int | None = None) -> Turn:
        self.num_generated += 1
        if self.num_generated > self._num_answers:
            return Turn("", [], "length")
        return Turn(f"answer {self.num_generated}", [self.num_generated], "stop")

    def tell(self, message: str) -> None:
        self.told.append(message)

    async def score(self, response: str) -> Score:
        self.scored.append(response)
        score = next(self._scores)
        if isinstance(score, Exception):
            raise score
        return score


async def test_a_single_turn_is_one_answer_scored() -> None:
    session = ScriptedSession([Score(0.25, "ignored")])
    assert await SingleTurn().run(session) == 0.25
    assert (session.num_generated, session.scored, session.told) == (1, ["answer 1"], [])


@pytest.mark.parametrize(
    ("rewards", "num_answers", "reward", "num_scored"),
    [
        ([1.0], 99, 1.0, 1),  # right at once
        ([0.0, 1.0], 99, 1.0, 2),
        ([0.5, 2.0], 99, 2.0, 2),  # more than full is full
        ([0.0, 0.1, 0.2], 99, 0.2, 3),  # the turns are used up
        ([0.9, 0.1, 0.2], 99, 0.2, 3),  # the last answer counts, not the best
        ([0.5, 0.4], 2, 0.4, 2),  # the context is full: what was answered counts
        ([0.5], 1, 0.5, 1),
    ],
)
async def test_turns_go_on_until_the_reward_is_full_or_nothing_more_fits(
    rewards: list[float], num_answers: int, reward: float, num_scored: int
) -> None:
    session = ScriptedSession([Score(value, "no") for value in rewards], num_answers)
    assert await MultiTurn(3).run(session) == reward
    assert session.scored == [f"answer {n}" for n in range(1, num_scored + 1)]


async def test_the_verifiers_feedback_is_told_or_a_plain_word_where_there_is_none() -> None:
    session = ScriptedSession([Score(0.0, "carry the one"), Score(0.0), Score(0.0, "never told")])
    await MultiTurn(3).run(session)
    assert session.told == ["carry the one", RETRY_MESSAGE]


@pytest.mark.parametrize("workflow", [SingleTurn(), MultiTurn(3)])
async def test_a_reward_that_failed_is_not_a_zero(workflow: SingleTurn | MultiTurn) -> None:
    with pytest.raises(RewardFailed):
        await workflow.run(ScriptedSession([RewardFailed("timeout")]))


async def test_the_manifest_says_which_built_in() -> None:
    assert isinstance(make_workflow(WorkflowSpec()), SingleTurn)
    workflow = make_workflow(WorkflowSpec(type="MultiTurn", max_turns=2))
    session = ScriptedSession([Score(0.0)] * 9)
    await workflow.run(session)
    assert isinstance(workflow, MultiTurn) and session.num_generated == 2


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of the user's own on the import path."""
    (tmp_path / "user_flows.py").write_text(
        "class Mine:\n"
        "    async def run(self, session):\n"
        "        return 0.75\n"
        "class Idle:\n"
        "    pass\n"
        "class Fussy:\n"
        "    def __init__(self, tools):\n"
        "        pass\n"
        "class Broken:\n"
        "    def __init__(self):\n"
        "        raise OSError('no tools here')\n"
        "LIMIT = 3\n"
    )
    (tmp_path / "broken_flows.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("user_flows", "broken_flows"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("user_code")
async def test_a_class_of_the_users_own_is_made_by_name() -> None:
    workflow = make_workflow(WorkflowSpec(type="Custom", class_name="user_flows:Mine"))
    assert await workflow.run(ScriptedSession([])) == 0.75


@pytest.mark.usefixtures("user_code")
@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("user_flows", "must have the form pkg.module:name"),
        ("nowhere.flows:Mine", "module nowhere.flows cannot be imported: ModuleNotFoundError"),
        ("broken_flows:Mine", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("user_flows:Ours", "user_flows has no Ours"),
        ("user_flows:Idle", r"has no method run\(session\)"),
        ("user_flows:Fussy", "cannot be made without arguments: TypeError: .*'tools'"),
        ("user_flows:Broken", "cannot be made without arguments: OSError: no tools here"),
        ("user_flows:LIMIT", "cannot be made without arguments: TypeError: 'int' object is not callable"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_by_field_value_and_cause(
    reference: str, message: str
) -> None:
    with pytest.raises(ImportFailed, match=f"^spec.workflow.class: '{reference}': .*{message}"):
        make_workflow(WorkflowSpec(type="Custom", class_name=reference))
