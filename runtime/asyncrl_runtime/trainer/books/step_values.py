"""The fields marked R that decide what a step trains, as an attempt had them. Pure.

A step of the ledger may be repeated by an attempt that began with other values. It is then trained under
those of the attempt that recorded it, which stand in that attempt's `began` line; the live ones among the
values stand in the step's own line (books.py).

Of the other fields marked R none decides what a step trains: they are about which tickets it has (batchSize,
groupSize and evaluation; the ledger names the tickets), about where the trainer runs, or about how weights
travel. zeroStage and the number of ranks only divide the same sums in another way, so that results differ by
rounding. What trainer.deepspeed.config says beyond the optimizer's constants and the clipping belongs to the
engine that runs now.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from asyncrl_api.job import AlgorithmSpec, ScheduleSpec
from asyncrl_api.spec_views import FrozenSpec

_PLACES = {
    "algorithm": "algorithm",
    "minibatches": "training.minibatches",
    "tokens_per_micro_batch": "training.tokensPerMicroBatch",
    "learning_rate": "training.learningRate",
    "schedule": "training.schedule",
    "weight_decay": "training.weightDecay",
    "gradient_clipping": "training.gradientClipping",
    "deepspeed": "trainer.deepspeed.config",
}
"""The place of each value in the manifest, which is its name in the ledger."""


class StepValues(BaseModel):
    """The values of one attempt."""

    model_config = ConfigDict(alias_generator=_PLACES.__getitem__, validate_by_name=True, frozen=True)

    algorithm: AlgorithmSpec
    minibatches: int
    tokens_per_micro_batch: int
    learning_rate: float
    schedule: ScheduleSpec
    weight_decay: float
    gradient_clipping: float
    deepspeed: dict[str, Any]

    @classmethod
    def of(cls, spec: FrozenSpec) -> "StepValues":
        """Return the values of an attempt that began with `spec`."""
        return cls(
            algorithm=spec.algorithm.resolved,
            minibatches=spec.training.minibatches,
            tokens_per_micro_batch=spec.training.tokens_per_micro_batch,
            learning_rate=spec.training.learning_rate,
            schedule=spec.training.schedule,
            weight_decay=spec.training.weight_decay,
            gradient_clipping=spec.training.gradient_clipping,
            deepspeed=spec.trainer.deepspeed.config,
        )

    def to_ledger(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_none=True)

    def as_recorded(self, recorded: Mapping[str, Any]) -> "StepValues":
        """Return the values of the attempt that recorded a step.

        Args:
            recorded: what its `began` line holds. What is missing is taken from here, as everything is in
                older ledgers.
        """
        return self.model_validate(self.to_ledger() | dict(recorded))
