"""Puts the trainer together, restores it, and runs it to its end: the command `asyncrl-runtime trainer`."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from asyncrl_api.base import parse_quantity
from asyncrl_api.doubts import doubts_about
from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import Spec
from asyncrl_api.ledger import History, LedgerError, read_ledger
from asyncrl_api.report import CheckpointReport, EvaluationReport, Report
from asyncrl_api.run_config import RunConfig, RunningSpec
from asyncrl_api.spec_views import FrozenSpec
from asyncrl_runtime.contract.broker import TrainerBroker, TransportError
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.contract.rows import prompt_text
from asyncrl_runtime.emulation.device import device_model_of
from asyncrl_runtime.emulation.emulated_copy import EmulatedCopy
from asyncrl_runtime.emulation.emulated_group import EmulatedGroups
from asyncrl_runtime.emulation.emulated_server import Pace
from asyncrl_runtime.history.ledger_writer import Ledger, Superseded
from asyncrl_runtime.model.source import (
    ensure_model,
    load_tokenizer,
    vocab_size,
    warmup_prompts,
    weight_names,
)
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.books.checkpoints import (
    FOLDER,
    Checkpoint,
    Checkpoints,
    Position,
    set_aside_strangers,
)
from asyncrl_runtime.trainer.books.failed_steps import MAX_FAILURES, step_to_give_up
from asyncrl_runtime.trainer.books.spill import read_spill
from asyncrl_runtime.trainer.books.tickets import EndlessDiscards, TicketBook
from asyncrl_runtime.trainer.checkpointing import origin_of
from asyncrl_runtime.trainer.cluster_report import copying_report
from asyncrl_runtime.trainer.dataset import Rows, count_shared, load_rows
from asyncrl_runtime.trainer.evaluation import Evaluator
from asyncrl_runtime.trainer.job_streams import JobStreams
from asyncrl_runtime.trainer.metrics import Metrics
from asyncrl_runtime.trainer.patience import Patience
from asyncrl_runtime.trainer.seams import AttemptParts
from asyncrl_runtime.trainer.side_tasks import SideTasks
from asyncrl_runtime.trainer.starting import Start
from asyncrl_runtime.trainer.step_faults import NumbersUnusable
from asyncrl_runtime.trainer.stopping import announced_disruption
from asyncrl_runtime.trainer.train import train
from asyncrl_runtime.trainer.update.emulated_policy import EmulatedPolicy
from asyncrl_runtime.trainer.update.failures import StepFailed
from asyncrl_runtime.trainer.update.policy import Policy
from asyncrl_runtime.trainer.update.policy_api import TrainedPolicy
from asyncrl_runtime.trainer.update.ranks import COMMAND_SECONDS, Load, PeerLost, Ranks, make_commands_group
from asyncrl_runtime.trainer.update.together import WorkStalled
from asyncrl_runtime.transport.trainer_end import TrainerEnd
from asyncrl_runtime.weights.adapter_publisher import AdapterPublisher
from asyncrl_runtime.weights.bucket import PublishedWeights
from asyncrl_runtime.weights.copies import AdapterCopy, ShareCopy, make_copy_group
from asyncrl_runtime.weights.engines import Publisher, WeightsRefused
from asyncrl_runtime.weights.fleet import Fleet
from asyncrl_runtime.weights.group import TorchGroups, WeightGroups
from asyncrl_runtime.weights.publisher import ChecksumMismatch, WeightPublisher

log = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005
"""How long a thread keeps the interpreter: at the default 5 ms a training step slows the broker's client."""


@dataclass(frozen=True)
class Options:
    """What one attempt is told beside the job's configuration."""

    attempt: int
    host: str
    """The address at which engines reach this process."""
    verify_weights: bool = False


