"""Plans steps apart from the event loop, and while one is trained the one that will probably be the next.

A plan is a pure function of its batch and values, so to make it early decides nothing: it is used if the next
batch turns out to be the very one that was foreseen, and otherwise thrown away.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from asyncrl_runtime.trainer.books.books import Batch
from asyncrl_runtime.trainer.books.step_values import StepValues
from asyncrl_runtime.trainer.update.deepspeed_config import step_settings
from asyncrl_runtime.trainer.update.failures import MicroBatchWatch
from asyncrl_runtime.trainer.update.step import StepPlan, learning_rate, plan_step

log = logging.getLogger(__name__)


class Planner:
    """Makes plans, one at a time ahead.

    Args:
        in_thread: calls a function apart from the event loop.
    """

    def __init__(self, in_thread: Callable[..., Awaitable[Any]]) -> None:
        self._in_thread = in_thread
        self._ahead: tuple[object, StepPlan] | None = None
        self.num_foreseen = 0
        """How many plans were there when they were wanted."""

    async def plan(self, batch: Batch, values: StepValues, tokens_per_micro_batch: int) -> StepPlan:
        """Return the plan of a step.

        Raises:
            StepFailed: there is none, because of the samples.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == _rests_on(batch, values, tokens_per_micro_batch):
            self.num_foreseen += 1
            return ahead[1]
        with MicroBatchWatch().naming_failures():
            plan: StepPlan = await self._in_thread(make_plan, batch, values, tokens_per_micro_batch)
        return plan

    async def plan_ahead(self, batch: Batch, values: StepValues, tokens_per_micro_batch: int) -> None:
        """Make the plan of a step that is foreseen, and keep it in place of any other."""
        try:
            plan = await self._in_thread(make_plan, batch, values, tokens_per_micro_batch)
        except Exception as error:  # it is raised again if the step comes, and is then dealt with
            log.info("step %d cannot be planned ahead: %s", batch.version + 1, error)
            return
        self._ahead = _rests_on(batch, values, tokens_per_micro_batch), plan


def make_plan(batch: Batch, values: StepValues, tokens_per_micro_batch: int) -> StepPlan:
    """Return the plan of a step. Pure."""
    plan = plan_step(
        batch.groups,
        settings=step_settings(values),
        max_new_tokens=batch.max_new_tokens,
        num_minibatches=min(values.minibatches, len(batch.groups)),
        tokens_per_micro_batch=tokens_per_micro_batch,
        learning_rate=learning_rate(values.schedule, batch.version, batch.max_steps, values.learning_rate),
    )
    return replace(plan, skipped=frozenset(batch.skipped))


def _rests_on(batch: Batch, values: StepValues, tokens_per_micro_batch: int) -> object:
    """Return all that decides a plan; samples compare by identity first, so that this takes no time."""
    of_batch = batch.version, batch.groups, batch.max_steps, batch.max_new_tokens, batch.skipped
    return of_batch, values, tokens_per_micro_batch
