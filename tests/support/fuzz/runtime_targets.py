"""The parsers of trainer and worker: what a case does to each, and the real messages that it begins as."""

import asyncio
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import nats.js.errors

from asyncrl_api.exits import ExitError
from asyncrl_api.ledger import LedgerError, LedgerLine, read_history
from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_api.parsing import SpecError
from asyncrl_api.report import Report
from asyncrl_api.run_config import RunConfig, RunningSpec, live_values
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import (
    BucketLayout,
    CommitUpdate,
    ControlReply,
    CurrentVersion,
    EvaluationResult,
    EvaluationTicket,
    GroupPart,
    Heartbeat,
    JoinGroup,
    LoadAdapter,
    PolicyVersion,
    PrepareUpdate,
    ReceiveWeights,
    ResumePoint,
    SampleFailure,
    SampleProgress,
    Ticket,
    Tombstone,
    TurnRecord,
    VersionSpan,
    decode,
    decode_request,
    encode,
    floats_to_bytes,
    ids_to_bytes,
)
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.rollout.engine_api import EngineLost, EngineRefused, SamplingRequest
from asyncrl_runtime.rollout.engine_client import EngineClient
from asyncrl_runtime.rollout.rewards.frames import Failed, Scored, pack, receive
from asyncrl_runtime.rollout.rewards.service import parse_score
from asyncrl_runtime.rollout.ticket_work import fitting, parse_question, parse_ticket
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.books.checkpoints import Checkpoints, Position
from asyncrl_runtime.trainer.books.tickets import BookRecord, EndlessDiscards
from asyncrl_runtime.trainer.evaluation import Evaluator
from asyncrl_runtime.trainer.metrics import Metrics
from asyncrl_runtime.transport.broker import MalformedAnswer, StreamFull, _stored
from asyncrl_runtime.transport.lease import parse_holder
from asyncrl_runtime.transport.reader import _number, _sequences
from asyncrl_runtime.transport.trainer_end import parse_heartbeat, queued_tickets
from asyncrl_runtime.weights.engines import parse_reply
from support.fuzz.target import Target, parts
from support.messages.samples import make_group, make_job, make_sample

NUM_IDS = 256
SPEC = make_job("sampling.groupSize=2", "training.batchSize=2", "training.minibatches=1").spec
V = PolicyVersion(1, 0)
TURN = TurnRecord(
    input_ids=ids_to_bytes([1, 2]),
    output_ids=ids_to_bytes([3, 4]),
    logprobs=floats_to_bytes([-0.5, -0.1]),
    version_spans=(VersionSpan(1, 0, 2),),
    finish_reason="",
)


