"""The NATS server of a job: its configuration, the same in a pod and on a laptop. Pure."""

import json
from collections.abc import Mapping

MAX_PAYLOAD_BYTES = 8 * 2**20
"""A prompt group above 7 MB goes in parts; the server warns above 8 MB."""
MAX_PENDING_BYTES = 256 * 2**20


def render_nats_config(
    *,
    host: str,
    port: int,
    store_dir: str,
    max_store_bytes: int,
    is_persistent: bool,
    users: Mapping[str, str] | None = None,
) -> str:
    """Return the configuration file of an embedded server with JetStream.

    Args:
        is_persistent: the files outlive a power cut, so each message is synced to disk before it is
            acknowledged. By default a server syncs every two minutes, and a power cut loses up to that and
            even a whole stream made since; kill -9 loses nothing either way.
        users: passwords by user; None: anybody may connect (loopback).
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
    if users is not None:
        accounts = [{"user": user, "password": password} for user, password in users.items()]
        config["authorization"] = {"users": accounts}
    return json.dumps(config, indent=1) + "\n"
