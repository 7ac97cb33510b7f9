"""Builders of jobs and messages for tests."""

from collections.abc import Sequence

from asyncrl_api.job import AsyncRLJob
from asyncrl_api.parsing import apply_overrides, parse_job
from asyncrl_runtime.contract.messages import (
    Group,
    Sample,
    VersionSpan,
    floats_to_bytes,
    ids_to_bytes,
    mask_to_bytes,
)
from support.manifests.smallest import SMALLEST


def make_job(*overrides: str) -> AsyncRLJob:
    """The smallest job, with fields of its spec set as by `--set`: `training.maxSteps=5`."""
    return parse_job(apply_overrides(SMALLEST, [f"spec.{override}" for override in overrides]))


def make_sample(
    index: int = 0,
    *,
    spans: Sequence[tuple[int, int, int]] = ((1, 0, 4),),
    reward: float = 1.0,
    mask: Sequence[bool] | None = None,
) -> Sample:
    """A sample whose response is as long as its spans (attempt, version, end) say."""
    length = spans[-1][2]
    return Sample(
        index=index,
        prompt_ids=ids_to_bytes([1, 5, 6]),
        response_ids=ids_to_bytes([7 + place for place in range(length)]),
        behavior_logprobs=floats_to_bytes([-0.5 - 0.1 * place for place in range(length)]),
        response_mask=mask_to_bytes(mask if mask is not None else [True] * length),
        version_spans=tuple(VersionSpan(*span) for span in spans),
        reward=reward,
        temperature=1.0,
        finish_reason="stop",
    )


def make_group(ticket: int, versions: Sequence[int] = (0, 0), *, attempt: int = 1) -> Group:
    """A group with one sample per version, of different rewards."""
    samples = tuple(
        make_sample(index, spans=[(attempt, version, 4)], reward=float(index % 2))
        for index, version in enumerate(versions)
    )
    return Group(ticket=ticket, group_size=len(samples), samples=samples)
