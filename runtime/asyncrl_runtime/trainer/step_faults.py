"""What an attempt does about steps that fail by their own fault, and about updates that were not applied."""

import logging
from collections.abc import Awaitable, Callable

from asyncrl_api.ledger import StepFailure
from asyncrl_runtime.trainer.books.books import Batch
from asyncrl_runtime.trainer.books.failed_steps import bounded_tokens
from asyncrl_runtime.trainer.seams import AttemptParts
from asyncrl_runtime.trainer.update.failures import StepFailed
from asyncrl_runtime.trainer.update.packing import split_minibatches

log = logging.getLogger(__name__)


class NumbersUnusable(Exception):
    """So many gradients in a row are not finite that going on would train nothing."""


class StepFaults:
    """Keeps the ledger's notes on the steps of one attempt.

    Args:
        write_ledger: calls a method of the ledger with its arguments.
    """

    def __init__(self, parts: AttemptParts, write_ledger: Callable[..., Awaitable[None]]) -> None:
        self._parts = parts
        self._write_ledger = write_ledger
        self._num_skipped_in_a_row = 0
        self._has_told_bound = False

    def tokens_per_micro_batch(self, batch: Batch, manifest: int) -> int:
        """Return the bound with which a step is trained: the manifest's, or less after memory ran out.

        Args:
            manifest: `spec.training.tokensPerMicroBatch`, as of the attempt that recorded the step.
        """
        samples = [each.sample for group in batch.groups for each in group.samples]
        longest = max(len(sample.prompt_ids) // 4 + sample.num_tokens for sample in samples)
        bound = bounded_tokens(manifest, self._parts.failures, batch.version, longest)
        if bound < manifest and not self._has_told_bound:
            self._has_told_bound = True
            text = "memory ran out: from step %d on, micro-batches have at most %d tokens instead of %d"
            log.warning(text, batch.version + 1, bound, manifest)
        return bound

    async def failed(self, batch: Batch, failure: StepFailed, tokens_per_micro_batch: int) -> None:
        """Write into the ledger that a recorded step failed by its own fault; the next attempt decides."""
        log.error("step %d cannot be trained", batch.version + 1, exc_info=failure.__cause__)
        at = tokens_per_micro_batch if failure.is_out_of_memory else None
        note = StepFailure(batch.version, failure.cause, failure.tickets, at)
        await self._write_ledger(self._parts.ledger.fail, note)
        self._parts.metrics.update(message=f"step {batch.version + 1} cannot be trained: {failure.cause}")

    async def skipped(self, batch: Batch, skipped: tuple[int, ...], num_minibatches: int) -> None:
        """Write into the ledger which updates were not applied, and end the job after too many in a row.

        Raises:
            NumbersUnusable: more than `maxSkippedUpdates` in a row were not applied.
        """
        if skipped != batch.skipped:
            parts = split_minibatches(batch.tickets, num_minibatches)
            tickets = [batch.tickets[place] for number in skipped for place in parts[number]]
            await self._write_ledger(self._parts.ledger.skip, batch.version, skipped, tickets)
            text = "step %d: %d of %d updates are skipped: their gradient is not finite (tickets %s)"
            log.warning(text, batch.version + 1, len(skipped), num_minibatches, tickets[:20])
        limit = self._parts.books.live.failure_policy.trainer.max_skipped_updates
        for number in range(num_minibatches):
            self._num_skipped_in_a_row = self._num_skipped_in_a_row + 1 if number in skipped else 0
            if self._num_skipped_in_a_row > limit:
                raise NumbersUnusable(
                    f"the gradients of {self._num_skipped_in_a_row} updates in a row are not finite; "
                    f"spec.failurePolicy.trainer.maxSkippedUpdates is {limit}. Lower training.learningRate, "
                    "or bound rewards with algorithm.rewardClip"
                )
