"""Device models: how long the work of an engine and a trainer takes, in YAML with a source for every number.

All times are in seconds of the modelled device, and all tokens are the model's own. Pure.
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Annotated

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import EmulationSpec

MODELS = Path(__file__).parent / "models"
"""The device models that come with asyncrl."""


class DeviceModelError(ValueError):
    """A device model that cannot be used; the message names the file, the field and the rule."""


Amount = Annotated[float, msgspec.Meta(gt=0, le=1e18)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
WholeNumber = Annotated[int, msgspec.Meta(ge=1, le=10**15)]


class _Block(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The base of the blocks. An unknown field is an error, since it would be without effect."""


class EngineModel(_Block, frozen=True, rename="camel"):
    """One engine. A decode step takes `step_seconds`, and `step_seconds_per_token` for each cached token."""

    gpus: WholeNumber
    """The GPUs of one engine (its tensor-parallel size), to which all numbers belong."""
    step_seconds: Amount
    step_seconds_per_token: NotNegative
    prefill_tokens_per_second: Amount
    kv_tokens: WholeNumber
    """The tokens that the KV cache holds; when it is full, the youngest sequences are retracted."""
    max_running: WholeNumber
    """The most sequences in the batch; the others queue."""


class ResponseLengths(_Block, frozen=True, rename="camel"):
    """The lengths of responses: log-normal, clipped."""

    median_tokens: Amount
    sigma: NotNegative
    """The standard deviation of the length's logarithm."""
    longest_tokens: WholeNumber
    shortest_tokens: WholeNumber
    prompt_tokens: WholeNumber
    """The tokens of every prompt."""

    def length(self, seed: int) -> int:
        """Return the tokens of a response: a function of its seed, whoever samples it."""
        drawn = random.Random(seed).lognormvariate(math.log(self.median_tokens), self.sigma)
        return round(min(self.longest_tokens, max(self.shortest_tokens, drawn)))

    def moments(self, longest: float) -> tuple[float, float]:
        """Return mean and mean square of the length, if responses are cut at `longest` tokens."""
        top, count, normal = min(longest, self.longest_tokens), 2000, NormalDist()
        points = (normal.inv_cdf((place + 0.5) / count) for place in range(count))
        drawn = (self.median_tokens * math.exp(self.sigma * point) for point in points)
        lengths = [min(top, max(self.shortest_tokens, length)) for length in drawn]
        return sum(lengths) / count, sum(length * length for length in lengths) / count


class TrainerModel(_Block, frozen=True, rename="camel"):
    """The trainer. All of its GPUs work on equal shares of each micro-batch."""

    update_tokens_per_second: Amount
    """Tokens that one GPU takes through forward and backward pass in a second."""
    forward_tokens_per_second: Amount
    """Tokens that one GPU takes through a forward pass alone, for the proximal policy's log-probs."""
    seconds_per_update: NotNegative
    """What an optimizer update takes beside its tokens."""
    checkpoint_seconds: NotNegative

    def step_seconds(self, num_tokens: float, minibatches: int, gpus: int) -> float:
        """Return how long a step takes whose minibatches are of equal size."""
        proximal = num_tokens * (minibatches - 1) / minibatches
        passes = num_tokens / self.update_tokens_per_second + proximal / self.forward_tokens_per_second
        return passes / gpus + minibatches * self.seconds_per_update


class WeightsModel(_Block, frozen=True, rename="camel"):
    """How weights reach the engines."""

    num_bytes: WholeNumber
    bytes_per_second: Amount
    """The rate of a broadcast to all engines, with their loading."""
    join_seconds: NotNegative
    """What it takes to form a weight group."""


class RewardModel(_Block, frozen=True, rename="camel"):
    """The verifier."""

    seconds: NotNegative


class DeviceModel(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """A device model."""

    description: str
    engine: EngineModel
    responses: ResponseLengths
    trainer: TrainerModel
    weights: WeightsModel
    reward: RewardModel
    sources: dict[str, str]
    """Where each number is from (`engine.kvTokens` -> text)."""

    def generation_rate(self, max_new_tokens: int, max_concurrency: int = 0) -> float:
        """Return the most tokens that one engine can sample in a second.

        With a full batch at all times: as many sequences as the cache holds of sequences in mid-course, which
        have half of E[L^2] / E[L] tokens beside their prompt, less what prefilling a prompt costs.

        Args:
            max_concurrency: the limit on an engine's samples; 0: the engine's own.
        """
        engine = self.engine
        mean, square = self.responses.moments(max_new_tokens)
        context = self.responses.prompt_tokens + square / mean / 2
        limit = min(engine.max_running, max_concurrency or engine.max_running)
        running = max(1.0, min(limit, engine.kv_tokens / context))
        step = engine.step_seconds + running * context * engine.step_seconds_per_token
        prefill = self.responses.prompt_tokens / engine.prefill_tokens_per_second / mean
        return 1 / (step / running + prefill)


def _numbers() -> Iterator[str]:
    for block in msgspec.structs.fields(DeviceModel):
        if isinstance(block.type, type) and issubclass(block.type, _Block):
            fields = msgspec.structs.fields(block.type)
            yield from (f"{block.encode_name}.{field.encode_name}" for field in fields)


NUMBERS = tuple(_numbers())
"""The paths of all numbers of a device model, in their order."""


def load_device_model(name_or_file: str) -> DeviceModel:
    """Return the device model of a file, or the one of this name that comes with asyncrl.

    Raises:
        DeviceModelError: there is none, or something is wrong with it.
    """
    built_in = {path.stem: path for path in sorted(MODELS.glob("*.yaml"))}
    path = built_in.get(name_or_file, Path(name_or_file))
    try:
        text = path.read_text()
    except OSError as error:
        raise DeviceModelError(
            f"device model {name_or_file}: {error.strerror}; name a file, or one of {', '.join(built_in)}"
        ) from error
    return parse_device_model(text, str(path))


def device_model_of(spec: EmulationSpec) -> DeviceModel:
    """Return the device model of a job.

    Raises:
        ExitError: it cannot be used; the message names the field.
    """
    try:
        return load_device_model(spec.device_model)
    except DeviceModelError as error:
        raise ExitError(ExitCode.REFUSED, f"spec.emulation.deviceModel: {error}") from error


def parse_device_model(text: str, where: str) -> DeviceModel:
    """Return the device model in a YAML text.

    Args:
        where: names the text in messages.

    Raises:
        DeviceModelError: something is wrong with it.
    """
    try:
        # The C parser knows YAML 1.1 only, where 1e-8 is a string.
        model = msgspec.convert(YAML(typ="safe", pure=True).load(text), DeviceModel)
    except (YAMLError, msgspec.ValidationError, ValueError, RecursionError) as error:
        raise DeviceModelError(f"device model {where}: {error}") from error
    named = set(NUMBERS)
    if missing := sorted(named - set(model.sources)):
        raise DeviceModelError(f"device model {where}: sources says nothing of {', '.join(missing)}")
    if odd := sorted(set(model.sources) - named):
        raise DeviceModelError(
            f"device model {where}: sources names {', '.join(odd)}, which is no number of it"
        )
    return model
