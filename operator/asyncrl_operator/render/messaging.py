"""The NATS server of a job: its configuration, the same in a pod and on a laptop. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asyncrl_api.names import ASK_CONSUMER, PROMPT_CONSUMER, JobNames

MAX_PAYLOAD_BYTES = 8 * 2**20
"""The largest message: a prompt group above 7 MB is sent in parts, and the server warns above 8 MB."""
MAX_PENDING_BYTES = 256 * 2**20


@dataclass(frozen=True)
class User:
    """One role of a job, as its server knows it."""

    name: str
    password: str
    permissions: dict[str, Any] | None = None
    """The subjects that the role may use, in the server's terms; None: all."""


def worker_permissions(names: JobNames) -> dict[str, Any]:
    """Return what a worker may do: it runs user code and generated programs, so it gets only what it needs.

    It takes tickets and evaluation prompts, stores results and what is finished of tickets that it hands
    back, sends heartbeats, and takes part in weight epochs. It cannot issue or remove tickets, take the
    lease, or change streams. One right is wider than its use: a purge names its subject in the message, so it
    may empty the state bucket, which the trainer fills again.
    """
    bucket = f"KV_{names.state_bucket}"
    publish = [
        names.heartbeat("*"),
        names.trajectory(">"),
        names.evaluation("answer", ">"),
        f"$KV.{names.state_bucket}.part.*",
        f"{names.inbox_prefix}.>",  # answers of a weight epoch
        f"$JS.API.STREAM.INFO.{bucket}",
        f"$JS.API.STREAM.PURGE.{bucket}",
        f"$JS.API.DIRECT.GET.{bucket}.>",
        f"$JS.API.DIRECT.GET.{names.trajectory_stream}.>",
    ]
    for stream, consumer in (
        (names.prompt_stream, PROMPT_CONSUMER),
        (names.evaluation_stream, ASK_CONSUMER),
    ):
        publish += [f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}", f"$JS.ACK.{stream}.{consumer}.>"]
    subscribe = [names.control("*"), f"{names.announcements}.>", f"{names.inbox_prefix}.>"]
    return {"publish": {"allow": publish}, "subscribe": {"allow": subscribe}}


def render_nats_config(
    *,
    host: str,
    port: int,
    store_dir: str,
    max_store_bytes: int,
    is_persistent: bool,
    users: Sequence[User] = (),
) -> str:
    """Return the configuration file of an embedded server with JetStream.

    Args:
        is_persistent: the files must survive a power cut, so each message is synced to disk before it is
            acknowledged. By default a server syncs every two minutes, and a power cut loses what came since,
            even a whole stream made since; kill -9 loses nothing either way.
        users: the users who may connect; none: anybody may (loopback).
    """
    config: dict[str, object] = {
        "host": host,
        "port": port,
        "max_payload": MAX_PAYLOAD_BYTES,
        "max_pending": MAX_PENDING_BYTES,
        "jetstream": {
            "store_dir": store_dir,
            "max_file_store": max_store_bytes,
            **({"sync_interval": "always"} if is_persistent else {}),
        },
    }
    if users:
        config["authorization"] = {"users": [_account(user) for user in users]}
    return json.dumps(config, indent=1) + "\n"


def _account(user: User) -> dict[str, Any]:
    limits = {} if user.permissions is None else {"permissions": user.permissions}
    return {"user": user.name, "password": user.password, **limits}
