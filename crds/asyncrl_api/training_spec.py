"""What a step does to the policy: batches, optimizer, algorithm, staleness."""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from asyncrl_api.base import ApiType, Count, CountOrZero, IntOrAuto, Name, NonNegative, Positive
from asyncrl_api.marks import field


class ScheduleSpec(ApiType):
    """The learning rate over steps."""

    type: Literal["Constant", "Linear", "Cosine"] = field(
        "The learning rate after the warm-up. Linear and Cosine fall to zero at the current maxSteps.",
        default="Constant",
    )
    warmup_steps: CountOrZero = field("Steps over which the learning rate rises linearly from 0.", default=0)


class LoRASpec(ApiType):
    """Low-rank adapters: the model's weights are fixed, and small factors are trained (arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=0, le=1024)] = field(
        "Rank of the factors; 0: no adapters, all weights are trained.", default=0
    )
    alpha: Positive = field(
        "Scale of the adapters: what they add is multiplied by alpha / rank.", default=32.0
    )
    target_modules: Annotated[list[Name], Field(max_length=32)] = field(
        "Linear layers that get adapters, by the last part of their names.",
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        list_type="atomic",
    )


class TrainingSpec(ApiType):
    """Batches and the optimizer. One step is one global batch and makes one new policy version."""

    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = field("Prompt groups per step.", mark="R")
    max_steps: Count = field("Steps after which the job is complete; may only grow.", mark="L")
    minibatches: Count = field(
        "Optimizer updates per step; at most batchSize. With 1 the clip never takes effect, and the proximal "
        "log-probs cost nothing.",
        mark="R",
        default=4,
    )
    tokens_per_micro_batch: Count = field(
        "Maximum number of tokens in one forward and backward pass of one data-parallel rank; at least "
        "model.contextLength. Lower it if the trainer runs out of memory.",
        mark="R",
        default=16384,
    )
    learning_rate: NonNegative = field("Peak learning rate of AdamW.", mark="R", default=1e-6)
    schedule: ScheduleSpec = field("The learning rate over steps.", mark="R", default=ScheduleSpec())
    weight_decay: NonNegative = field("Decoupled weight decay of AdamW.", mark="R", default=0.01)
    gradient_clipping: NonNegative = field(
        "Norm to which the gradient of an optimizer update is clipped; 0: not clipped.",
        mark="R",
        default=1.0,
    )
    seed: CountOrZero = field("Seed of the sampling noise and of model factories.", mark="I", default=1)
    lora: LoRASpec = field("Low-rank adapters.", mark="I", default=LoRASpec())

    @property
    def trains_adapters(self) -> bool:
        return self.lora.rank > 0


class ClipBounds(NamedTuple):
    """The half-widths of a trust region."""

    low: float
    high: float


DEFAULT_CLIPS = {"GSPO": ClipBounds(3e-4, 4e-4), "CISPO": ClipBounds(1.0, 0.2)}
"""The trust regions of the policy losses whose papers differ from 0.2 on either side. GSPO's ratios are means
over sequences, which move far less than those of tokens (arXiv 2507.18071, section 5.1); CISPO has no lower
bound (arXiv 2506.13585, section 3.1)."""


class ClipSpec(ApiType):
    """The trust region around the proximal policy: ratios within [1 - low, 1 + high]."""

    low: Annotated[float, Field(gt=0, le=1)] | None = field(
        "Lower half-width of the trust region. Absent: 0.2; 0.0003 for GSPO; 1 (no bound) for CISPO.",
        default=None,
    )
    high: Positive | None = field(
        "Upper half-width of the trust region; above `low` it leaves room for unlikely tokens (clip-higher, "
        "DAPO, arXiv 2503.14476). Absent: 0.2; 0.0004 for GSPO.",
        default=None,
    )
    dual: Annotated[float, Field(gt=1)] | None = field(
        "Upper bound of the ratio where the advantage is negative, for example 3.0 (dual clip, arXiv "
        "1912.09729). Absent: there is none.",
        default=None,
    )


class ImportanceWeightSpec(ApiType):
    """The importance weights (proximal over behavior policy) that correct for stale tokens."""

    max: Positive = field("Largest importance weight of a token.", default=5.0)
    on_exceed: Literal["Mask", "Clamp"] = field(
        "Mask takes tokens above `max` out of the loss; Clamp lowers their weight to it.", default="Mask"
    )


class OverlongPenaltySpec(ApiType):
    """A reward that falls before the length limit instead of at it (DAPO, arXiv 2503.14476, eq. 13)."""

    buffer_tokens: Count = field(
        "Number of tokens before sampling.maxNewTokens over which the penalty grows linearly. What counts is "
        "the longest answer of a sample, and the maxNewTokens under which it was sampled.",
        default=512,
    )
    penalty: NonNegative = field("Amount that a sample with an answer of full length loses.", default=1.0)


class AlgorithmSpec(ApiType):
    """The loss."""

    policy_loss: Literal["DecoupledPPO", "PPO", "GSPO", "CISPO", "TIS"] = field(
        "DecoupledPPO: a trust region around the policy at the start of the step, and importance weights for "
        "staleness (AReaL, arXiv 2505.24298, eq. 5). PPO: a trust region around the policy that sampled. "
        "GSPO: ratios of whole sequences (arXiv 2507.18071). CISPO: clipped, detached weights (arXiv "
        "2506.13585). TIS: truncated importance sampling.",
        default="DecoupledPPO",
    )
    advantage: Literal["GroupNormalized", "GroupCentered", "LeaveOneOut", "BatchNormalized"] = field(
        "What a reward is measured against. GroupNormalized: the mean and standard deviation of its group "
        "(GRPO, arXiv 2402.03300). GroupCentered: the mean of its group (arXiv 2503.20783). LeaveOneOut: the "
        "mean of the other samples of its group (arXiv 2402.14740). BatchNormalized: the mean and standard "
        "deviation of the batch. All but the last need a sampling.groupSize of at least 2.",
        default="GroupNormalized",
    )
    clip: ClipSpec = field("Trust region of the policy ratio.", default=ClipSpec())
    importance_weight: ImportanceWeightSpec = field(
        "Correction for stale tokens.", default=ImportanceWeightSpec()
    )
    kl_coefficient: NonNegative = field(
        "Weight of a loss term: the KL divergence from model.source (k3 estimator), even if training begins "
        "with other weights by checkpoint.resume FromPath. 0: off, and no reference is kept in memory. With "
        "adapters none is kept either; with ZeRO 3 each rank keeps its share.",
        default=0.0,
    )
    entropy_coefficient: NonNegative = field(
        "Weight of an entropy bonus per token, in nats; 0: off.", default=0.0
    )
    reward_scale: Annotated[float, Field(gt=0, le=1e9)] = field(
        "Factor of the rewards: advantages are computed from (reward + rewardShift) * rewardScale.",
        default=1.0,
    )
    reward_shift: Annotated[float, Field(ge=-1e9, le=1e9)] = field(
        "Number that is added to each reward before it is scaled.", default=0.0
    )
    reward_clip: Positive | None = field(
        "Largest magnitude of a reward after shift and scale; what exceeds it is lowered to it, before "
        "rewards are compared. AReaL's is 20. Absent: there is none.",
        default=None,
    )
    overlong_penalty: OverlongPenaltySpec | None = field(
        "Penalty for responses near the length limit. Absent: there is none.", default=None
    )

    @property
    def clip_bounds(self) -> ClipBounds:
        """The trust region in force: what the user wrote, and for the rest the default of the policy loss."""
        low, high = DEFAULT_CLIPS.get(self.policy_loss, ClipBounds(0.2, 0.2))
        clip = self.clip
        return ClipBounds(low if clip.low is None else clip.low, high if clip.high is None else clip.high)

    @property
    def resolved(self) -> "AlgorithmSpec":
        """The same with every value written out, so that no later default can change it."""
        clip = self.clip.model_copy(update=self.clip_bounds._asdict())
        return self.model_copy(update={"clip": clip})


class StalenessSpec(ApiType):
    """How far sampling may run ahead of training (AReaL, arXiv 2505.24298, section 4.1)."""

    max_versions: Annotated[int, Field(ge=0, le=1000)] = field(
        "Maximum number of policy versions between the one that sampled a token and the one that trains on "
        "it. 0: synchronous; sampling and training take turns.",
        default=4,
    )
    target: IntOrAuto = field(
        "How many policy versions sampling is meant to run ahead: at most (target + 1) batches of prompt "
        "groups are open at a time. Auto: as few as keep half a batch waiting when the trainer wants one, so "
        "that tokens are as fresh as they can be without the trainer waiting for them. maxVersions stays the "
        "bound of either.",
        default="Auto",
    )
    on_exceed: Literal["Mask", "Drop", "Keep"] = field(
        "What happens to tokens that are older than that when their batch is formed. Mask: they are left out "
        "of the loss. Drop: their sample leaves its group. Keep: they are trained on, as in AReaL.",
        default="Mask",
    )
    order: Literal["OldestFirst", "FreshestFirst"] = field(
        "Which finished prompt groups a batch takes first. OldestFirst, as in AReaL, keeps short answers "
        "from crowding out long ones.",
        default="OldestFirst",
    )
