"""The signatures that users implement: reward, workflow, data set factory, model factory.

A manifest names them as `pkg.module:name`. They are structural: nothing has to inherit from the protocols,
and nothing has to be imported from asyncrl, except `Score` by a reward that gives feedback.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Row = Mapping[str, Any]
"""One row of the data set. Its values are what JSON can hold; they travel to the worker with the ticket."""


class Score(NamedTuple):
    """A verifier's judgment of a response."""

    reward: float
    feedback: str = ""
    """What a multi-turn workflow tells the policy before its next attempt."""


class Reward(Protocol):
    """`spec.reward.function`: scores one response. It runs in processes of its own, several at a time.

    It may be slow, it may block, it may raise: a call that raises, does not return a finite number (within
    float32), or takes longer than `spec.reward.timeoutSeconds` is repeated until `maxAttempts` are used up;
    then the sample leaves its group. An error never becomes a reward of zero.
    """

    def __call__(self, prompt: str, response: str, row: Row, /) -> float | Score:
        """Return the reward of `response`.

        Args:
            prompt: the row's prompt field as text, without a chat template.
            response: the decoded output of the (last) turn without its end-of-sequence token; an
                answer that `maxNewTokens` cut off is passed as it is.
            row: the whole row, with the reference answer and whatever else the data set holds.
        """
        ...


class Turn(NamedTuple):
    """One answer of the policy within a sample."""

    text: str
    """The decoded answer, without the end-of-sequence token."""
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
        """The row's prompt as text, without a chat template."""
        ...

    async def generate(self, max_new_tokens: int | None = None) -> Turn:
        """Sample the next turn with the manifest's temperature.

        Args:
            max_new_tokens: a bound for this turn; the ticket's bound is the default and the maximum.
        """
        ...

    def tell(self, message: str) -> None:
        """Append a user message (through the chat template, if the tokenizer has one)."""
        ...

    async def score(self, response: str) -> Score:
        """Score a response with the manifest's reward, retries and time limit included.

        Raises:
            RewardFailed: every attempt failed. Do not catch it, and the sample leaves its group.
        """
        ...


class RewardFailed(Exception):
    """A reward gave no number in any of its attempts. The sample leaves its group."""


class Workflow(Protocol):
    """`spec.workflow.class`: how one sample is made. There is one instance in each worker."""

    async def run(self, session: Session, /) -> float:
        """Sample with `session.generate` and return the reward of the whole sample.

        It runs concurrently with other samples on one event loop, so it must not block. If it raises, the
        sample has failed: it is tried again, and then leaves its group.
        """
        ...


class DatasetFactory(Protocol):
    """`dataset.source: module:factory`: makes the rows of a split, the same ones in every call."""

    def __call__(self, *, split: str, seed: int, **parameters: Any) -> Iterable[Row]:
        """Return all rows of `split`.

        Args:
            split: `spec.dataset.split`, or `spec.evaluation.split`.
            seed: `spec.dataset.seed`, also for evaluation.
            parameters: the `parameters` of the same block, as keyword arguments.
        """
        ...


class ModelFactory(Protocol):
    """`model.source: module:factory`: writes a Hugging Face model folder, once, under a lock."""

    def __call__(self, folder: Path, /, *, seed: int, context_length: int) -> Iterable[str] | None:
        """Write config, weights and tokenizer into `folder`, an empty directory.

        Args:
            folder: it is moved into place when the factory returns, so that a crash leaves no half model.
            seed: `spec.training.seed`.
            context_length: `spec.model.contextLength`.

        Returns:
            The prompts that the model has been trained on, so that the run can count how many of them are
            among the held-out prompts of the evaluation; None if there are none.
        """
        ...
