"""Trains on a ledger's recorded batches one after the other, in one process that nothing interrupts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from asyncrl_api.job import DeepSpeedSpec, Spec
from asyncrl_api.ledger import History
from asyncrl_runtime.contract.messages import Group, Sample, floats_from_bytes, ids_from_bytes
from asyncrl_runtime.trainer.books.books import with_recorded_values
from asyncrl_runtime.trainer.books.staleness import LiveGroup, assess
from asyncrl_runtime.trainer.books.step_values import StepValues
from asyncrl_runtime.trainer.update.deepspeed_config import step_settings
from asyncrl_runtime.trainer.update.policy import Policy
from asyncrl_runtime.trainer.update.step import learning_rate, plan_step, train_step


def replay(
    spec: Spec, model: Path, history: History, groups: Mapping[int, Group]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the weights of version 0, 1, 2 ... of the surviving history."""
    policy = Policy(
        model,
        dtype=spec.model.dtype,
        training=spec.training,
        algorithm=spec.algorithm,
        deepspeed=DeepSpeedSpec(zero_stage=0),
    )
    yield _weights(policy)
    for step in history.steps:
        recorded = with_recorded_values(spec, step.live)
        live: list[LiveGroup] = []
        for ticket in step.tickets:
            group = assess(groups[ticket], step.version, recorded.staleness, step.began, "None")
            assert isinstance(group, LiveGroup)
            live.append(group)
        values = StepValues.of(spec).as_recorded(step.frozen)
        plan = plan_step(
            live,
            settings=step_settings(values),
            max_new_tokens=recorded.max_new_tokens,
            num_minibatches=values.minibatches,
            tokens_per_micro_batch=values.tokens_per_micro_batch,
            learning_rate=learning_rate(
                values.schedule, step.version, recorded.max_steps, values.learning_rate
            ),
        )
        train_step(policy, plan.shares(1)[0])
        yield _weights(policy)


def _weights(policy: Policy) -> dict[str, torch.Tensor]:
    [names] = policy.buckets(2**40)
    return {name: tensor.clone() for name, tensor in policy.weights(names)}


@torch.no_grad()
def logprob_error(
    model: torch.nn.Module, versions: Sequence[Mapping[str, torch.Tensor]], sample: Sample
) -> float:
    """Return how far a sample's log-probs are from those computed anew under the versions that it attests."""
    prompt, response = ids_from_bytes(sample.prompt_ids), ids_from_bytes(sample.response_ids)
    ids = torch.tensor(np.concatenate([prompt, response]))[None].long()
    behavior = torch.tensor(floats_from_bytes(sample.behavior_logprobs))
    error, start = 0.0, 0
    for span in sample.version_spans:
        model.load_state_dict(versions[span.version], strict=False)
        predicted = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
        own = predicted.gather(1, ids[0, len(prompt) :, None])[:, 0]
        error = max(error, float((own - behavior)[start : span.end].abs().max()))
        start = span.end
    return error
