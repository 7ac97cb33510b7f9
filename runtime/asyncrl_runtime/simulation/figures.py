"""What a simulation comes to, in the figures by which one chooses a cluster. Pure."""

from dataclasses import asdict, dataclass

from asyncrl_runtime.emulation.device import DeviceModel
from asyncrl_runtime.simulation.simulated_job import Setting, SimulatedRun


@dataclass(frozen=True)
class Figures:
    """The measured steps of one simulation. Shares are of 1; tokens are the model's."""

    gpus: int
    trainer_gpus: int
    num_engines: int
    max_versions: int
    step_seconds: float
    steps_per_hour: float
    tokens_per_second: float
    """Prompts and responses that were trained, over all GPUs."""
    live_tokens_per_second: float
    """The sampled tokens among them that are in the loss."""
    training_bound: float
    """The tokens per second that the trainer's passes allow, if it never did anything else."""
    generation_bound: float
    """The tokens per second that the engines allow, if their batches were always full."""
    trainer_trains: float
    trainer_waits: float
    trainer_publishes: float
    trainer_checkpoints: float
    trainer_other: float
    engines_idle: float
    engines_paused: float
    engines_prefill: float
    engines_decode: float
    engine_batch: float
    """Sequences in an engine's batch while it decodes."""
    retractions: int
    masked_tokens: float
    """The share of the sampled tokens that are too old to be trained."""
    staleness_mean: float
    staleness: dict[int, float]
    """The share of the sampled tokens by staleness."""
    price_per_step: float | None = None

    @property
    def bound(self) -> float:
        """The tokens per second that neither trainer nor engines can exceed."""
        return min(self.training_bound, self.generation_bound)

    @property
    def share_of_bound(self) -> float:
        return self.tokens_per_second / self.bound

    def to_json(self) -> dict[str, object]:
        """Return everything, as JSON has it."""
        return {**asdict(self), "bound": self.bound, "share_of_bound": self.share_of_bound}


def _generation_rate(setting: Setting, model: DeviceModel) -> float:
    """Return the tokens a second that all engines can sample, were they never idle."""
    spec = setting.spec
    rate = model.generation_rate(spec.sampling.max_new_tokens, spec.rollout.max_concurrency)
    return rate * setting.num_engines


def figures(run: SimulatedRun, model: DeviceModel, price_per_gpu_hour: float | None = None) -> Figures:
    """Return the figures of a simulation.

    Args:
        price_per_gpu_hour: what a GPU costs in an hour, in any currency.
    """
    setting, scale, began, ended = run.setting, run.token_scale, run.began, run.ended
    spec = setting.spec
    span, steps = ended.at - began.at, setting.steps
    tokens = (ended.trained.tokens - began.trained.tokens) * scale
    sampled = (ended.trained.sampled_tokens - began.trained.sampled_tokens) * scale
    live = (ended.trained.live_tokens - began.trained.live_tokens) * scale
    trains = (ended.trained.train_seconds - began.trained.train_seconds) / span
    saves = (ended.trained.checkpoint_seconds - began.trained.checkpoint_seconds) / span
    waits = sum(row["wait_seconds"] for row in run.rows) / span
    publishes = sum(row["publish_copy_seconds"] + row["publish_wait_seconds"] for row in run.rows) / span
    engine_seconds = ended.engines.seconds - began.engines.seconds

    def engines(name: str) -> float:
        return float(getattr(ended.engines, name) - getattr(began.engines, name)) / engine_seconds

    histogram = {
        versions: (count - began.trained.staleness.get(versions, 0)) * scale / max(1, sampled)
        for versions, count in sorted(ended.trained.staleness.items())
    }
    gpus = setting.trainer_gpus + setting.num_engines * model.engine.gpus
    minibatches = min(spec.training.minibatches, spec.training.batch_size)
    computed = (ended.trained.computed_tokens - began.trained.computed_tokens) * scale
    passes = model.trainer.step_seconds(computed, minibatches, setting.trainer_gpus)
    passes -= minibatches * model.trainer.seconds_per_update
    decode = engines("decode")
    return Figures(
        gpus=gpus,
        trainer_gpus=setting.trainer_gpus,
        num_engines=setting.num_engines,
        max_versions=spec.staleness.max_versions,
        step_seconds=span / steps,
        steps_per_hour=3600 * steps / span,
        tokens_per_second=tokens / span,
        live_tokens_per_second=live / span,
        training_bound=tokens / passes,
        generation_bound=_generation_rate(setting, model) * tokens / sampled,
        trainer_trains=trains,
        trainer_waits=waits,
        trainer_publishes=publishes,
        trainer_checkpoints=saves,
        trainer_other=max(0.0, 1 - trains - waits - publishes - saves),
        engines_idle=engines("idle"),
        engines_paused=engines("paused"),
        engines_prefill=engines("prefill"),
        engines_decode=decode,
        engine_batch=engines("sequence_seconds") / decode if decode else 0.0,
        retractions=ended.engines.retractions - began.engines.retractions,
        masked_tokens=1 - live / max(1, sampled),
        staleness_mean=sum(versions * share for versions, share in histogram.items()),
        staleness={versions: share for versions, share in histogram.items() if share > 0},
        price_per_step=(
            None if price_per_gpu_hour is None else price_per_gpu_hour * gpus * span / steps / 3600
        ),
    )
