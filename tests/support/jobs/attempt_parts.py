"""An Attempt without torch ranks, broker and engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from asyncrl_api.report import Report
from asyncrl_runtime.history.ledger_writer import Ledger
from asyncrl_runtime.trainer.attempt import AttemptParts
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.books.checkpoints import Checkpoints
from asyncrl_runtime.trainer.metrics import Metrics
from asyncrl_runtime.transport.fleet import Fleet
from support.fakes import FakeEvaluator, FakeRanks, FakeSideTasks, FakeWeights


def make_attempt_parts(
    folder: Path,
    books: Books,
    side_tasks: FakeSideTasks,
    ranks: FakeRanks,
    weights: FakeWeights,
    evaluator: FakeEvaluator | None,
    clock: Callable[[], float],
) -> AttemptParts:
    """Return what an Attempt is made of: books and files are real, what is around them is not."""
    ledger = Ledger(folder / "ledger.jsonl", 1)
    ledger.claim("uid")
    report = Report(attempt=1, step=0, max_steps=1, state="Training")
    return AttemptParts(
        attempt=1,
        uid="uid",
        spec=books.spec,
        folder=folder,
        books=books,
        side_tasks=cast(Any, side_tasks),
        ledger=ledger,
        ranks=cast(Any, ranks),
        fleet=Fleet(clock),
        weights=weights,
        checkpoints=Checkpoints(folder, "uid"),
        evaluator=cast(Any, evaluator),
        metrics=Metrics(folder, folder / "report.json", report),
        clock=clock,
    )
