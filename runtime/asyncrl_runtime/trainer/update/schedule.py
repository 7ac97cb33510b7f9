"""The learning rate of a training step. Pure."""

import math

from asyncrl_api.job import ScheduleSpec


def learning_rate(schedule: ScheduleSpec, step: int, max_steps: int, base: float) -> float:
    """Return the learning rate of step `step`, 0 <= step < `max_steps`; all its minibatches share it.

    No step has a rate of zero, which would be a step wasted: the warm-up begins at `base / warmup_steps` and
    reaches `base` with its last step, and a decay would reach zero at `max_steps`, the step after the last.

    Args:
        max_steps: the value in force. It may grow, and the decay then stretches from that step on.
        base: `spec.training.learningRate`.
    """
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, max_steps - schedule.warmup_steps)
    match schedule.type:
        case "Constant":
            return base
        case "Linear":
            return base * (1 - progress)
        case "Cosine":
            return base * (1 + math.cos(math.pi * progress)) / 2
