"""An Attempt without torch ranks, broker and engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncrl_api.job import Spec
from asyncrl_api.report import Report
from asyncrl_runtime.history.ledger_writer import Ledger
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.books.checkpoints import Checkpoints
from asyncrl_runtime.trainer.metrics import Metrics
from asyncrl_runtime.trainer.seams import AttemptParts
from asyncrl_runtime.weights.fleet import Fleet
from support.fakes import FakeEvaluator, FakeRanks, FakeStreams, FakeWeights


async def here(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function at once: a thread would take real time, and virtual time would pass over it."""
    return function(*arguments)


def make_attempt_parts(
    folder: Path,
    spec: Spec,
    books: Books,
    streams: FakeStreams,
    ranks: FakeRanks,
    weights: FakeWeights,
    evaluator: FakeEvaluator | None,
    clock: Callable[[], float],
    attempt: int = 1,
) -> AttemptParts:
    """Return the parts of an Attempt: books and files are real, everything around them is fake."""
    ledger = Ledger(folder / "ledger.jsonl", attempt)
    ledger.claim("uid")
    report = Report(attempt=1, step=0, max_steps=1, state="Training")
    return AttemptParts(
        attempt=attempt,
        uid="uid",
        spec=spec,
        folder=folder,
        books=books,
        streams=streams,
        ledger=ledger,
        ranks=ranks,
        fleet=Fleet(clock),
        weights=weights,
        checkpoints=Checkpoints(folder, "uid", here),
        examiner=evaluator,
        metrics=Metrics(folder, folder / "report.json", report),
        clock=clock,
        in_thread=here,
    )
