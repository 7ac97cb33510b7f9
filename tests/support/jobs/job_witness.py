"""What a bystander of a job sees: the workers' heartbeats and resume points, and what its engines do."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Self

import httpx
from nats.aio.msg import Msg
from prometheus_client.parser import text_string_to_metric_families

from asyncrl_runtime.contract.messages import Group, Heartbeat, ResumePoint, decode, encode
from asyncrl_runtime.history.audit import Audit, audit
from support.jobs.job_harness import JobHarness, Recorder


class Witness(Recorder):
    """Keeps every group, every worker's last heartbeat, and the first resume point of every ticket."""

    def __init__(self, harness: JobHarness) -> None:
        super().__init__(harness)
        self.said: dict[str, Heartbeat] = {}
        self.parts: dict[int, ResumePoint] = {}
        """The first resume point of each ticket."""

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        assert self._broker is not None
        names = self._harness.config.names
        await self._broker.client.subscribe(names.heartbeat("*"), cb=self._heard)
        await self._broker.client.subscribe(f"{names.announcements}.part.*", cb=self._put_away)
        return self

    def held(self, replica: int) -> set[int]:
        """Return the tickets in a worker's hands, as it last reported them."""
        beat = self.said.get(f"rollout-{replica}")
        return set(beat.held) if beat is not None else set()

    async def next_word(self, worker: str) -> Heartbeat:
        before = self.said.get(worker)
        await self.until(f"{worker} speaks again", lambda: self.said.get(worker) is not before)
        return self.said[worker]

    async def until(self, what: str, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                f"{what}: not in {seconds} s\n{self._harness.log_tail('trainer')}"
            )
            await asyncio.sleep(0.02)

    async def delete_stream(self, name: str) -> None:
        assert self._broker is not None
        await self._broker.jetstream.delete_stream(name)

    async def publish(self, group: Group) -> None:
        """Store a group, as a worker does; whoever comes second with this ticket changes nothing."""
        assert self._broker is not None
        subject = self._harness.config.names.trajectory(group.ticket)
        headers = {"Nats-Msg-Id": str(group.ticket)}
        await self._broker.jetstream.publish(subject, encode(group), headers=headers)

    async def put(self, key: str, data: bytes) -> None:
        """Write into the job's state bucket, as its controller does."""
        assert self._broker is not None
        bucket = self._harness.config.names.state_bucket
        await self._broker.jetstream.publish(f"$KV.{bucket}.{key}", data)

    async def get(self, key: str) -> bytes:
        assert self._broker is not None
        bucket = self._harness.config.names.state_bucket
        message = await self._broker.jetstream.get_last_msg(f"KV_{bucket}", f"$KV.{bucket}.{key}")
        return message.data or b""

    async def num_messages(self, stream: str) -> int:
        assert self._broker is not None
        return int((await self._broker.jetstream.stream_info(stream)).state.messages)

    async def _heard(self, message: Msg) -> None:
        beat = decode(message.data, Heartbeat)
        self.said[beat.worker] = beat

    async def _put_away(self, message: Msg) -> None:
        if message.data:
            part = decode(message.data, ResumePoint)
            self.parts.setdefault(part.ticket, part)


class Engine:
    """One engine of a job, asked directly."""

    def __init__(self, harness: JobHarness, replica: int) -> None:
        self._http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{harness.engine_port(replica)}", timeout=60, trust_env=False
        )

    async def slow_down(self, seconds: float) -> None:
        """Make each forward pass last this much longer; wait for an engine that is still starting."""
        for _ in range(1200):
            try:
                await self._http.post("/slow_down", json={"forward_sleep_time": seconds})
                return
            except httpx.HTTPError:
                await asyncio.sleep(0.1)
        raise AssertionError(f"no engine at {self._http.base_url}")

    async def metric(self, name: str) -> float:
        text = (await self._http.get("/metrics")).text
        [value] = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"sglang:{name}"
        ]
        return float(value)

    async def until(self, name: str, reached: Callable[[float], bool], seconds: float = 120) -> None:
        """Wait until a metric reaches a value."""
        deadline = time.monotonic() + seconds
        while not reached(value := await self.metric(name)):
            assert time.monotonic() < deadline, f"{name} is {value} after {seconds} s"
            await asyncio.sleep(0.02)

    async def generate(self, **body: Any) -> Any:
        response = await self._http.post("/generate", json=body)
        assert response.status_code == 200, response.text
        return response.json()


async def finish(harness: JobHarness, *, code: int = 0, seconds: float = 180) -> Audit:
    """Wait for the trainer to end, and return the audit of its books, which must be clean."""
    ended_with = await asyncio.to_thread(harness.wait, "trainer", seconds)
    assert ended_with == code, harness.log_tail("trainer")
    result = audit(harness.history)
    assert result.missing == () and result.twice == (), result
    if code == 0:
        assert result.is_finished and result.num_steps == harness.step
    return result
