"""Rules for the contents of free-form fields, which the CRD keeps as written and CEL cannot see into."""

from collections.abc import Iterator, Mapping
from typing import Any

from asyncrl_api.job import Spec
from asyncrl_api.rules import Violation

RESERVED_BY_TRAINER = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "gradient_allreduce_op",
    "scheduler",
    "fp16",
    "zero_optimization.stage",
    "bf16.enabled",
)
"""Settings that the trainer decides; others would silently scale gradients, or contradict the manifest."""


def free_form_violations(spec: Spec) -> Iterator[Violation]:
    """Yield what is wrong with the free-form fields, except pod templates, which the API server tries out."""
    for path in RESERVED_BY_TRAINER:
        if _is_set(spec.trainer.deepspeed.config, path):
            field = f"trainer.deepspeed.config.{path}"
            yield Violation(
                f"spec.{field}", f"{field} is set, but the trainer decides it from other fields: leave it out"
            )


def _is_set(config: Mapping[str, Any], path: str) -> bool:
    key, _, rest = path.partition(".")
    if key not in config or not rest:
        return key in config
    return isinstance(config[key], Mapping) and _is_set(config[key], rest)