class _Stream:
    """The books of a trainer, which go on from case to case."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.books = Books(SPEC, attempt=2, vocabulary_size=NUM_IDS)
        self.books.begin(1)
        self.books.issued(0)
        self.books.issued(4)
        self.sequence = 0

    def take(self, case: bytes) -> None:
        subject, message_id, body = parts(case, 3)
        self.sequence += 1
        try:
            self.books.take(
                StreamMessage(
                    self.sequence, subject.decode(errors="replace"), body, message_id.decode(errors="replace")
                )
            )
            batch = self.books.next_batch()
        except EndlessDiscards:
            self._start()
            return
        assert self.books.inbox.last_sequence == self.sequence
        if batch is not None:
            self.books.close(batch)
            self.books.advance(batch)
            self.books.publish(self.books.version)
        self.books.issued(max(self.books.num_issued, self.books.limit))
        if self.books.version > 3 or self.sequence > 500:
            self._start()


def _stream_seeds() -> list[bytes]:
    seeds = []
    for ticket in (1, 2, 3, 7):
        group = make_group(ticket, [0, 0], attempt=1)
        part = GroupPart(ticket=ticket, group_size=2, outcome=make_sample(1, spans=[(1, 0, 4)]))
        dead = Tombstone(ticket=ticket, reason="generation_error", message="no", worker="w-0")
        for message, end in ((group, ""), (part, ".1"), (dead, "")):
            subject, name = f"rl.job.traj.{ticket}{end}", f"{ticket}{end.replace('.', '/')}"
            seeds.append(b"\n\n".join([subject.encode(), name.encode(), encode(message)]))
    return seeds


def _heartbeat(case: bytes) -> None:
    subject, body = parts(case, 2)
    parse_heartbeat(subject.decode(errors="replace"), body)


def _evaluator() -> Callable[[bytes], None]:
    rows = [{"question": "1+1"}] * 4
    evaluator = Evaluator(None, 1, rows, lambda: 0, lambda: 0.0, Refusals(), NUM_IDS)  # type: ignore[arg-type]
    return lambda case: assert_within(evaluator._taken(case, "1-1"), 4)


def assert_within(outcomes: Mapping[int, object], count: int) -> None:
    assert all(0 <= index < count for index in outcomes)


def _reply_subject(case: bytes) -> None:
    text = case.decode(errors="replace")
    _sequences(text)
    _number(text)
    PolicyVersion.parse(text)
    queued_tickets([text], Refusals())


def _live(case: bytes) -> None:
    spec = RunningSpec(SPEC)
    spec.take_over(json.loads(case))
    assert spec.live.training.max_steps >= SPEC.training.max_steps


def _version(case: bytes) -> None:
    decode(case, CurrentVersion)


def _resume(case: bytes) -> None:
    fitting(decode(case, ResumePoint), 7)


class _Client(EngineClient):
    """A client whose engine answers every call with the case."""

    case = b""

    async def _fetch(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        return self.case

    async def _receive(self, path: str, body: dict[str, Any], take: Callable[[bytes], None]) -> None:
        for line in self.case.split(b"\n"):
            with self._understanding(path):
                take(line)


class _Engine:
    """An engine that answers every call with the case."""

    def __init__(self, adapters: bool = False) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._connect(adapters))
        self._client.weights.version = PolicyVersion(1, 0)

    async def _connect(self, adapters: bool) -> _Client:
        return _Client("http://engine", NUM_IDS, samples_with_adapters=adapters)

    def generate(self, case: bytes) -> None:
        self._client.case = case
        asked = [SamplingRequest([1, 2], 4, 1.0, 0)] * 2
        for each in self._runner.run(self._client.generate(asked)):
            assert len(each.output_ids) == len(each.logprobs) <= 4

    def stream(self, case: bytes) -> None:
        self._client.case = case
        try:
            self._runner.run(self._client.stream(SamplingRequest([1, 2], 4, 1.0, 0)))
        finally:
            self._client.give_up()

    def control(self, case: bytes) -> None:
        self._client.case = case
        client = self._client
        if not case.startswith(b"{"):
            self._runner.run(client.load())
            return
        calls = (client.label, client.num_ranks, client.checksum, client.resume)
        self._runner.run(calls[zlib.crc32(case) % len(calls)]())


def _answer(ids: list[int]) -> dict[str, object]:
    meta = {
        "id": "a1",
        "completion_tokens": len(ids),
        "finish_reason": {"type": "stop", "matched": 2},
        "output_token_logprobs": [[-0.5, token, None] for token in ids],
        "weight_versions": [{"version": "1.0", "end": len(ids)}],
    }
    return {"text": "x", "output_ids": ids, "meta_info": meta}


def _chunks() -> list[bytes]:
    first, last = _answer([3]), _answer([3, 4])
    first["meta_info"]["finish_reason"] = None  # type: ignore[index]
    refusal = {"error": {"message": "no", "code": 400}}
    return [
        b"\n".join(json.dumps(each).encode() for each in chunks)
        for chunks in ([first, last], [last], [first, refusal])
    ]


def _frames() -> Callable[[bytes], None]:
    runner, decoder = asyncio.Runner(), msgspec.msgpack.Decoder(Scored | Failed)

    async def read(case: bytes) -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(case)
        reader.feed_eof()
        await receive(reader, decoder)

    return lambda case: runner.run(read(case))


def _ledger(case: bytes) -> None:
    read_history(case.decode(errors="surrogateescape").split("\n"))


def _lines() -> list[bytes]:
    lines = [
        LedgerLine(attempt=1, uid="u"),
        LedgerLine(attempt=1, began=0),
        LedgerLine(
            attempt=1,
            version=0,
            tickets=(1, 2),
            discards={"uniform": (3,)},
            live={"training": {"maxSteps": 9}},
        ),
        LedgerLine(attempt=2, cut=0),
        LedgerLine(attempt=2, issued=4, discards={"leftover": (1, 2, 4)}),
    ]
    texts = [msgspec.json.encode(line) for line in lines]
    return [*texts, b"\n".join(texts)]


class _Files:
    """A job's folder, in which one file is the case."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.checkpoint = self._folder / "checkpoints" / "step-000001"
        self.checkpoint.mkdir(parents=True)
        (self.checkpoint / "files.json").write_text("{}")
        (self.checkpoint / "position.json").write_bytes(_position())

    def position(self, case: bytes) -> None:
        (self.checkpoint / "position.json").write_bytes(case)
        Checkpoints(self._folder, "u").restorable()

    def listing(self, case: bytes) -> None:
        (self.checkpoint / "files.json").write_bytes(case)
        Checkpoints(self._folder, "u").restorable()

    def metrics(self, case: bytes) -> None:
        (self._folder / "metrics.jsonl").write_bytes(case)
        report = Report(attempt=1, step=0, max_steps=9, state="Training")
        Metrics(self._folder, self._folder / "report.json", report).rewind(3)

    def report(self, case: bytes) -> None:
        (self._folder / "report.json").write_bytes(case)
        Report.load(self._folder / "report.json")

    def config(self, case: bytes) -> None:
        (self._folder / "config.json").write_bytes(case)
        RunConfig.load(self._folder / "config.json")


