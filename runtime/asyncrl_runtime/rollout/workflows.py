"""How a sample is made: the built-in workflows, and the user's own by name. See protocols.Workflow."""

from asyncrl_api.job import WorkflowSpec
from asyncrl_api.protocols import Session, Workflow
from asyncrl_runtime.contract.imports import ImportFailed, load_object

RETRY_MESSAGE = "That is not correct. Try again."


class SingleTurn:
    """Takes one answer and scores it."""

    async def run(self, session: Session) -> float:
        turn = await session.generate()
        return (await session.score(turn.text)).reward


class MultiTurn:
    """Lets the policy answer until the reward is full or the turns are used up, with the verifier's feedback.

    The reward of the sample is that of its last answer.
    """

    def __init__(self, max_turns: int, full_reward: float = 1.0) -> None:
        self._max_turns = max_turns
        self._full_reward = full_reward

    async def run(self, session: Session) -> float:
        turn = await session.generate()
        score = await session.score(turn.text)
        for _ in range(self._max_turns - 1):
            if score.reward >= self._full_reward:
                break
            session.tell(score.feedback or RETRY_MESSAGE)
            turn = await session.generate()
            if not turn.token_ids:
                break  # the context is full
            score = await session.score(turn.text)
        return score.reward


def make_workflow(spec: WorkflowSpec) -> Workflow:
    """Return the workflow that a manifest names.

    Raises:
        ImportFailed: the class cannot be imported or instantiated, or has no `run`.
    """
    if spec.type == "SingleTurn":
        return SingleTurn()
    if spec.type == "MultiTurn":
        return MultiTurn(spec.max_turns)
    assert spec.class_name is not None
    factory = load_object(spec.class_name, "spec.workflow.class")
    try:
        workflow: Workflow = factory()
    except Exception as error:  # user code may raise anything
        raise ImportFailed(
            f"spec.workflow.class: {spec.class_name!r}: cannot be made without arguments: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(workflow, "run", None)):
        raise ImportFailed(f"spec.workflow.class: {spec.class_name!r}: has no method run(session)")
    return workflow
