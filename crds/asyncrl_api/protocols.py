"""The signatures that users implement: reward, workflow, data set factory, model factory.

A manifest names them as `pkg.module:name`. They are structural: nothing needs to inherit from the
protocols, and nothing of asyncrl needs to be imported, except `Score` by a reward that gives feedback.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Row = Mapping[str, Any]
"""One line of the data set. Values are what JSON can hold; they travel with the ticket to the worker."""


class Score(NamedTuple):
    """What a verifier says of a response."""

    reward: float
    feedback: str = ""
    """What a multi-turn workflow tells the policy before its next attempt."""


class Reward(Protocol):
    """`spec.reward.function`: scores one response. Runs in a process of its own, several at a time.

    May be slow, may block, may raise: a call that raises, returns no finite number, or outlasts
    `spec.reward.timeoutSeconds` is repeated up to `maxAttempts` times, after which the sample leaves
    its group. It never becomes a reward of zero by error.
    """

    def __call__(self, prompt: str, response: str, row: Row, /) -> float | Score:
        """Return the reward of `response`.

        Args:
            prompt: the row's prompt field as text, without chat template.
            response: the decoded output of the (last) turn without its end-of-sequence token; an
                answer cut by `maxNewTokens` is passed as it is.
            row: the whole row, for the reference answer and whatever else the data set holds.
        """
        ...


class Turn(NamedTuple):
    """One answer of the policy within a sample."""

    text: str
    """Decoded without the end-of-sequence token."""
    token_ids: Sequence[int]
    finish_reason: str
    """`stop` (end-of-sequence or a stop token) or `length`."""


class Session(Protocol):
    """One sample of a prompt group, as a workflow sees it.

    It owns the token sequence: every `generate` continues it and records log-probs and policy
    versions, every `tell` adds tokens that are not trained on. A response is never tokenized again.

    If the engine dies, the workflow is run again from its start, on another worker if need be, and the
    turns that were already sampled are handed out again from the record. Hence a workflow must behave
    the same when it is given the same turns.
    """

    @property
    def row(self) -> Row:
        """The data set row of the ticket."""
        ...

    @property
    def prompt(self) -> str:
        """The row's prompt as text, without chat template."""
        ...

    async def generate(self, max_new_tokens: int | None = None) -> Turn:
        """Sample the next turn with the manifest's temperature.

        Args:
            max_new_tokens: bound for this turn; by default, and at most, what the ticket allows.
        """
        ...

    def tell(self, message: str) -> None:
        """Append a user message (through the chat template, if the tokenizer has one)."""
        ...

    async def score(self, response: str) -> Score:
        """Score a response with the manifest's reward, retries and time limit included.

        Raises:
            RewardFailed: every attempt failed; let it pass, and the sample leaves its group.
        """
        ...


class RewardFailed(Exception):
    """A reward gave no number within its attempts. The sample leaves its group."""


class Workflow(Protocol):
    """`spec.workflow.class`: how one sample comes about. One instance lives in each worker."""

    async def run(self, session: Session, /) -> float:
        """Sample with `session.generate` and return the reward of the whole sample.

        Runs concurrently with other samples on one event loop, so it must not block. Raising means
        this sample failed: it is tried again, and then leaves its group.
        """
        ...


class DatasetFactory(Protocol):
    """`dataset.source: module:factory`: makes the rows of a split, the same ones at each call."""

    def __call__(self, *, split: str, seed: int, **parameters: Any) -> Iterable[Row]:
        """Return all rows of `split`.

        Args:
            split: `spec.dataset.split`, or `spec.evaluation.split`.
            seed: `spec.dataset.seed`, also for evaluation.
            parameters: `parameters` of the same block, as keyword arguments.
        """
        ...


class ModelFactory(Protocol):
    """`model.source: module:factory`: writes a Hugging Face model folder, once, under a lock."""

    def __call__(self, folder: Path, /, *, seed: int, context_length: int) -> Iterable[str] | None:
        """Write config, weights and tokenizer into `folder`, an empty directory.

        Args:
            folder: moved into place when the factory returns, so a crash leaves no half model.
            seed: `spec.training.seed`.
            context_length: `spec.model.contextLength`.

        Returns:
            The prompts that the model has been trained on, so that the run can count how many of them
            are held out for evaluation; None if there are none.
        """
        ...
