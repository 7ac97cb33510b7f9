"""Decides when held-out prompts are asked (before, during and after training), and reports the answers."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import numpy as np
import torch

from asyncrl_runtime.contract.messages import Sample, floats_from_bytes, ids_from_bytes
from asyncrl_runtime.trainer.checkpointing import Checkpointing
from asyncrl_runtime.trainer.evaluation import Evaluated
from asyncrl_runtime.trainer.seams import AttemptParts
from asyncrl_runtime.trainer.update import diagnostics
from asyncrl_runtime.trainer.update.packing import TrainingSample
from asyncrl_runtime.trainer.update.ranks import Logprobs

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""How often the trainer's boundary is run while it waits for the end of an evaluation."""
MISMATCH_SAMPLES = 32
"""The number of samples of an evaluation on which engine and trainer are compared."""

Boundary = Callable[[], Awaitable[None]]
"""What the trainer does wherever it waits; an exception that it raises breaks the evaluation off."""


class EvaluationSchedule:
    """The evaluations of one attempt. If nothing is held out, none of the calls does anything."""

    def __init__(self, parts: AttemptParts, checkpointing: Checkpointing) -> None:
        self._examiner = parts.examiner
        self._books = parts.books
        self._checkpointing = checkpointing
        self._metrics = parts.metrics
        self._ranks = parts.ranks
        self._beside: asyncio.Task[None] | None = None

    @property
    def is_first_due(self) -> bool:
        """Whether the policy is to be measured before its first step; once in a job's life.

        If recorded steps are to be repeated, it is too late: the engines have a later policy, or none, and
        get their weights only after those steps.
        """
        is_late = self._books.version > 0 or self._books.is_repeating
        return not (self._examiner is None or self._checkpointing.has_first_evaluation or is_late)

    async def measure_first(self, boundary: Boundary) -> None:
        """Measure the policy before its first step, while the trainer waits."""
        self._metrics.update(state="Evaluating")
        evaluated = await self._measure(self._books.version, boundary, trainer_waits=True)
        if evaluated is not None:
            self._metrics.update(first_evaluation=evaluated.report)
            await self._checkpointing.save_first_evaluation(evaluated.report.model_dump(by_alias=True))

    def begin_if_due(self, published: Callable[[], Awaitable[None]]) -> None:
        """Begin an evaluation beside the training if one is due; `measure_last` makes the last one.

        Args:
            published: returns once the engines have been offered the weights.
        """
        spec, version = self._books.live.evaluation, self._books.version
        if spec is None or self._examiner is None or version >= self._books.live.training.max_steps:
            return
        if version % spec.every_steps != 0 or self._books.is_repeating:
            return
        if self._beside is not None and not self._beside.done():
            log.info("step %d: the evaluation before it still runs, so this one is left out", version)
            return
        self._beside = asyncio.create_task(self._measure_beside(published), name="evaluation")

    async def measure_last(self, boundary: Boundary) -> None:
        """Wait for an evaluation that still runs, then measure the policy after its last step."""
        if self._examiner is None:
            return
        self._metrics.update(state="Evaluating")
        await self._end_beside(boundary)
        await self._measure(self._books.version, boundary, trainer_waits=True)

    def cancel(self) -> None:
        """Break off an evaluation that runs beside the training."""
        if self._beside is not None:
            self._beside.cancel()

    async def _end_beside(self, boundary: Boundary) -> None:
        """Wait for an evaluation that began beside the training; from now on its boundaries are run here."""
        if self._beside is None:
            return
        try:
            while not self._beside.done():
                await boundary()
                await asyncio.wait({self._beside}, timeout=LOOK_SECONDS)
            self._beside.result()
        finally:
            self._beside.cancel()

    async def _measure_beside(self, published: Callable[[], Awaitable[None]]) -> None:
        async def nothing() -> None:
            """The training loop itself sees to its boundaries."""

        version = self._books.version
        await published()
        await self._measure(version, nothing, trainer_waits=False)

    async def _measure(self, version: int, boundary: Boundary, *, trainer_waits: bool) -> Evaluated | None:
        assert self._examiner is not None
        limit = self._books.live.sampling.max_new_tokens
        evaluated = await self._examiner.run(version, limit, boundary)
        if evaluated is None:
            return None
        report = evaluated.report
        log.info("step %d: held-out accuracy %.3f of %d", report.step, report.accuracy, report.num_prompts)
        mismatch = {}
        # Beside the training, the trainer's weights may already be those of the next version.
        if trainer_waits and report.lowest_version == report.highest_version == self._books.version:
            mismatch = await self._mismatch(evaluated.samples)
        self._metrics.log_evaluation({**report.model_dump(by_alias=True), **mismatch})
        self._metrics.update(last_evaluation=report)
        return evaluated

    async def _mismatch(self, samples: tuple[Sample, ...]) -> dict[str, float]:
        """Compare engine and trainer on tokens sampled with the version that the trainer holds."""
        chosen = tuple(_as_training_sample(sample) for sample in samples[:MISMATCH_SAMPLES])
        logprobs = await self._ranks.run(Logprobs(chosen))
        sums = [
            diagnostics.mismatch_sums(new, _behavior(sample, new), new.new_zeros(len(new)))
            for sample, new in zip(chosen, logprobs, strict=True)
        ]
        return diagnostics.report_mismatch(torch.stack(sums).sum(0)) if sums else {}


def _as_training_sample(sample: Sample) -> TrainingSample:
    mask = sample.mask()
    return TrainingSample(
        ticket=0,
        index=sample.index,
        prompt_ids=ids_from_bytes(sample.prompt_ids),
        response_ids=ids_from_bytes(sample.response_ids),
        behavior_logprobs=floats_from_bytes(sample.behavior_logprobs),
        sampled_mask=mask,
        loss_mask=mask,
        advantage=0.0,
        temperature=1.0,  # a greedy sample's log-probs are those of the plain logits
        staleness=np.zeros(sample.num_tokens, dtype=np.int32),
    )


def _behavior(sample: TrainingSample, like: torch.Tensor) -> torch.Tensor:
    return like.new_tensor(sample.behavior_logprobs[sample.sampled_mask])
