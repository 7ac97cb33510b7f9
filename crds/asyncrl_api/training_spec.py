"""What a step does to the policy: batches, optimizer, algorithm, staleness."""

from typing import Annotated, Literal

from pydantic import Field

from asyncrl_api.base import ApiType, Count, CountOrZero, Name, NonNegative, Positive
from asyncrl_api.marks import field


class ScheduleSpec(ApiType):
    """The learning rate over steps."""

    type: Literal["Constant", "Linear", "Cosine"] = field(
        "After warm-up. Linear and Cosine fall to zero at the maxSteps in force.", default="Constant"
    )
    warmup_steps: CountOrZero = field("Steps in which the learning rate rises linearly from 0.", default=0)


class LoRASpec(ApiType):
    """Low-rank adapters: the model's weights stay, and small factors are trained (arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=0, le=1024)] = field(
        "Rank of the factors; 0: no adapters, all weights are trained.", default=0
    )
    alpha: Positive = field("What adapters add is scaled by alpha / rank.", default=32.0)
    target_modules: Annotated[list[Name], Field(max_length=32)] = field(
        "Linear layers that get adapters, by the last part of their name.",
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        list_type="atomic",
    )


class TrainingSpec(ApiType):
    """Batches and optimizer. One step is one global batch and one new policy version."""

    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = field("Prompt groups per step.", mark="R")
    max_steps: Count = field("Steps until the job is complete. May only grow.", mark="L")
    minibatches: Count = field(
        "Optimizer updates per step, at most batchSize. With 1 the clip never binds, and the proximal "
        "log-probs cost nothing.",
        mark="R",
        default=4,
    )
    tokens_per_micro_batch: Count = field(
        "Most tokens in one forward and backward pass of one data-parallel rank; lower it when the trainer "
        "runs out of memory. At least model.contextLength.",
        mark="R",
        default=16384,
    )
    learning_rate: NonNegative = field("Peak learning rate of AdamW.", mark="R", default=1e-6)
    schedule: ScheduleSpec = field("The learning rate over steps.", mark="R", default=ScheduleSpec())
    weight_decay: NonNegative = field("Decoupled weight decay of AdamW.", mark="R", default=0.01)
    gradient_clipping: NonNegative = field(
        "Largest norm of the gradient of an optimizer update; 0: not clipped.", mark="R", default=1.0
    )
    seed: CountOrZero = field("Seed of sampling noise, and of model factories.", mark="I", default=1)
    lora: LoRASpec = field("Low-rank adapters.", mark="I", default=LoRASpec())

    @property
    def trains_adapters(self) -> bool:
        return self.lora.rank > 0


class ClipSpec(ApiType):
    """Trust region around the proximal policy: ratios within [1 - low, 1 + high]."""

    low: Annotated[float, Field(gt=0, le=1)] = field("Lower half-width of the trust region.", default=0.2)
    high: Positive = field(
        "Upper half-width; above `low` it leaves room for unlikely tokens (clip-higher, DAPO, arXiv "
        "2503.14476).",
        default=0.2,
    )
    dual: Annotated[float, Field(gt=1)] | None = field(
        "Bound of the ratio where the advantage is negative, 3.0 say (dual clip, arXiv 1912.09729). Absent: "
        "none.",
        default=None,
    )


class ImportanceWeightSpec(ApiType):
    """Importance weights, proximal over behavior policy, correct for stale tokens."""

    max: Positive = field("Largest importance weight of a token.", default=5.0)
    on_exceed: Literal["Mask", "Clamp"] = field(
        "Mask takes tokens above `max` out of the loss, Clamp lowers their weight to it.", default="Mask"
    )


class OverlongPenaltySpec(ApiType):
    """A reward that falls before the length limit instead of at it (DAPO, arXiv 2503.14476, eq. 13)."""

    buffer_tokens: Count = field(
        "The penalty grows linearly over the last so many of sampling.maxNewTokens.", default=512
    )
    penalty: NonNegative = field("Taken from the reward of a response of full length.", default=1.0)


class AlgorithmSpec(ApiType):
    """The loss."""

    policy_loss: Literal["DecoupledPPO", "PPO", "GSPO", "CISPO", "TIS"] = field(
        "DecoupledPPO: trust region around the policy at the start of the step, importance weights for "
        "staleness (AReaL, arXiv 2505.24298, eq. 5). PPO: trust region around the policy that sampled. GSPO: "
        "ratios of whole sequences (arXiv 2507.18071). CISPO: clipped, detached weights (arXiv 2506.13585). "
        "TIS: truncated importance sampling.",
        default="DecoupledPPO",
    )
    advantage: Literal["GroupNormalized", "GroupCentered", "LeaveOneOut", "BatchNormalized"] = field(
        "What a reward is measured against. GroupNormalized: mean and standard deviation of its group (GRPO, "
        "arXiv 2402.03300). GroupCentered: the mean alone (arXiv 2503.20783). LeaveOneOut: mean of the other "
        "samples (arXiv 2402.14740). BatchNormalized: mean and standard deviation of the batch. All but the "
        "last need sampling.groupSize of at least 2.",
        default="GroupNormalized",
    )
    clip: ClipSpec = field("Trust region of the policy ratio.", default=ClipSpec())
    importance_weight: ImportanceWeightSpec = field(
        "Correction for stale tokens.", default=ImportanceWeightSpec()
    )
    kl_coefficient: NonNegative = field(
        "Weight of the KL divergence from the model that training began with, as a loss term (k3 estimator). "
        "0: off, and no reference policy is held.",
        default=0.0,
    )
    entropy_coefficient: NonNegative = field(
        "Weight of an entropy bonus per token, in nats; 0: off.", default=0.0
    )
    reward_scale: Positive = field(
        "Advantages are computed from (reward + rewardShift) * rewardScale.", default=1.0
    )
    reward_shift: float = field("Added to each reward before it is scaled.", default=0.0)
    overlong_penalty: OverlongPenaltySpec | None = field(
        "Penalty of responses near the length limit. Absent: none.", default=None
    )


class StalenessSpec(ApiType):
    """How far sampling may run ahead of training (AReaL, arXiv 2505.24298, section 4.1)."""

    max_versions: Annotated[int, Field(ge=0, le=1000)] = field(
        "Most policy versions between the one that sampled a token and the one that trains on it. 0: "
        "synchronous, sampling and training take turns.",
        default=4,
    )
    on_exceed: Literal["Mask", "Drop", "Keep"] = field(
        "What happens to tokens that are older when their batch is formed. Mask: they leave the loss. Drop: "
        "their sample leaves its group. Keep: they are trained on, as in AReaL.",
        default="Mask",
    )
    order: Literal["OldestFirst", "FreshestFirst"] = field(
        "Which finished prompt groups a batch takes. OldestFirst, as AReaL, does not let short answers push "
        "out long ones.",
        default="OldestFirst",
    )
