"""The streams and buckets of one job: how they are configured, made, recognized and made again."""

import asyncio
import contextlib
import logging
from collections.abc import Collection, Mapping
from datetime import datetime

import nats.js.errors
from nats.js import JetStreamContext, api

from asyncrl_api.names import ANSWER_CONSUMER, ASK_CONSUMER, PROMPT_CONSUMER, JobNames
from asyncrl_api.trajectory_room import TRAJECTORY_SHARE
from asyncrl_runtime.contract.broker import TransportError

log = logging.getLogger(__name__)

ACK_WAIT_SECONDS = 300.0
"""The longest outage of the broker without redelivery: after it every prompt in flight comes again at once.
Dead workers are noticed much sooner, by the reaper."""
QUESTION_ACK_WAIT_SECONDS = 10.0
"""The same for held-out prompts, which have no reaper; one that is answered twice costs little."""

NO_STORAGE = 10047


def stream_configs(
    names: JobNames, storage_bytes: int, first_sequences: Mapping[str, int] | None = None
) -> list[api.StreamConfig]:
    """Return the five streams of a job, buckets included.

    Trajectories lie in a limits stream, not a work queue: a work queue forgets the message ids of
    acknowledged messages at a restart, and a limits stream lets a restored trainer read again.

    Args:
        storage_bytes: what the job may use on the broker's disk.
        first_sequences: stream name -> its first sequence, for streams that are made again.
    """
    first = first_sequences or {}
    file, new = api.StorageType.FILE, api.DiscardPolicy.NEW
    return [
        api.StreamConfig(
            name=names.prompt_stream,
            subjects=[names.prompt("*")],
            retention=api.RetentionPolicy.WORK_QUEUE,
            storage=file,
            discard=new,
            duplicate_window=120,
            max_bytes=storage_bytes // 10,
            first_seq=first.get(names.prompt_stream),
        ),
        api.StreamConfig(
            name=names.trajectory_stream,
            subjects=[names.trajectory(">")],
            retention=api.RetentionPolicy.LIMITS,
            storage=file,
            discard=new,
            duplicate_window=7200,
            allow_direct=True,
            max_bytes=int(storage_bytes * TRAJECTORY_SHARE),
            first_seq=first.get(names.trajectory_stream),
        ),
        api.StreamConfig(
            name=names.evaluation_stream,
            subjects=[names.evaluation("*", ">")],
            retention=api.RetentionPolicy.WORK_QUEUE,
            storage=file,
            discard=new,
            max_bytes=storage_bytes // 20,
        ),
        _bucket(names.state_bucket, history=1, republish=names.announcements),
        _bucket(names.lease_bucket, history=1, has_ttl=True),
    ]


def _bucket(name: str, *, history: int, republish: str = "", has_ttl: bool = False) -> api.StreamConfig:
    """Return a key-value bucket as the client would make it (NATS ADR-8), on file.

    The lease has no limit markers: a `create` would have to wait until the marker has expired too.
    """
    return api.StreamConfig(
        name=f"KV_{name}",
        subjects=[f"$KV.{name}.>"],
        max_msgs_per_subject=history,
        storage=api.StorageType.FILE,
        discard=api.DiscardPolicy.NEW,
        allow_rollup_hdrs=True,
        deny_delete=True,
        allow_direct=True,
        allow_msg_ttl=has_ttl or None,
        duplicate_window=120,
        republish=api.RePublish(src=f"$KV.{name}.>", dest=f"{republish}.>") if republish else None,
    )


def consumer_configs(names: JobNames) -> list[tuple[str, api.ConsumerConfig]]:
    """Return the durable consumers, with unlimited `max_deliver`: kills must not use up its retries."""

    def durable(name: str, ack_wait: float, filter_subject: str | None = None) -> api.ConsumerConfig:
        return api.ConsumerConfig(
            durable_name=name,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=ack_wait,
            max_deliver=-1,
            max_ack_pending=100_000,
            max_waiting=16_384,
            filter_subject=filter_subject,
        )

    wait = QUESTION_ACK_WAIT_SECONDS
    return [
        (names.prompt_stream, durable(PROMPT_CONSUMER, ACK_WAIT_SECONDS)),
        (names.evaluation_stream, durable(ASK_CONSUMER, wait, names.evaluation("ask", ">"))),
        (names.evaluation_stream, durable(ANSWER_CONSUMER, wait, names.evaluation("answer", ">"))),
    ]


async def make_streams(
    jetstream: JetStreamContext,
    names: JobNames,
    storage_bytes: int,
    first_sequences: Mapping[str, int] | None = None,
) -> None:
    """Make what is missing of a job's streams, buckets and consumers; leave what is there.

    Raises:
        nats.js.errors.APIError: the server refuses, also because a stream has another configuration.
    """
    for config in stream_configs(names, storage_bytes, first_sequences):
        assert config.name
        if await stream_info(jetstream, config.name) is None:
            await _add_stream(jetstream, config)
    for stream, consumer in consumer_configs(names):
        await jetstream.add_consumer(stream, consumer)


async def make_lease_bucket(jetstream: JetStreamContext, names: JobNames) -> None:
    """Make the one bucket that is needed before anything is decided."""
    bucket = f"KV_{names.lease_bucket}"
    if await stream_info(jetstream, bucket) is None:
        [config] = [c for c in stream_configs(names, storage_bytes=1) if c.name == bucket]
        await _add_stream(jetstream, config)


async def _add_stream(jetstream: JetStreamContext, config: api.StreamConfig) -> None:
    for attempt in range(5):
        try:
            await jetstream.add_stream(config)
            return
        except nats.js.errors.APIError as error:
            if error.err_code == NO_STORAGE:
                raise TransportError(
                    f"stream {config.name}: the NATS server has no room for {config.max_bytes} bytes; "
                    "raise its max_file_store, or lower spec.messaging.embedded.storage.size"
                ) from error
            if not isinstance(error, nats.js.errors.ServerError) or attempt == 4:
                raise
            # "error creating store for stream": seen when a stream of this name was deleted just before.
            log.warning("stream %s: %s; trying again", config.name, error.description)
            await asyncio.sleep(0.2 * 2**attempt)


async def delete_streams(jetstream: JetStreamContext, names: JobNames, keep: Collection[str] = ()) -> None:
    """Remove everything of a job from the broker, but for the streams named in `keep`."""
    for config in stream_configs(names, storage_bytes=1):
        if config.name and config.name not in keep:
            await delete_stream(jetstream, config.name)


async def delete_stream(jetstream: JetStreamContext, name: str) -> None:
    """Remove one stream; nothing happens if there is none."""
    with contextlib.suppress(nats.js.errors.NotFoundError):
        await jetstream.delete_stream(name)


async def stream_info(jetstream: JetStreamContext, name: str) -> api.StreamInfo | None:
    """Return what the server knows of a stream; None if there is no such stream."""
    try:
        return await jetstream.stream_info(name)
    except nats.js.errors.NotFoundError:
        return None


def identity_of(info: api.StreamInfo) -> str:
    """Return when a stream was made, its identity: one made again under its name is another one."""
    moment = info.created
    assert isinstance(moment, datetime)
    return moment.isoformat()
