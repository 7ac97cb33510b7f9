"""The trainer's ranks in virtual time: a command is carried out at once, and then takes its time."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from asyncrl_runtime.emulation.device import DeviceModel
from asyncrl_runtime.trainer.update.diagnostics import staleness_histogram
from asyncrl_runtime.trainer.update.emulated_policy import EmulatedPolicy
from asyncrl_runtime.trainer.update.ranks import Command, CopyWeights, Export, Save, Train
from asyncrl_runtime.trainer.update.shares import StepShare
from asyncrl_runtime.trainer.update.step import StepPlan, train_step


@dataclass
class Trained:
    """What has been trained so far, in tokens as they are counted here, and what it took."""

    steps: int = 0
    tokens: int = 0
    """Prompts and responses together."""
    computed_tokens: int = 0
    """Those among them that went through the model: what has no gradient does not."""
    sampled_tokens: int = 0
    live_tokens: int = 0
    """The sampled tokens that are in the loss."""
    train_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    staleness: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Sampled tokens by staleness."""


class EmulatedRanks:
    """Implements TrainerRanks, over a policy that spends no time of its own.

    Args:
        bucket_bytes: the size limit of a bucket of weights.
        clock: the virtual loop's time.
    """

    def __init__(
        self, model: DeviceModel, gpus: int, token_scale: int, bucket_bytes: int, clock: Callable[[], float]
    ) -> None:
        self.policy = EmulatedPolicy(model, self._spend, gpus=gpus, token_scale=token_scale)
        self.copy = self.policy.make_copy([*map(self.policy.layout, self.policy.buckets(bucket_bytes))])
        self.trained = Trained()
        self.must_stop: Callable[[], bool] = lambda: False
        self._clock = clock
        self._owed = 0.0

    def _spend(self, seconds: float) -> None:
        self._owed += seconds

    async def run(self, command: Command) -> Any:
        result: Any = None
        match command:
            case Train(plan):
                [share] = plan.shares(1)
                result = train_step(self.policy, share, lambda: self._clock() + self._owed)
                self._note(plan, share)
                self.trained.train_seconds += self._owed
            case Save(folder):
                self.policy.save(folder)(lambda num_bytes: None)
                self.trained.checkpoint_seconds += self._owed
            case Export(folder):
                self.policy.export(folder, None)(lambda num_bytes: None)
            case CopyWeights():
                self.copy.take()
        owed, self._owed = self._owed, 0.0
        await asyncio.sleep(owed)
        return result

    def _note(self, plan: StepPlan, share: StepShare) -> None:
        trained = self.trained
        trained.steps += 1
        trained.tokens += sum(sample.num_tokens for sample in plan.samples)
        trained.computed_tokens += sum(
            sample.num_tokens
            for minibatch in share.minibatches
            for samples in minibatch.micro_batches
            for sample in samples
        )
        trained.sampled_tokens += sum(sample.num_sampled_tokens for sample in plan.samples)
        trained.live_tokens += sum(int(sample.loss_mask.sum()) for sample in plan.samples)
        for versions, count in staleness_histogram(plan.samples).items():
            trained.staleness[versions] += count

    async def gather(self, names: tuple[str, ...]) -> Tensor:
        """Return a bucket of the copy."""
        return self.copy.gather(names)

    async def keep_awake(self) -> None:
        await asyncio.Event().wait()
