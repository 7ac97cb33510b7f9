"""How the training loop comes by the steps that it has to repeat."""

import asyncio
from pathlib import Path

from asyncrl_api.ledger import RecordedStep
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import encode
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books.books import Books, recorded_values
from support.fakes import FakeRanks, FakeStreams, FakeWeights, run_in_virtual_time
from support.jobs.attempt_parts import make_attempt_parts
from support.messages.samples import make_group, make_job


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