def run_rank(config: RunConfig, options: Options, start: Start) -> None:
    """Run one rank of the trainer; torch.distributed's environment says which.

    Args:
        start: writes rank 0's report until the attempt does.

    Raises:
        ExitError: the trainer cannot go on; the message names the cause and the remedy.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    spec = config.spec
    folder = ensure_model(spec.model, config.model_cache, spec.training.seed)
    # Abort a communicator that hangs, and do nothing else: by default its watchdog ends the process as well,
    # but the trainer must outlive its engines.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=COMMAND_SECONDS))
    try:
        policy = make_policy(spec, folder)
        if spec.rollout.engine.type == "SGLang" and not policy.trains_adapters:
            check_names(policy, folder)
        tokenizer = load_tokenizer(folder)
        copy = make_copy(spec, policy)
        ranks = Ranks(policy, make_commands_group(), tokenizer, copy, start.clock)
        if dist.get_rank() == 0:
            if doubts := doubts_about(spec.algorithm):
                log.warning("%s", doubts)
            asyncio.run(_lead(config, options, folder, ranks, copy, start))
        else:
            for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 acts on them, and needs this one for it
                signal.signal(number, signal.SIG_IGN)
            ranks.follow()
    except (Superseded, TransportError, PeerLost, WorkStalled, OSError) as error:
        raise ExitError(ExitCode.TRY_AGAIN, f"{type(error).__name__}: {error}") from error
    except StepFailed as error:
        raise ExitError(
            ExitCode.STEP_FAILED, f"a recorded step cannot be trained; it is tried twice: {error}"
        ) from error
    except (EndlessDiscards, NumbersUnusable, ChecksumMismatch, LedgerError) as error:
        raise ExitError(ExitCode.UNUSABLE, str(error)) from error
    except WeightsRefused as error:
        raise ExitError(ExitCode.REFUSED, str(error)) from error
    finally:
        with contextlib.suppress(Exception):  # a lost peer must not hide the reason
            dist.destroy_process_group()


def make_policy(spec: Spec, folder: Path) -> TrainedPolicy:
    """Return this rank's policy; the other ranks make theirs.

    Raises:
        ExitError: the device model of an emulated one cannot be used.
    """
    if spec.trainer.backend == "Emulated":
        model, speedup = device_model_of(spec.emulation), spec.emulation.speedup
        return EmulatedPolicy(
            model, lambda seconds: time.sleep(seconds / speedup), gpus=1, world_size=dist.get_world_size()
        )
    return Policy(
        folder,
        dtype=spec.model.dtype,
        training=spec.training,
        algorithm=spec.algorithm,
        deepspeed=spec.trainer.deepspeed,
        activation_checkpointing=spec.trainer.activation_checkpointing,
    )


PublishedCopy = ShareCopy | AdapterCopy | EmulatedCopy


def make_copy(spec: Spec, policy: TrainedPolicy) -> PublishedCopy:
    """Return this rank's part of the copy from which engines get the policy; collective."""
    if policy.trains_adapters:
        return AdapterCopy(policy.adapter, is_rank_0=dist.get_rank() == 0)
    layout = [policy.layout(names) for names in policy.buckets(spec.weight_sync.bucket_megabytes * 2**20)]
    if isinstance(policy, EmulatedPolicy):
        return policy.make_copy(layout)
    has_gpu = torch.cuda.is_available()
    sends_from_gpu = has_gpu and choose_backend(spec, has_gpu=True) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if sends_from_gpu else None
    return ShareCopy(layout, policy.shares, make_copy_group(), device)


def make_groups(spec: Spec) -> WeightGroups:
    """Return what makes the weight groups of this trainer."""
    if spec.trainer.backend == "Emulated":
        return EmulatedGroups(device_model_of(spec.emulation), Pace(time.monotonic, spec.emulation.speedup))
    return TorchGroups()


def check_names(policy: TrainedPolicy, folder: Path) -> None:
    """Refuse a model whose weights have other names in transformers than in the files that SGLang loads.

    SGLang takes an update by the names in the files, and silently passes over what it does not know: its
    policy would never change. That is the case where transformers merges the experts of a mixture.

    Raises:
        ExitError: there is such a weight; the message names the first.
    """
    in_files = weight_names(folder)
    sent = (name for names in policy.buckets(1) for name in names)
    if in_files and (unknown := next((name for name in sent if name not in in_files), None)):
        raise ExitError(
            ExitCode.REFUSED,
            f"spec.model.source: {unknown} has another name in {folder}, and SGLang would pass over its "
            "updates; Llama, Qwen2 and Qwen3 are known to work",
        )