def _position() -> bytes:
    position = Position(
        uid="u",
        version=1,
        began={1: 0},
        book=BookRecord(low=2, num_trained=2),
        stream_sequence=2,
        trajectory_stream="t",
        origin={},
    )
    return msgspec.json.encode(position)


def _config() -> bytes:
    config = RunConfig(
        namespace="n",
        name="j",
        uid="u",
        spec=SPEC,
        nats=NatsAddress(url="nats://x"),
        job_folder=Path("/j"),
        live_file=Path("/l"),
        report_file=Path("/r"),
        model_cache=Path("/c"),
    )
    return config.model_dump_json(by_alias=True, exclude_none=True).encode()


METRICS = b"""# TYPE sglang:token_usage gauge
sglang:token_usage{tp_rank="0"} 0.5
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{tp_rank="0"} 12
"""
HEARTBEAT = Heartbeat(
    worker="w-0", incarnation="a", engine="a.1", engine_state="ready", version=V, held=(1, 2)
)
REQUESTS = (
    JoinGroup(
        group="g",
        host="h",
        port=1,
        rank=1,
        world_size=2,
        backend="gloo",
        timeout_seconds=9.0,
        layout=(BucketLayout(("a",), ("f",), ((1,),)),),
    ),
    PrepareUpdate(groups=("g",), version=V, interrupt="Retract", timeout_seconds=9.0),
    ReceiveWeights(groups=("g",), version=V, timeout_seconds=9.0),
    CommitUpdate(groups=("g",), version=V),
    LoadAdapter(version=V, num_bytes=4, config="{}", interrupt="Retract", timeout_seconds=9.0),
)


def targets(folder: Path) -> list[Target]:
    """Return the targets; `folder` is for files."""
    return [*_of_trainer(), *_of_worker(), *_of_engines_and_rewards(), *_of_files(_Files(folder))]


