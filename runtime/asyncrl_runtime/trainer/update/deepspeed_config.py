"""Makes DeepSpeed's configuration. Pure."""

from collections.abc import Mapping
from typing import Any, Literal

from asyncrl_api.placement_spec import ActivationCheckpointing
from asyncrl_runtime.trainer.books.step_values import StepValues
from asyncrl_runtime.trainer.update.policy_api import StepSettings

Dtype = Literal["BFloat16", "Float32"]

BETAS = (0.9, 0.95)
"""AdamW's betas (AReaL, arXiv 2505.24298, table 3): for a run's few updates 0.999 would remember too long."""


def derive_config(
    *,
    zero_stage: int,
    dtype: Dtype,
    gradient_clipping: float,
    num_parameters: int,
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """Return DeepSpeed's config: the derived values, with `spec.trainer.deepspeed.config` merged over them.

    Micro-batch size and accumulation steps mean nothing here: the policy says where a minibatch ends, and
    scales its loss itself. The learning rate is set anew at each step.

    Args:
        num_parameters: the number of parameters that are trained. It keeps DeepSpeed's reduction buffers
            small, which otherwise have room for 500 million.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": gradient_clipping,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": min(num_parameters, 500_000_000),
            "allgather_bucket_size": min(num_parameters, 500_000_000),
        },
        # This is torch's own AdamW, because DeepSpeed's are compiled on first use.
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 0.0, "betas": list(BETAS), "eps": 1e-8, "torch_adam": True, "fused": True},
        },
        "timers": {"throughput": {"enabled": False}},
        "wall_clock_breakdown": False,
    }
    if dtype == "BFloat16":
        # Without the check a gradient that is not finite would be "clipped" to NaN and applied.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if zero_stage >= 1:  # stage 0 supports only the model's own dtype
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return deep_merge(config, overrides)


def recomputes_activations(choice: ActivationCheckpointing, device_type: str) -> bool:
    """Return whether the backward pass computes activations once more instead of keeping them.

    Args:
        choice: `spec.trainer.activationCheckpointing`.
        device_type: torch's name of the device, `cuda` or `cpu`.
    """
    return choice == "Always" or (choice == "Auto" and device_type == "cuda")


def derive_reference_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a model that is divided like the policy, but is never trained.

    Args:
        config: the policy's, with ZeRO 3.
    """
    of_the_optimizer = {"offload_optimizer", "reduce_bucket_size"}
    kept = {key: value for key, value in config["zero_optimization"].items() if key not in of_the_optimizer}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": kept,
        "bf16": {"enabled": "bf16" in config},
        "timers": config["timers"],
        "wall_clock_breakdown": False,
    }


def step_settings(values: StepValues) -> StepSettings:
    """Return what the values mean for a step's updates; `trainer.deepspeed.config` may override them."""
    config = derive_config(
        zero_stage=0,
        dtype="Float32",
        gradient_clipping=values.gradient_clipping,
        num_parameters=0,
        overrides=values.deepspeed,
    )
    constants = config["optimizer"]["params"]
    return StepSettings(
        algorithm=values.algorithm,
        weight_decay=values.weight_decay,
        gradient_clipping=float(config["gradient_clipping"]),
        betas=(float(constants["betas"][0]), float(constants["betas"][1])),
        epsilon=float(constants["eps"]),
    )


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid on top; mappings are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = (
            deep_merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        )
    return merged
