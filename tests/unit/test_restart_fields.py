"""Every field marked R is edited on a running job, and after the restart the new value is in force.

What decides how a step is trained is tried in test_repeated_steps.py, and what DeepSpeed is begun with in
tests/integration/test_policy.py. Here stand the others, each with what is built from it.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from torch import Tensor

from asyncrl_api.job import AsyncRLJob, Metadata, Spec
from asyncrl_api.marks import merge, tree
from asyncrl_api.names import NatsAddress
from asyncrl_api.parsing import parse_spec
from asyncrl_api.run_config import RunConfig, RunningSpec
from asyncrl_operator.decide.desired import DesiredTrainer
from asyncrl_operator.render.manifests import Defaults, render_trainer
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import BucketLayout, Group, Ticket, decode, encode
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.trainer import assemble
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.books.tickets import TicketBook
from asyncrl_runtime.trainer.dataset import load_rows
from asyncrl_runtime.trainer.side_tasks import SideTasks
from asyncrl_runtime.weights.fleet import Fleet
from asyncrl_runtime.weights.publisher import WeightPublisher
from support.cluster.model_cluster import SMALL, ModelCluster
from support.fakes import FakeRanks, FakeStreams, FakeWeights
from support.jobs.attempt_parts import make_attempt_parts
from support.manifests.field_edits import BARE, FULL, Edit, edits_of
from support.messages.samples import make_sample
from support.paths import USER_CODE

RESTARTING = {
    node.path for top in tree(Spec) for node in top.walk() if not node.children and "R" in node.mark
}
DECIDE_A_STEP = {
    path
    for path in RESTARTING
    if path.startswith(("algorithm.", "training.")) and path != "training.batchSize"
}
OF_THE_POLICY = {
    "trainer.activationCheckpointing",
    "trainer.deepspeed.zeroStage",
    "trainer.deepspeed.config",
}
"""What `Policy` is made with: tests/integration/test_policy.py tries them."""
DEFAULTS = Defaults("localhost/runtime:1", "localhost/nats:1", ())
EDITS = {f"{edit.node.path} {edit.kind}": edit for edit in edits_of(BARE, FULL) if "R" in edit.node.mark}


def job_of(spec: Spec) -> AsyncRLJob:
    return AsyncRLJob(metadata=Metadata(name="gsm8k", namespace="team", uid="0b5e"), spec=spec)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_the_next_attempt_is_told_the_new_value(edit: Edit) -> None:
    """Its configuration is an object of its own: that of the attempt before never changes."""
    before, after = (
        render_trainer(job_of(spec), DEFAULTS, DesiredTrainer(number, 4))[0]
        for number, spec in ((1, Spec.model_validate(edit.before)), (2, edit.spec))
    )
    assert before["metadata"]["name"] != after["metadata"]["name"]
    assert RunConfig.model_validate_json(after["data"]["config.json"]).spec == edit.spec


class Case(NamedTuple):
    """A field, its value at first, the one that it is given, and what is looked at."""

    before: Any
    after: Any
    look: Callable[[Spec, Spec, Path], Any]
    """Called with the spec before the restart, the one after it, and an empty folder."""
    seen: Any
    """What it returns after the restart."""


# -- the operator: the trainer's Job


def pods(before: Spec, after: Spec, folder: Path) -> Any:
    """Return the template of the attempt that follows the edit, and how many pods and GPUs it has."""
    cluster = ModelCluster(before)
    cluster.run_until_still()
    cluster.replace(after)
    cluster.run_until_still()
    attempt = cluster.status.attempt
    assert attempt is not None and attempt.number == (1 if after == before else 2)
    gpus = cluster.job_gpus[f"gsm8k-trainer-{attempt.number}"]
    _, job = render_trainer(job_of(after), DEFAULTS, DesiredTrainer(attempt.number, gpus))
    return job["spec"]["completions"], gpus, job["spec"]["template"]


def image(*specs: Any) -> Any:
    return pods(*specs)[2]["spec"]["containers"][0]["image"]


def labels(*specs: Any) -> Any:
    return pods(*specs)[2]["metadata"]["labels"].get("team")


def sizes(*specs: Any) -> Any:
    """Return pods, GPUs, and GPUs of each pod."""
    num_pods, gpus, template = pods(*specs)
    limits = template["spec"]["containers"][0]["resources"]["limits"]
    return num_pods, gpus, int(limits["nvidia.com/gpu"])


def grace(before: Spec, after: Spec, folder: Path) -> Any:
    """Return the grace that the kubelet gives, and the one that the trainer reckons with."""
    books, own = Books(after), folder / str(len(list(folder.iterdir())))
    own.mkdir()
    parts = make_attempt_parts(
        own, after, books, FakeStreams(), FakeRanks(lambda _: None), FakeWeights(), None, lambda: 0.0
    )

    async def stopped() -> float:
        attempt = Attempt(parts, None)
        attempt.request_stop()
        return attempt._stop_at

    given = pods(before, after, folder)[2]["spec"]["terminationGracePeriodSeconds"]
    return given, asyncio.run(stopped())


# -- rank 0


class Resumed(NamedTuple):
    """What an attempt goes on with after twelve tickets, six of which an earlier one trained."""

    books: Books
    side_tasks: SideTasks


def resumed(before: Spec, after: Spec) -> Resumed:
    book = TicketBook()
    book.train(range(1, 7))
    books = Books(after, version=1, book=TicketBook.restore(book.record()), began={1: 0})
    books.issued(12)
    none = cast(Any, None)
    spec = RunningSpec(after)
    return Resumed(
        books, SideTasks(none, none, books, none, [{"question": "q"}], spec, Path("none"), lambda: 0.0)
    )


def group(ticket: int, size: int) -> bytes:
    samples = tuple(make_sample(index, reward=float(index % 2)) for index in range(size))
    return encode(Group(ticket=ticket, group_size=size, samples=samples))


def group_size(before: Spec, after: Spec, folder: Path) -> Any:
    """Return the size that new tickets ask for, and which groups are taken: the old ones keep theirs."""
    attempt = resumed(before, after)
    asked = decode(attempt.side_tasks._ticket(13), Ticket).group_size
    attempt.books.issued(13)
    old, new = before.sampling.group_size, after.sampling.group_size
    for sequence, (ticket, size) in enumerate(((7, old), (13, new)), 1):
        attempt.books.take(StreamMessage(sequence, f"rl.j.traj.{ticket}", group(ticket, size)))
    return asked, sorted(attempt.books.inbox.arrived)


def batch_size(before: Spec, after: Spec, folder: Path) -> Any:
    """Return how many tickets may be open, and how many groups the next step has."""
    books = resumed(before, after).books
    for ticket in range(7, 13):
        message = StreamMessage(ticket, f"rl.j.traj.{ticket}", group(ticket, after.sampling.group_size))
        books.take(message)
    batch = books.next_batch()
    assert batch is not None
    return books.limit - 6, len(batch.tickets)


def held_out(before: Spec, after: Spec, folder: Path) -> Any:
    """Return the answers of the rows that are held out."""
    return [row["answer"] for row in load_rows(after).held_out]


def publisher(before: Spec, after: Spec, folder: Path) -> Any:
    """Return the backend, the deadline and the buckets of whoever publishes weights."""
    config = RunConfig(
        namespace="team",
        name="job",
        uid="0b5e",
        spec=after,
        nats=NatsAddress(url="nats://127.0.0.1:1"),
        job_folder=folder,
        live_file=folder / "live.json",
        report_file=folder / "report.json",
        model_cache=folder,
    )
    none = cast(Any, None)
    ranks, options = cast(Any, Ranks()), assemble.Options(2, "127.0.0.1")
    copy = assemble.make_copy(after, ranks)
    made = assemble._make_publisher(config, options, none, Fleet(lambda: 0.0), ranks, copy, Refusals())
    assert isinstance(made, WeightPublisher)
    return made._backend, made._timeout, len(made.weights.layout)


class Ranks(FakeRanks):
    """The ranks of a model of eight weights of a megabyte."""

    trains_adapters = False
    num_bytes = 8 * 2**20

    def __init__(self) -> None:
        super().__init__(lambda _: None)
        self.policy = cast(Any, self)

    async def read_copy(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """Nobody asks for it here."""

    def shares(self, names: Sequence[str]) -> Iterator[Tensor]:
        """Nobody copies here."""
        return iter(())

    def layout(self, names: Sequence[str]) -> BucketLayout:
        return BucketLayout(tuple(names), ("float32",) * len(names), ((2**18,),) * len(names))

    def buckets(self, max_bytes: int) -> list[tuple[str, ...]]:
        per_bucket = max_bytes // 2**20
        names = [f"w{number}" for number in range(8)]
        return [tuple(names[start : start + per_bucket]) for start in range(0, 8, per_bucket)]


ROWS: dict[str, Any] = {"source": "harness_data:rows", "samples": 2}
CASES = {
    "sampling.groupSize": Case(2, 4, group_size, (4, [7, 13])),
    "training.batchSize": Case(4, 2, batch_size, (10, 2)),
    "evaluation.source": Case("file://{folder}/rows.jsonl", ROWS["source"], held_out, ["1001", "1002"]),
    "evaluation.split": Case("test", "train", held_out, ["1", "2"]),
    "evaluation.parameters": Case({"size": 1}, {"size": 40}, held_out, ["1001", "1002"]),
    "evaluation.samples": Case(2, 3, held_out, ["1001", "1002", "1003"]),
    "gpuBudget.split.trainer": Case(2, 4, sizes, (1, 4, 4)),
    "trainer.gpuGranularity": Case(1, 3, sizes, (1, 3, 3)),
    "trainer.gpusPerNode": Case(8, 2, sizes, (2, 4, 2)),
    "trainer.image": Case("", "localhost/other:1", image, "localhost/other:1"),
    "trainer.podTemplate": Case({}, {"metadata": {"labels": {"team": "a"}}}, labels, "a"),
    "trainer.terminationGracePeriodSeconds": Case(300, 120, grace, (120, 120.0)),
    "weightSync.backend": Case("Auto", "NCCL", publisher, ("nccl", 9.0, 4)),
    "weightSync.bucketMegabytes": Case(2, 4, publisher, ("gloo", 9.0, 2)),
    "weightSync.timeoutSeconds": Case(9, 77, publisher, ("gloo", 77.0, 4)),
}
WITH: dict[str, dict[str, Any]] = {
    "training": {"training": {"minibatches": 1}},
    "evaluation": {"dataset": {"source": ROWS["source"]}, "evaluation": ROWS},
    "gpuBudget": {"gpuBudget": {"mode": "Manual", "split": {"trainer": 2, "rollout": 2}}},
    "trainer": {"gpuBudget": {"mode": "Manual", "split": {"trainer": 4, "rollout": 4}}},
    "trainer.gpuGranularity": {},
    "weightSync": {"weightSync": {"bucketMegabytes": 2, "timeoutSeconds": 9}},
}
"""The other values that a case needs, or those of a block."""


def with_value(values: dict[str, Any], path: str, value: Any) -> Spec:
    """Return the spec with a value at a path, whose blocks need not be there."""
    nested: Any = value
    for name in reversed(path.split(".")):
        nested = {name: nested}
    return parse_spec(merge(values, nested))


@pytest.mark.parametrize("path", CASES)
def test_the_next_attempt_goes_by_the_new_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.syspath_prepend(USER_CODE)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}))
    case = CASES[path]
    values = merge(SMALL, WITH.get(path, WITH.get(path.partition(".")[0], {})))
    first = case.before.format(folder=tmp_path) if isinstance(case.before, str) else case.before
    before, after = with_value(values, path, first), with_value(values, path, case.after)
    assert case.look(before, before, tmp_path) != case.seen
    assert case.look(before, after, tmp_path) == case.seen


def test_every_field_that_restarts_the_trainer_is_tried() -> None:
    assert CASES.keys() | DECIDE_A_STEP | OF_THE_POLICY == RESTARTING
