"""Scores a checkpoint on the held-out prompts, without the job: the command `asyncrl eval`."""

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.processes import die_with_parent
from asyncrl_api.run_config import RunConfig
from asyncrl_runtime.contract.messages import EVALUATION_ROWS, PolicyVersion, Sample, SampleFailure
from asyncrl_runtime.contract.rows import PromptError
from asyncrl_runtime.model.source import ensure_model, load_tokenizer, vocab_size
from asyncrl_runtime.rollout.concurrency import Slots
from asyncrl_runtime.rollout.engine_api import Engine, EngineLost
from asyncrl_runtime.rollout.engine_client import EngineClient
from asyncrl_runtime.rollout.group_runner import GroupRunner, GroupTask, HandedBack, SampleOutcome
from asyncrl_runtime.rollout.prompts import PromptRenderer
from asyncrl_runtime.rollout.rewards.scorer import make_scorer
from asyncrl_runtime.rollout.session import PromptTooLong, SampleLimits
from asyncrl_runtime.rollout.workflows import make_workflow
from asyncrl_runtime.trainer.books.checkpoints import Checkpoint, Checkpoints
from asyncrl_runtime.trainer.dataset import load_rows
from asyncrl_runtime.trainer.update.policy import Policy
from asyncrl_runtime.trainer.update.saved_files import ignore

log = logging.getLogger(__name__)

START_SECONDS = 300.0
"""The time that an engine has to load the model."""
TICKETS_AT_ONCE = 4


def evaluate_checkpoint(config: RunConfig, step: int | None) -> str:
    """Answer every held-out prompt greedily with a checkpoint's policy and return the result as text.

    Args:
        step: the step of the checkpoint; None: the newest one.

    Raises:
        ExitError: no prompts are held out, or there is no such checkpoint.
    """
    rows = load_rows(config.spec).held_out
    if not rows:
        raise ExitError(ExitCode.USAGE, "spec.evaluation is absent: there are no held-out prompts to score")
    checkpoint = _find(config, step)
    with tempfile.TemporaryDirectory(prefix="asyncrl-eval-") as scratch:
        folder = _export(config, checkpoint, Path(scratch))
        version = PolicyVersion(0, checkpoint.position.version)
        outcomes = asyncio.run(_answer(config, folder, rows, version))
    samples = [outcome for outcome in outcomes if isinstance(outcome, Sample)]
    accuracy = sum(sample.reward for sample in samples) / len(outcomes)
    failed = len(outcomes) - len(samples)
    return (
        f"step {checkpoint.position.version}: held-out accuracy {accuracy:.1%} of {len(outcomes)} prompts"
        + (f" ({failed} without an answer count as 0)" if failed else "")
    )


def _find(config: RunConfig, step: int | None) -> Checkpoint:
    checkpoints = Checkpoints(config.job_folder, config.uid).restorable()
    for checkpoint in checkpoints:
        if step in (None, checkpoint.position.version):
            return checkpoint
    there = ", ".join(str(c.position.version) for c in checkpoints) or "none"
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    raise ExitError(ExitCode.USAGE, f"{config.job_folder} has no {wanted}; there are: {there}")


def _export(config: RunConfig, checkpoint: Checkpoint, scratch: Path) -> Path:
    """Return a Hugging Face folder with the policy of a checkpoint."""
    spec = config.spec
    source = ensure_model(spec.model, config.model_cache, spec.training.seed)
    if not checkpoint.has_policy:
        return source
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    policy = Policy(
        source,
        dtype=spec.model.dtype,
        training=spec.training,
        algorithm=spec.algorithm,
        deepspeed=spec.trainer.deepspeed,
        activation_checkpointing=spec.trainer.activation_checkpointing,
    )
    try:
        resized = scratch.with_suffix(".resized")
        policy.convert(checkpoint.policy_folder, resized)(ignore)
        policy.load(checkpoint.policy_folder, resized)
    except ValueError as error:
        raise ExitError(ExitCode.REFUSED, str(error)) from error
    policy.export_whole(source, scratch, load_tokenizer(source))
    return scratch


async def _answer(
    config: RunConfig, folder: Path, rows: Sequence[dict[str, Any]], version: PolicyVersion
) -> list[SampleOutcome]:
    spec = config.spec
    renderer = PromptRenderer(load_tokenizer(folder), spec.dataset.prompt_field, spec.workflow.system_prompt)
    limits = SampleLimits(spec.sampling.max_new_tokens, spec.model.context_length, temperature=0.0)
    slots, gate = Slots(), asyncio.Semaphore(TICKETS_AT_ONCE)
    scorer = make_scorer(
        spec.reward,
        answer_field=spec.dataset.answer_field,
        import_paths=config.import_paths,
        num_processes=1,
    )
    async with _engine(config, folder, version) as engine, scorer:
        runner = GroupRunner(engine, renderer, make_workflow(spec.workflow), scorer, lambda: None)

        async def answer(start: int) -> list[SampleOutcome]:
            chosen = dict(enumerate(rows[start : start + EVALUATION_ROWS], start=start))
            task = GroupTask(0, chosen, limits, seeds=lambda sample, turn: 0)
            async with gate:
                try:
                    return await runner.run(task, slots.take(len(chosen)))
                except (PromptTooLong, PromptError) as error:
                    return [SampleFailure(index=i, reason="unusable_row", message=str(error)) for i in chosen]
                except HandedBack as error:
                    raise ExitError(ExitCode.TRY_AGAIN, f"the engine went away: {error}") from error

        answered = await asyncio.gather(*(answer(s) for s in range(0, len(rows), EVALUATION_ROWS)))
    return [outcome for outcomes in answered for outcome in outcomes]


@contextlib.asynccontextmanager
async def _engine(config: RunConfig, folder: Path, version: PolicyVersion) -> AsyncIterator[Engine]:
    """Run a CPU engine on `folder`, labeled with `version`, for as long as the context lasts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dtype = "bfloat16" if config.spec.model.dtype == "BFloat16" else "float32"
    command = [sys.executable, "-m", "asyncrl_runtime.engine", str(folder), "--port", str(port)]
    command += ["--dtype", dtype, "--context-length", str(config.spec.model.context_length)]
    command += ["--max-running-requests", str(TICKETS_AT_ONCE * EVALUATION_ROWS)]
    with subprocess.Popen(command, preexec_fn=die_with_parent) as process:  # noqa: PLW1509, ASYNC220
        engine = EngineClient(f"http://127.0.0.1:{port}", vocab_size(folder))
        try:
            await _wait_until_it_answers(engine, process)
            await engine.set_label(version, aborts=False)
            yield engine
        finally:
            await engine.close()
            process.terminate()


async def _wait_until_it_answers(engine: Engine, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            await engine.label()
            return
        except EngineLost as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise ExitError(ExitCode.TRY_AGAIN, f"the engine did not start: {error}") from error
            await asyncio.sleep(0.2)
