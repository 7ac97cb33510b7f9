"""What an engine's times of answering say of it: its decode step, its prefill, and its cache."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from asyncrl_runtime.calibration.findings import CalibrationError, Findings

log = logging.getLogger(__name__)

BATCHES = (1, 4, 16, 64)
LONGEST_PROBE_TOKENS = 4096
"""The context that probes fill at most; prompts have half of it, answers an eighth."""
CACHE_SHARE = 0.9
"""How much of the cache a batch may take, so that none of it is retracted."""
REPEATS = 2
"""How often each probe is made; the shortest time counts."""


@dataclass(frozen=True)
class EngineFacts:
    """What an engine says about itself."""

    gpus: int
    kv_tokens: int
    max_running: int
    context_length: int
    version: str


class ProbedBatch(NamedTuple):
    """A batch of answers that begin together."""

    num_prompts: int
    prompt_tokens: int
    new_tokens: int


class ProbedEngine(Protocol):
    """An engine that nobody else uses."""

    async def facts(self) -> EngineFacts: ...

    async def seconds(self, probe: ProbedBatch) -> float:
        """Return how long it took to answer a batch of prompts that it has not seen before."""
        ...


def choose_probes(facts: EngineFacts) -> list[ProbedBatch]:
    """Return the probes that tell batch, cached tokens and prefill apart, and fit the engine.

    Raises:
        CalibrationError: not even the smallest fits.
    """
    context = min(LONGEST_PROBE_TOKENS, facts.context_length)
    prompts, answers = (context // 16, context // 2), (context // 32, context // 8)
    probes = [
        ProbedBatch(batch, prompt, answer)
        for batch in BATCHES
        for prompt in prompts
        for answer in answers
        if batch <= facts.max_running
        and batch * (prompt + answer) <= CACHE_SHARE * facts.kv_tokens
        and answer > 0
    ]
    if len({probe.num_prompts for probe in probes}) < 2:
        raise CalibrationError(
            f"the engine takes {facts.max_running} sequences, {facts.kv_tokens} cached tokens and a context "
            f"of {facts.context_length}: there is no room for two batch sizes to compare"
        )
    return probes


async def find_in_engine(engine: ProbedEngine, where: str) -> Findings:
    """Measure an engine; it takes minutes, and nobody else may use the engine meanwhile.

    Args:
        where: names machine, engine and time, for the sources.

    Raises:
        CalibrationError: its times make no sense.
    """
    facts = await engine.facts()
    probes = choose_probes(facts)
    await engine.seconds(probes[0])  # whatever is compiled or captured at first use
    seconds = []
    for probe in probes:
        seconds.append(min([await engine.seconds(probe) for _ in range(REPEATS)]))
        log.info("%d x (%d + %d tokens): %.3f s", *probe, seconds[-1])
    findings = fit(probes, seconds, where)
    said = f"{where}: /server_info"
    findings.found("engine.gpus", facts.gpus, said)
    findings.found("engine.kvTokens", facts.kv_tokens, said)
    findings.found("engine.maxRunning", facts.max_running, said)
    return findings


def fit(probes: Sequence[ProbedBatch], seconds: Sequence[float], where: str) -> Findings:
    """Return the engine's rates, as the device model defines them, by least squares of relative errors.

    A batch of n takes a constant, n * prompt / prefill rate, and for each of its k steps the time of a step
    and that of the tokens in the cache, which are n * (prompt + k / 2) in the mean.

    Raises:
        CalibrationError: more tokens do not take longer.
    """
    times = np.array(seconds)
    columns = np.array([(1, n * p, k, k * n * (p + k / 2)) for n, p, k in probes], float)
    _, prefill, step, cached = values = _not_negative(columns / times[:, None])
    if step <= 0:
        raise CalibrationError(
            f"{where}: longer answers do not take longer; is the engine used by others meanwhile?"
        )
    worst = float(np.abs(columns @ values / times - 1).max())
    source = f"{where}: fit of {len(probes)} probes, which it misses by {worst:.0%} at most"
    findings = Findings()
    findings.found("engine.stepSeconds", step, source)
    findings.found("engine.stepSecondsPerToken", cached, source)
    if prefill > 0:
        findings.found("engine.prefillTokensPerSecond", 1 / prefill, source)
    else:
        findings.lacks(
            "engine.prefillTokensPerSecond", "longer prompts took no longer: prefill is lost in the noise"
        )
    return findings


def _not_negative(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the values, one for each column, whose sums are closest to 1 in all rows.

    A value that comes out negative is noise around nothing: it is 0, and the others are found without it.
    """
    values, used = np.zeros(shares.shape[1]), list(range(shares.shape[1]))
    while used:
        found = np.linalg.lstsq(shares[:, used], np.ones(len(shares)), rcond=None)[0]
        if found.min() >= 0:
            values[used] = found
            break
        used.pop(int(found.argmin()))
    return values
