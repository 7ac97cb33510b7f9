"""Trains a ledger's recorded batches one after the other, in one process that nothing interrupts."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from asyncrl_api.job import Spec
from asyncrl_runtime.contract.messages import Group
from asyncrl_runtime.trainer.controller import with_recorded_values
from asyncrl_runtime.trainer.policy import Policy
from asyncrl_runtime.trainer.schedule import learning_rate
from asyncrl_runtime.trainer.staleness import LiveGroup, assess
from asyncrl_runtime.trainer.step import plan_step, train_step
from asyncrl_runtime.transport.ledger import History


def replay(
    spec: Spec, model: Path, history: History, groups: Mapping[int, Group]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the weights of version 0, 1, 2 ... of the surviving history."""
    policy = Policy(
        model,
        dtype=spec.model.dtype,
        training=spec.training,
        algorithm=spec.algorithm,
        deepspeed=spec.trainer.deepspeed,
    )
    yield _weights(policy)
    for step in history.steps:
        recorded = with_recorded_values(spec, step.live)
        live: list[LiveGroup] = []
        for ticket in step.tickets:
            group = assess(groups[ticket], step.version, recorded.staleness, step.began, "None")
            assert isinstance(group, LiveGroup)
            live.append(group)
        plan = plan_step(
            live,
            algorithm=spec.algorithm,
            max_new_tokens=spec.sampling.max_new_tokens,
            num_minibatches=spec.training.minibatches,
            tokens_per_micro_batch=spec.training.tokens_per_micro_batch,
            learning_rate=learning_rate(
                spec.training.schedule,
                step.version,
                recorded.training.max_steps,
                spec.training.learning_rate,
            ),
        )
        train_step(policy, plan, spec.algorithm, rank=0)
        yield _weights(policy)


def _weights(policy: Policy) -> dict[str, torch.Tensor]:
    [bucket] = policy.parameters_in_buckets(2**40)
    return {name: tensor.clone() for name, tensor in bucket}
