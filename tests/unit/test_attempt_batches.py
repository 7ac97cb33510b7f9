"""How the training loop comes by the steps that it has to repeat."""

import asyncio
import errno
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from asyncrl_api.ledger import RecordedStep, read_ledger
from asyncrl_api.report import Report
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import Group, encode
from asyncrl_runtime.history.audit import audit
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books.books import Books, recorded_values
from asyncrl_runtime.trainer.job_streams import LostStreams
from asyncrl_runtime.trainer.train import train
from asyncrl_runtime.trainer.update.ranks import Export
from support.fakes import FakeRanks, FakeStreams, FakeWeights, run_in_virtual_time
from support.jobs.attempt_parts import make_attempt_parts
from support.messages.samples import make_group, make_job, make_sample


class SlowStreams(FakeStreams):
    """Asked whether everything is read, it answers when it is; meanwhile the reader has read on."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def has_read_everything(self) -> bool:
        for ticket in (1, 2):
            self._books.take(StreamMessage(ticket, f"rl.j.traj.{ticket}", encode(make_group(ticket))))
        return True


def test_a_recorded_step_that_is_read_while_it_is_looked_for_is_repeated(tmp_path: Path) -> None:
    """Otherwise a busy machine would give up steps that were trained."""

    async def check() -> None:
        spec = make_job("training.batchSize=2", "training.minibatches=1").spec
        step = RecordedStep(1, 0, (1, 2), {}, recorded_values(spec), {1: 0})
        books = Books(spec, recorded=[step])
        clock = asyncio.get_running_loop().time
        streams = SlowStreams(books)
        parts = make_attempt_parts(
            tmp_path, spec, books, streams, FakeRanks(lambda command: None), FakeWeights(), None, clock
        )
        batch = await Attempt(parts, None).next_batch()
        assert batch is not None and batch.is_repeat and batch.tickets == (1, 2)
        assert '"cut"' not in (tmp_path / "ledger.jsonl").read_text()

    run_in_virtual_time(check())


def test_what_an_update_spent_its_time_on_is_in_the_report_and_in_the_steps_line(tmp_path: Path) -> None:
    async def check() -> None:
        spec = make_job("training.batchSize=2", "training.minibatches=1").spec
        books = Books(spec)
        clock = asyncio.get_running_loop().time
        streams, ranks = SlowStreams(books), FakeRanks(lambda command: None)
        parts = make_attempt_parts(tmp_path, spec, books, streams, ranks, FakeWeights(), None, clock)
        attempt = Attempt(parts, None)
        await attempt.publish_weights()
        books.issued(2)
        await streams.has_read_everything()
        batch = await attempt.next_batch()
        assert batch is not None
        attempt.log_metrics(batch, {})

    run_in_virtual_time(check())
    report = Report.load(tmp_path / "report.json")
    assert report is not None
    assert (report.update_gather_seconds, report.update_transfer_seconds) == (1, 2)
    assert (report.update_load_seconds, report.update_pause_seconds) == (3, 4)
    [line] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line[f"update_{what}_seconds"] for what in ("gather", "transfer", "load", "pause")] == [
        1,
        2,
        3,
        4,
    ]


class LostTrajectories(FakeStreams):
    """The trajectory stream is gone, and with it the groups of the recorded steps."""

    def __init__(self, books: Books) -> None:
        super().__init__()
        self._books = books
        self.lost = LostStreams(trajectories=True)

    async def mend(self, give_up_recorded: Callable[[], Awaitable[None]]) -> None:
        self._books.streams_lost()
        await give_up_recorded()
        self.lost = LostStreams()
        for ticket in (1, 2):
            self._books.take(StreamMessage(ticket, f"rl.j.traj.{ticket}", encode(make_group(ticket))))


def test_a_disk_that_fails_while_lost_streams_are_mended_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that went with the stream are given up once the ledger says so, and not before."""
    number_of_tries = 0

    async def check() -> None:
        spec = make_job("training.batchSize=2", "training.minibatches=1").spec
        books = Books(spec, recorded=[RecordedStep(1, 0, (1, 2), {}, recorded_values(spec), {1: 0})])
        clock = asyncio.get_running_loop().time
        ranks = FakeRanks(lambda command: None)
        parts = make_attempt_parts(
            tmp_path, spec, books, LostTrajectories(books), ranks, FakeWeights(), None, clock
        )
        cut = parts.ledger.cut

        def full_for_a_minute(version: int) -> None:
            nonlocal number_of_tries
            number_of_tries += 1
            if clock() < 60:
                assert books.is_repeating
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            cut(version)

        monkeypatch.setattr(parts.ledger, "cut", full_for_a_minute)
        batch = await Attempt(parts, None).next_batch()
        assert batch is not None and not batch.is_repeat and clock() >= 60

    run_in_virtual_time(check())
    assert number_of_tries > 1
    assert '{"attempt":1,"cut":0}' in (tmp_path / "ledger.jsonl").read_text()


def test_a_job_whose_prompts_are_all_solved_ends_as_a_success(tmp_path: Path) -> None:
    """With its checkpoint, its export and a closed ledger, though steps are left."""
    spec = make_job(
        "training.batchSize=2",
        "training.minibatches=1",
        "sampling.filter=DropUniformGroups",
        "sampling.groupSize=2",
    ).spec
    books = Books(spec)
    books.issued(1000)
    for ticket in range(1, 1001):
        group = Group(ticket=ticket, group_size=2, samples=(make_sample(0), make_sample(1)))
        books.take(StreamMessage(ticket, f"rl.j.traj.{ticket}", encode(group)))

    def answer(command: object) -> None:
        if isinstance(command, Export):
            command.folder.mkdir(parents=True)

    async def check() -> str:
        clock = asyncio.get_running_loop().time
        ranks = FakeRanks(answer)
        parts = make_attempt_parts(tmp_path, spec, books, FakeStreams(), ranks, FakeWeights(), None, clock)
        return await train(Attempt(parts, None))

    assert run_in_virtual_time(check()) == "", "nothing has stopped it"
    report = Report.load(tmp_path / "report.json")
    assert report is not None and report.state == "Mastered" and "1000 of the last 1000" in report.message
    assert report.export == str(tmp_path / "export" / "final") and Path(report.export).is_dir()
    assert report.last_checkpoint is not None and report.last_checkpoint.step == 0
    result = audit(read_ledger(tmp_path / "ledger.jsonl"))
    assert result.is_finished and result.is_clean and result.discarded == {"uniform": 1000}
