"""What the metrics of a run say of its trainer, its weight updates and its responses. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median
from typing import Any

import numpy as np

from asyncrl_runtime.calibration.findings import CalibrationError, Findings

MIN_STEPS = 10
"""The fewest steps from which numbers are derived."""
MIN_SPREAD = 0.03
"""The relative spread of the steps' tokens from which the time of an update is told from that of tokens."""

StepLine = Mapping[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """What a run is, beside its metrics."""

    where: str
    """Names machine, run and time, for the sources."""
    minibatches: int
    speedup: float = 1.0
    """Seconds of the devices in a second, if they were emulated."""
    num_bytes: int | None = None
    """The bytes of the weights that are published; None if nothing says it."""
    bytes_source: str = ""


def find_in_run(rows: Sequence[StepLine], facts: RunFacts) -> Findings:
    """Return what the steps' lines of metrics.jsonl say.

    Raises:
        CalibrationError: there are too few steps, or they are of a version that did not write what is needed.
    """
    steps = [row for row in rows if not row.get("is_repeat")]
    if len(steps) < MIN_STEPS:
        raise CalibrationError(
            f"{facts.where}: {len(steps)} steps, and at least {MIN_STEPS} are needed; train some more"
        )
    if lacking := sorted(
        {"num_pass_tokens", "proximal_seconds", "num_ranks", "response_tokens_p50"} - set(steps[-1])
    ):
        raise CalibrationError(
            f"{facts.where}: metrics.jsonl has no {', '.join(lacking)}: it was written by an earlier version "
            "of asyncrl; calibrate from a new run"
        )
    findings = Findings()
    _find_responses(steps, facts, findings)
    _find_trainer([row for row in steps if row["num_ranks"] == steps[-1]["num_ranks"]], facts, findings)
    _find_weights(steps, facts, findings)
    findings.lacks("reward.seconds", "metrics.jsonl does not say how long the verifier takes")
    return findings


def _find_responses(steps: Sequence[StepLine], facts: RunFacts, findings: Findings) -> None:
    source = f"{facts.where}, {len(steps)} steps: "
    longest = max(row["response_tokens_max"] for row in steps)
    log_median = fmean(math.log(max(1.0, row["response_tokens_p50"])) for row in steps)
    # Where the longest responses are cut, they say nothing of the distribution, so the lower half must do.
    is_cut = median(row["response_tokens_p90"] for row in steps) > 0.95 * longest
    upper, name = ("p50", "from p10 to p50") if is_cut else ("p90", "from p10 to p90")
    share = NormalDist().inv_cdf(0.9) * (1 if is_cut else 2)
    widths = [
        math.log(max(1.0, row[f"response_tokens_{upper}"]) / max(1.0, row["response_tokens_p10"]))
        for row in steps
    ]
    findings.found("responses.medianTokens", math.exp(log_median), source + "mean over the steps of ln p50")
    findings.found("responses.sigma", fmean(widths) / share, source + f"width of ln(tokens) {name}")
    findings.found("responses.longestTokens", longest, source + "the longest response")
    shortest = max(1.0, min(row["response_tokens_min"] for row in steps))
    findings.found("responses.shortestTokens", shortest, source + "the shortest response")
    prompt = max(1.0, fmean(row["prompt_tokens_mean"] for row in steps))
    findings.found("responses.promptTokens", prompt, source + "mean of the prompts")


def _find_trainer(steps: Sequence[StepLine], facts: RunFacts, findings: Findings) -> None:
    """Find the trainer's rates: seconds of updates are tokens / rate + minibatches x seconds of an update."""
    ranks, many = steps[-1]["num_ranks"], facts.minibatches
    tokens = np.array([row["num_pass_tokens"] / ranks for row in steps], float)
    proximal = np.array([row["proximal_seconds"] for row in steps], float) * facts.speedup
    updates = np.array([row["train_seconds"] for row in steps], float) * facts.speedup - proximal
    source = f"{facts.where}, {len(steps)} steps on {ranks} rank(s): "
    if many > 1 and proximal.sum() > 0:
        rate = tokens.sum() * (many - 1) / many / proximal.sum()
        findings.found("trainer.forwardTokensPerSecond", rate, source + "tokens of the proximal passes")
    else:
        findings.lacks(
            "trainer.forwardTokensPerSecond",
            "the run made no proximal pass; it takes training.minibatches of at least 2, and a loss that "
            "needs one",
        )
    if tokens.sum() <= 0 or updates.sum() <= 0:
        for name in ("updateTokensPerSecond", "secondsPerUpdate"):
            findings.lacks(f"trainer.{name}", "no step took any tokens through the model")
        return
    rate, per_update, how = _split_update(tokens, updates, many)
    findings.found("trainer.updateTokensPerSecond", rate, source + how)
    findings.found("trainer.secondsPerUpdate", per_update, source + how)
    if seconds := max(row.get("checkpoint_seconds", 0.0) for row in steps) * facts.speedup:
        findings.found("trainer.checkpointSeconds", seconds, source + "the longest checkpoint")
    else:
        findings.lacks("trainer.checkpointSeconds", "the run made no checkpoint before its last step")


def _split_update(tokens: Any, seconds: Any, minibatches: int) -> tuple[float, float, str]:
    """Return the rate, the seconds beside it of each update, and how they were told apart."""
    whole = tokens.sum() / seconds.sum()
    if tokens.std() < MIN_SPREAD * tokens.mean():
        return whole, 0.0, "all steps have about as many tokens: the whole time is laid to these"
    slope, intercept = np.polyfit(tokens, seconds, 1)
    if slope <= 0 or intercept <= 0:
        return whole, 0.0, "no time beside that of tokens can be seen in the steps"
    return 1 / slope, intercept / minibatches, "a line through the steps' seconds by their tokens"


def _find_weights(steps: Sequence[StepLine], facts: RunFacts, findings: Findings) -> None:
    source = f"{facts.where}, {len(steps)} steps: "
    seconds = median(
        row.get("update_transfer_seconds", 0.0) + row.get("update_load_seconds", 0.0) for row in steps
    )
    seconds *= facts.speedup
    if facts.num_bytes is None:
        findings.lacks("weights.numBytes", "the run has no export, whose files would tell the size")
        findings.lacks("weights.bytesPerSecond", "weights.numBytes is not known")
    else:
        findings.found("weights.numBytes", facts.num_bytes, facts.bytes_source)
        if seconds > 0:
            rate = facts.num_bytes / seconds
            findings.found("weights.bytesPerSecond", rate, source + "median of transfer and load")
        else:
            findings.lacks("weights.bytesPerSecond", "no step sent weights to an engine")
    findings.lacks("weights.joinSeconds", "metrics.jsonl does not say how long a weight group takes to form")
