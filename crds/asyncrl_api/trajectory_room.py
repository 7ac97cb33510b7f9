"""How many steps' trajectories the broker's storage holds, by the longest that samples can be. Pure."""

import math
from typing import NamedTuple

from asyncrl_api.base import parse_quantity
from asyncrl_api.job import Spec

TRAJECTORY_SHARE = 0.7
"""The share of the storage for trajectories; the rest is for prompts, evaluation and buckets."""
FULL_SHARE = 0.7
"""The share of the trajectories' room from which on it is made: a checkpoint, to purge behind it."""
BYTES_PER_TOKEN = 4 + 4 + 1 / 8
"""A sampled token's id, its log-prob and its bit in the loss mask, as they are stored."""


class TrajectoryRoom(NamedTuple):
    """What the trajectories of a job need and have, if every sample is as long as `model.contextLength`."""

    num_bytes: int
    """The room for trajectories."""
    step_bytes: int
    """What the samples of one step take."""
    num_steps: int
    """The steps that can be trained before a checkpoint is forced, those that are sampled ahead included."""
    wanted_steps: int
    """The steps for which there should be room: those between two checkpoints, and those sampled ahead."""
    wanted_size: str
    """The storage with room for them, as `messaging.embedded.storage.size` takes it."""


def trajectory_room(spec: Spec) -> TrajectoryRoom:
    """Return what a job's trajectories need of the embedded broker's storage, and what they have."""
    samples = spec.training.batch_size * spec.sampling.group_size
    step_bytes = math.ceil(samples * spec.model.context_length * BYTES_PER_TOKEN)
    num_bytes = int(parse_quantity(spec.messaging.embedded.storage.size) * TRAJECTORY_SHARE)
    wanted_steps = spec.checkpoint.every_steps + spec.staleness.max_versions + 1
    wanted = wanted_steps * step_bytes / (TRAJECTORY_SHARE * FULL_SHARE)
    return TrajectoryRoom(
        num_bytes,
        step_bytes,
        int(num_bytes * FULL_SHARE / step_bytes),
        wanted_steps,
        f"{max(1, math.ceil(wanted / 2**30))}Gi",
    )
