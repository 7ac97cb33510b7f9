"""An emulated engine in the worker's own process, behind the Protocol by which a worker knows its engine."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from asyncrl_runtime.contract.messages import JoinGroup, PolicyVersion, VersionSpan
from asyncrl_runtime.emulation.device import DeviceModel
from asyncrl_runtime.emulation.emulated_group import bucket_bytes, transfer_seconds
from asyncrl_runtime.emulation.emulated_server import EmulatedAnswer, EmulatedRequest, EmulatedServer, Pace
from asyncrl_runtime.rollout.engine_api import (
    EngineLoad,
    EngineRefused,
    Generation,
    IncomingBucket,
    SamplingRequest,
    WeightsSeen,
)


class EmulatedEngine:
    """Implements rollout.engine_api.Engine. It never fails, and nobody restarts it."""

    is_in_doubt = False

    def __init__(self, name: str, server: EmulatedServer, model: DeviceModel, pace: Pace) -> None:
        self.name = name
        self.weights = WeightsSeen()
        self.server = server
        self._model = model
        self._pace = pace
        self.num_requests = 0

    async def close(self) -> None:
        pass

    def give_up(self) -> None:
        self.server.abort_all()

    # -- sampling

    async def generate(
        self, requests: Sequence[SamplingRequest], *, cache_salt: str | None = None
    ) -> list[Generation]:
        return list(await asyncio.gather(*(self.stream(each, cache_salt=cache_salt) for each in requests)))

    async def stream(self, request: SamplingRequest, *, cache_salt: str | None = None) -> Generation:
        self.num_requests += 1
        try:
            asked = EmulatedRequest(request.input_ids, request.max_new_tokens, request.seed)
            return _generation(await self.server.sample(asked))
        finally:
            self.num_requests -= 1

    async def abort_all(self) -> None:
        self.server.abort_all()

    # -- health

    async def label(self) -> str:
        return self.server.label

    async def num_ranks(self) -> int:
        return self._model.engine.gpus

    async def load(self) -> EngineLoad:
        totals = self.server.totals
        return EngineLoad(
            kv_usage=self.server.kv_usage,
            num_queued=self.server.num_queued,
            num_retracted=totals.retractions,
            num_generated_tokens=self.server.num_generated_tokens,
            num_used_tokens=self.server.num_used_tokens,
        )

    async def take_over(self) -> None:
        self.server.abort_all()

    # -- updates of all weights

    async def join_group(self, request: JoinGroup) -> None:
        await self._pace.sleep(self._model.weights.join_seconds)

    async def leave_group(self, group: str) -> None:
        pass

    async def pause(self, interrupt: str) -> None:
        self.server.pause(retract=interrupt != "InPlace")

    async def begin_update(self) -> None:
        pass

    async def receive_bucket(self, bucket: IncomingBucket, *, keeps_cache: bool) -> None:
        num_bytes = bucket_bytes(bucket.layout.shapes, bucket.layout.dtypes)
        await self._pace.sleep(transfer_seconds(self._model, num_bytes))
        if bucket.is_last:
            self.server.set_label(str(bucket.version))

    async def end_update(self) -> None:
        pass

    async def checksum(self) -> str:
        return self.server.label

    async def resume(self) -> None:
        self.server.resume()

    # -- adapters

    async def load_adapter(self, version: PolicyVersion, folder: Path, timeout_seconds: float) -> None:
        raise EngineRefused("an emulated engine has no adapters")

    async def unload_adapter(self, version: PolicyVersion) -> None:
        raise EngineRefused("an emulated engine has no adapters")

    async def set_label(self, version: PolicyVersion, *, aborts: bool) -> None:
        if aborts:
            self.server.abort_all()
        self.server.set_label(str(version))


def _generation(answer: EmulatedAnswer) -> Generation:
    spans = []
    for label, end in answer.spans:
        if (version := PolicyVersion.parse(label)) is None:
            raise EngineRefused(f"sampled under the engine's own label {label!r}")
        spans.append(VersionSpan(version.attempt, version.version, end))
    count = len(answer.output_ids)
    return Generation(answer.output_ids, [answer.logprob] * count, tuple(spans), answer.finish_reason)
