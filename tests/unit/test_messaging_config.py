"""What the embedded NATS server is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from asyncrl_operator.local.local_run import write_nats_config
from asyncrl_operator.local.run_folder import RunFolder
from asyncrl_operator.render.messaging import User, render_nats_config
from support.messages.samples import make_job


def render(*, is_persistent: bool) -> dict[str, Any]:
    text = render_nats_config(
        host="127.0.0.1", port=4222, store_dir="/data", max_store_bytes=2**30, is_persistent=is_persistent
    )
    config = json.loads(text)  # the server's own format is a superset
    assert isinstance(config, dict)
    return config


def test_an_ephemeral_server_syncs_in_its_own_time() -> None:
    assert render(is_persistent=False) == {
        "host": "127.0.0.1",
        "port": 4222,
        "max_payload": 8 * 2**20,
        "max_pending": 256 * 2**20,
        "jetstream": {"store_dir": "/data", "max_file_store": 2**30},
    }


def test_a_persistent_server_syncs_every_message() -> None:
    """Its files must outlive a power cut, which by default loses two minutes or a whole stream."""
    ephemeral, persistent = render(is_persistent=False), render(is_persistent=True)
    ephemeral["jetstream"]["sync_interval"] = "always"
    assert persistent == ephemeral


def test_a_message_is_no_larger_than_what_may_be_pending() -> None:
    """The server refuses to start otherwise."""
    config = render(is_persistent=False)
    assert config["max_payload"] <= config["max_pending"]


def test_users_have_passwords_and_only_some_have_limits() -> None:
    text = render_nats_config(
        host="0.0.0.0",
        port=4222,
        store_dir="/data",
        max_store_bytes=2**30,
        is_persistent=False,
        users=[User("trainer", "a"), User("worker", "b", {"publish": {"allow": ["x"]}})],
    )
    assert json.loads(text)["authorization"]["users"] == [
        {"user": "trainer", "password": "a"},
        {"user": "worker", "password": "b", "permissions": {"publish": {"allow": ["x"]}}},
    ]


@pytest.mark.parametrize(("storage", "sync"), [("Ephemeral", None), ("Persistent", "always")])
def test_a_local_server_is_told_what_the_manifest_says(
    tmp_path: Path, storage: str, sync: str | None
) -> None:
    job = make_job(f"messaging.embedded.storage={{type: {storage}, size: 3Gi}}")
    path = write_nats_config(RunFolder(tmp_path / "run"), job.spec, port=5000)
    config = json.loads(path.read_text())
    assert (config["host"], config["port"]) == ("127.0.0.1", 5000)
    assert config["jetstream"]["max_file_store"] == 3 * 2**30
    assert config["jetstream"].get("sync_interval") == sync
    assert Path(config["jetstream"]["store_dir"]).is_relative_to(tmp_path / "run" / "nats")
