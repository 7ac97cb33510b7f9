"""Messages that a worker's password is enough to publish, amid a job: it ends as if there were none."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from asyncrl_api.names import NatsAddress
from asyncrl_runtime.contract.messages import EvaluationResult, Tombstone, encode
from asyncrl_runtime.transport.broker import Broker
from support.jobs.job_harness import JobHarness, build_job, until
from support.jobs.job_witness import Engine, finish
from support.jobs.nats_server import NatsServer

FAR = 1_000_000


@asynccontextmanager
async def publisher(harness: JobHarness) -> AsyncIterator[Broker]:
    broker = await Broker.connect(NatsAddress(url=harness.nats.url), harness.config.names, "stranger")
    try:
        yield broker
    finally:
        await broker.close()


async def publish_poison(broker: Broker, harness: JobHarness) -> None:
    """Publish on every subject on which a worker may, and keys that it or the trainer writes."""
    names = harness.config.names
    far = encode(Tombstone(ticket=FAR, reason="generation_error"))
    for subject, data in (
        (names.trajectory("x"), b"\xc1"),
        (names.trajectory("x"), far),
        (names.trajectory(FAR), far),
        (names.trajectory(1), far),
        (names.evaluation("answer", "x"), b"\xc1"),
        (names.evaluation("answer", "y"), encode(EvaluationResult(evaluation="1-1", outcomes=()))),
        (names.evaluation("ask", "x"), b"\xc1"),
        (f"$KV.{names.state_bucket}.version", b"\xc1"),
        (f"$KV.{names.state_bucket}.live", b"[]"),
        *((f"$KV.{names.state_bucket}.part.{ticket}", b"\xc1") for ticket in range(1, 20)),
    ):
        await broker.jetstream.publish(subject, data)
    for _ in range(200):
        await broker.client.publish(names.heartbeat("stranger"), b"\x91" * 3000)
    await broker.client.publish(names.control("rollout-0"), b"\xc1")
    await broker.client.flush()


async def test_a_job_ends_as_usual_whatever_a_worker_publishes(own_nats: NatsServer, tmp_path: Path) -> None:
    job = build_job(training={"maxSteps": 5}, checkpoint={"everySteps": 100})
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        harness.start_rollout(0)
        await Engine(harness, 0).slow_down(0.05)
        harness.start_trainer()
        await until(lambda: harness.step >= 1)
        async with publisher(harness) as broker:
            await publish_poison(broker, harness)
        await until(lambda: bool(harness.metrics) and harness.metrics[-1]["refused_messages"] >= 200)
        harness.kill(
            "trainer"
        )  # there is no checkpoint behind the messages, so the next attempt reads them too
        await Engine(harness, 0).slow_down(0)
        harness.start_trainer()
        result = await finish(harness)
        assert result.num_steps == 5
        assert harness.history.num_issued is not None and harness.history.num_issued < 100
        assert harness.report is not None and harness.report.num_refused_messages
        said = [line for line in harness.log_text("trainer").splitlines() if "refused: " in line]
        assert len(said) < 30 and any("trajectory without a ticket" in line for line in said)
        assert "heartbeat" in "".join(said)