async def _lead(
    config: RunConfig,
    options: Options,
    model_folder: Path,
    ranks: Ranks,
    copy: PublishedCopy,
    start: Start,
) -> None:
    """Do rank 0's part: connect, take the lease, restore, train."""
    async with ranks.awake():  # a data set may take long to come
        rows = await asyncio.to_thread(load_rows, config.spec)
    storage_bytes = parse_quantity(config.spec.messaging.embedded.storage.size)
    name = f"trainer-{options.attempt}"
    refusals = Refusals()
    broker: TrainerBroker = await TrainerEnd.connect(config.nats, config.names, name, storage_bytes, refusals)
    try:
        await broker.take_lease(options.attempt, f"{socket.gethostname()}-{os.getpid()}")
        fleet = Fleet(time.monotonic)
        await broker.hear_heartbeats(fleet.heard, fleet.was_deaf)
        async with ranks.awake():
            parts, side_tasks, restored = await _open_parts(
                config, options, model_folder, ranks, copy, rows, broker, fleet, start, refusals
            )
            attempt = Attempt(parts, restored)
            if restored is None:
                await attempt.open_history()
        # From memory: a disk that does not take the report must not hide that it fails.
        async with copying_report(config, time.monotonic, lambda: parts.metrics.report):
            await _run_beside(attempt, parts, side_tasks, broker)
    finally:
        await broker.close()