def _of_trainer() -> list[Target]:
    failure = SampleFailure(index=1, reason="reward_error")
    answers = EvaluationResult(evaluation="1-1", outcomes=(make_sample(0), failure))
    reply = JobNames(job="job").heartbeat("w-0").encode() + b"\n\n" + encode(HEARTBEAT)
    stored = [
        b'{"stream":"S","seq":4,"duplicate":true}',
        b'{"error":{"code":503,"err_code":10077,"description":"full"}}',
    ]
    return [
        Target("trajectory", _stream_seeds(), _Stream().take),
        Target("heartbeat", [reply], _heartbeat, (ValueError,)),
        Target(
            "control-reply",
            [encode(ControlReply(ok=True, num_ranks=2))],
            lambda c: ignore(parse_reply(c)),
            (ValueError,),
        ),
        Target("evaluation-answer", [encode(answers)], _evaluator()),
        Target("lease", [b'{"attempt":1,"identity":"h-1"}'], lambda c: ignore(parse_holder(c))),
        Target(
            "subject",
            [b"$JS.ACK.S.c.1.4.4.1700000000000000000.0", b"rl.job.prompt.7", b"1.12"],
            _reply_subject,
        ),
        Target(
            "publish-answer",
            stored,
            lambda c: ignore(_stored(c, "s")),
            (StreamFull, MalformedAnswer, nats.js.errors.APIError),
        ),
    ]


def _of_worker() -> list[Target]:
    resume = ResumePoint(
        ticket=7, outcomes=(make_sample(0),), progress=(SampleProgress(index=1, turns=(TURN,)),)
    )
    ticket = Ticket(ticket=7, row={"question": "1+1"}, group_size=2, max_new_tokens=8, temperature=1.0)
    question = EvaluationTicket(evaluation="1-1", first_index=0, rows=({"question": "1"},), max_new_tokens=8)
    return [
        Target("ticket", [encode(ticket)], lambda c: ignore(parse_ticket(c, 7)), (ValueError,)),
        Target("question", [encode(question)], lambda c: ignore(parse_question(c)), (ValueError,)),
        Target(
            "control-request",
            [encode(each) for each in REQUESTS],
            lambda c: ignore(decode_request(c)),
            (ValueError,),
        ),
        Target("version", [encode(CurrentVersion(version=V, max_versions=2))], _version, (ValueError,)),
        Target(
            "live-values",
            [json.dumps(live_values(SPEC)).encode()],
            _live,
            (ValueError, RecursionError, SpecError),
        ),
        Target("resume-point", [encode(resume)], _resume, (ValueError,)),
    ]


def _of_engines_and_rewards() -> list[Target]:
    engine, lost = _Engine(), (EngineLost, EngineRefused)
    return [
        Target(
            "engine-answer", [json.dumps([_answer([3, 4]), _answer([5])]).encode()], engine.generate, lost
        ),
        Target(
            "engine-adapter-answer",
            [json.dumps([_answer([3]), _answer([])]).encode()],
            _Engine(True).generate,
            lost,
        ),
        Target("engine-stream", _chunks(), engine.stream, lost),
        Target(
            "engine-control",
            [b'{"weight_version":"1.0","tp_size":2,"per_engine_checksum":"x","success":true}', METRICS],
            engine.control,
            lost,
        ),
        Target(
            "reward-service",
            [b'{"reward":0.5,"feedback":"no"}'],
            lambda c: ignore(parse_score(c)),
            (ValueError,),
        ),
        Target(
            "reward-frame",
            [pack(Scored(1.0, "")), pack(Failed("x"))],
            _frames(),
            (EOFError, msgspec.DecodeError),
        ),
    ]


def _of_files(files: _Files) -> list[Target]:
    return [
        Target("ledger", _lines(), _ledger, (LedgerError,)),
        Target("position", [_position()], files.position, (ExitError,)),
        Target("files", [b'{"position.json": 12, "policy/x": 3}'], files.listing, (ExitError,)),
        Target("metrics", [b'{"step": 1, "loss": 0.5}\n{"step": 4}\n'], files.metrics),
        Target("report-file", [b'{"attempt":1,"step":2,"maxSteps":9,"state":"Training"}'], files.report),
        Target("run-config", [_config()], files.config, (ExitError,)),
    ]


def ignore(_: object) -> None:
    """Take a result that only had to be one."""