async def _run_beside(
    attempt: Attempt, parts: AttemptParts, side_tasks: SideTasks, broker: TrainerBroker
) -> None:
    """Train, with everything that runs beside it; whatever ends first ends everything."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, attempt.request_stop)
    loops: dict[str, Coroutine[Any, Any, Any]] = {
        **side_tasks.loops(),
        "lease": broker.keep_lease(),
        "report": parts.metrics.keep_renewed(),
        "broker": broker.closed.wait(),
        "event loop": parts.loop_watch.run(),
    }
    if dist.get_world_size() > 1:
        loops["ranks"] = parts.ranks.keep_awake()
    training = asyncio.create_task(train(attempt), name="train")
    beside: list[asyncio.Task[Any]] = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]
    try:
        await asyncio.wait({training, *beside}, return_when=asyncio.FIRST_COMPLETED)
        for task in beside:
            if task.done():
                task.result()
                raise TransportError(f"{task.get_name()}: ended, and the job cannot go on without it")
        if stopped := await training:
            raise ExitError(ExitCode.TRY_AGAIN, stopped)
    finally:
        for task in (training, *beside):
            task.cancel()


async def _open_parts(
    config: RunConfig,
    options: Options,
    model_folder: Path,
    ranks: Ranks,
    copy: PublishedCopy,
    rows: Rows,
    broker: TrainerBroker,
    fleet: Fleet,
    start: Start,
    refusals: Refusals,
) -> tuple[AttemptParts, SideTasks, Position | None]:
    """Claim the history, restore the newest checkpoint of it, and find or make the streams."""
    path = config.job_folder / "ledger.jsonl"
    ledger = Ledger(path, options.attempt)
    patience = Patience(start.tell_disk_fault, asyncio.Event())
    history = await patience.insist("the ledger", partial(asyncio.to_thread, claim, config, ledger))
    give_up = partial(asyncio.to_thread, give_up_failed_step, ledger, path, history)
    history = await patience.insist("the ledger", give_up)
    checkpoints = Checkpoints(config.job_folder, config.uid)
    checkpoint = choose_checkpoint(config, checkpoints, history)
    if checkpoint is None and history.steps:
        await patience.insist("the ledger", partial(asyncio.to_thread, ledger.cut, 0))
        history = read_ledger(path)
    await _load_policy(config, ranks, checkpoint)

    num_ids = vocab_size(model_folder)
    books = restore_books(config, options.attempt, checkpoint, history, refusals, num_ids)
    spec = RunningSpec(config.spec)
    streams = JobStreams(broker, books, spec.live_values())
    side_tasks = SideTasks(
        broker, streams, books, fleet, rows.training, spec, config.live_file, time.monotonic
    )
    side_tasks.read_live_values()
    await streams.open(None if checkpoint is None else checkpoint.position.trajectory_stream)

    parts = AttemptParts(
        attempt=options.attempt,
        uid=config.uid,
        spec=spec.frozen,
        folder=config.job_folder,
        books=books,
        streams=streams,
        ledger=ledger,
        ranks=ranks,
        fleet=fleet,
        weights=_make_publisher(config, options, broker, fleet, ranks, copy, refusals),
        checkpoints=checkpoints,
        disruption=lambda: announced_disruption(config.live_file),
        examiner=_make_evaluator(options, broker, streams, rows, refusals, num_ids),
        metrics=_open_metrics(config, options, books, checkpoint, rows, model_folder, start),
        failures=tuple(history.failures),
    )
    rewind = partial(asyncio.to_thread, parts.metrics.rewind, books.version)
    await Patience(parts.metrics.tell_disk_fault, asyncio.Event()).insist("metrics.jsonl", rewind)
    return parts, side_tasks, None if checkpoint is None else checkpoint.position


def claim(config: RunConfig, ledger: Ledger) -> History:
    """Make the job's folder, move what another object has left out of the way, and claim the ledger.

    Raises:
        OSError: the disk does not take it; this may be tried again.
    """
    config.job_folder.mkdir(parents=True, exist_ok=True)  # a claim is empty at first
    path = config.job_folder / "ledger.jsonl"
    set_aside_strangers(config.job_folder, config.uid, read_ledger(path).uid)
    return ledger.claim(config.uid)


def give_up_failed_step(ledger: Ledger, path: Path, history: History) -> History:
    """Give up a step that has failed too often by its own fault; return the history without it.

    Raises:
        OSError: the disk does not take it; this may be tried again.
    """
    if (given_up := step_to_give_up(history)) is None:
        return history
    text = "step %d failed %d times and is given up: %s"
    log.warning(text, given_up.version + 1, MAX_FAILURES, given_up.cause)
    ledger.cut(given_up.version, given_up.discards)
    return read_ledger(path)


def choose_checkpoint(config: RunConfig, checkpoints: Checkpoints, history: History) -> Checkpoint | None:
    """Return the newest whole checkpoint of the surviving history; None to begin at version 0.

    Raises:
        ExitError: the checkpoint was made with another model, data set or seed.
    """
    if config.spec.checkpoint.resume == "Never":
        checkpoints.drop_after(-1)
        return None
    checkpoints.drop_after(history.version)  # those of a history that was cut
    kept = (each for each in checkpoints.restorable() if each.position.version <= history.version)
    checkpoint = next(kept, None)  # a read-only disk keeps what was to be deleted
    if checkpoint is None:
        return None
    made_under, now = checkpoint.position.origin, origin_of(config.spec)
    for block, values in now.items():
        for field, value in values.items():
            if (before := made_under.get(block, {}).get(field)) != value:
                raise ExitError(
                    ExitCode.REFUSED,
                    f"checkpoint {checkpoint.folder} is from another manifest: spec.{block}.{field} was "
                    f"{before!r}, now it is {value!r}; restore the value, or begin in another folder",
                )
    log.info("restoring %s", checkpoint.folder)
    return checkpoint


def restore_books(
    config: RunConfig,
    attempt: int,
    checkpoint: Checkpoint | None,
    history: History,
    refusals: Refusals,
    vocabulary_size: int,
) -> Books:
    """Return the books as the checkpoint has them; later steps of the ledger are to be repeated."""
    make = partial(Books, config.spec, attempt=attempt, vocabulary_size=vocabulary_size, refusals=refusals)
    if checkpoint is None:
        books = make()
    else:
        position = checkpoint.position
        books = make(
            version=position.version,
            book=TicketBook.restore(position.book),
            recorded=history.steps[position.version :],
            began=history.began,
            position=position.stream_sequence,
            rewards=position.rewards,
        )
        _take_spilled(books, checkpoint.folder)
    # The job was over, and has been given more steps; or a step was given up, with some of its tickets.
    books.add_discards(history.left_over)
    return books


def _take_spilled(books: Books, folder: Path) -> None:
    """Take what the stream no longer holds because the checkpoint has it."""
    try:
        for message in read_spill(folder):
            books.take(message)
    except (OSError, msgspec.DecodeError) as error:  # its steps cannot be repeated, and are given up
        log.error("trajectories beside checkpoint %s cannot be read: %s", folder, error)


async def _load_policy(config: RunConfig, ranks: Ranks, checkpoint: Checkpoint | None) -> None:
    spec = config.spec.checkpoint
    if checkpoint is not None and checkpoint.has_policy:
        folder = checkpoint.policy_folder
    elif spec.resume == "FromPath":
        folder = Path(spec.resume_path) / "policy"
        if not folder.is_dir():
            raise ExitError(
                ExitCode.REFUSED,
                f"spec.checkpoint.resumePath: {spec.resume_path}: no checkpoint there (no folder policy)",
            )
    else:
        return
    try:
        await ranks.run(Load(folder, config.job_folder / FOLDER / "resized.tmp"))
    except ValueError as error:
        raise ExitError(ExitCode.REFUSED, str(error)) from error


def _make_publisher(
    config: RunConfig,
    options: Options,
    broker: TrainerBroker,
    fleet: Fleet,
    ranks: Ranks,
    copy: PublishedCopy,
    refusals: Refusals,
) -> Publisher:
    """Return the publisher of the kind of weights that is trained: who publishes need not ask."""
    spec = config.spec.weight_sync
    if isinstance(copy, AdapterCopy):
        return AdapterPublisher(
            broker,
            config.names,
            fleet,
            partial(ranks.read_copy, copy.load),
            attempt=options.attempt,
            num_bytes=ranks.policy.num_bytes,
            timeout_seconds=spec.timeout_seconds,
            refusals=refusals,
        )

    return WeightPublisher(
        broker,
        config.names,
        fleet,
        PublishedWeights(copy.layout, partial(ranks.read_copy, copy.gather)),
        make_groups(config.spec),
        attempt=options.attempt,
        host=options.host,
        backend=choose_backend(config.spec, has_gpu=torch.cuda.is_available()),
        model_bytes=ranks.policy.num_bytes,
        timeout_seconds=spec.timeout_seconds,
        verify=options.verify_weights,
        refusals=refusals,
    )


def choose_backend(spec: FrozenSpec, *, has_gpu: bool) -> str:
    """Return torch's name for the library by which weights travel; engines on CPUs have only gloo.

    Args:
        has_gpu: whether this trainer runs on a GPU.
    """
    if spec.weight_sync.backend != "Auto":
        return spec.weight_sync.backend.lower()
    return "nccl" if has_gpu and spec.rollout.engine.type == "SGLang" else "gloo"


def _make_evaluator(
    options: Options,
    broker: TrainerBroker,
    streams: JobStreams,
    rows: Rows,
    refusals: Refusals,
    vocabulary_size: int,
) -> Evaluator | None:
    if not rows.held_out:
        return None
    return Evaluator(
        broker,
        options.attempt,
        rows.held_out,
        lambda: streams.generation,
        time.monotonic,
        refusals,
        vocabulary_size,
    )


def _open_metrics(
    config: RunConfig,
    options: Options,
    books: Books,
    checkpoint: Checkpoint | None,
    rows: Rows,
    model_folder: Path,
    start: Start,
) -> Metrics:
    """Open the metrics at the restored step; count held-out prompts that occur in training or warm-up."""
    field = config.spec.dataset.prompt_field
    training = (prompt_text(row, field) for row in rows.training)
    start.end()  # from here on the report is ours
    before = Report.load(config.report_file)
    first = None if checkpoint is None else checkpoint.position.first_evaluation
    report = Report(
        attempt=options.attempt,
        step=books.version,
        max_steps=books.live.training.max_steps,
        state="Starting",
        first_evaluation=None if first is None else EvaluationReport.model_validate(first),
        last_evaluation=None if before is None or checkpoint is None else before.last_evaluation,
        last_checkpoint=None if checkpoint is None else _report_of(checkpoint),
        num_held_out_in_training=count_shared(training, rows.held_out, field),
        num_held_out_in_warmup=count_shared(warmup_prompts(model_folder), rows.held_out, field),
    )
    without = start.clock.seconds_without_progress
    metrics = Metrics(config.job_folder, config.report_file, report, seconds_without_progress=without)
    metrics.update()
    log.info(
        "%d rows to train on, %d held out; held-out prompts that occur in training: %d, in warm-up: %d",
        len(rows.training),
        len(rows.held_out),
        report.num_held_out_in_training,
        report.num_held_out_in_warmup,
    )
    return metrics


def _report_of(checkpoint: Checkpoint) -> CheckpointReport:
    made_at = datetime.fromtimestamp(checkpoint.folder.stat().st_mtime, UTC)
    return CheckpointReport(
        step=checkpoint.position.version,
        path=str(checkpoint.folder),
        time=made_at.isoformat(timespec="seconds"),
    )
