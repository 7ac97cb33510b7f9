"""A shared NATS server that wants TLS: `tls://` in the URL, its authority in SSL_CERT_FILE."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_runtime.contract.broker import TransportError
from asyncrl_runtime.transport.broker import Broker
from support.jobs.nats_server import NatsServer

NAMES = JobNames.on_own_server("team", "job")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1, signed by itself, with its key beside it."""
    path = tmp_path / "cert.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=nats"]
    request += ["-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(path.with_suffix(".key")), "-out", str(path)]
    subprocess.run([*request, *files], check=True, capture_output=True, timeout=60)
    return path


@pytest.fixture
def server(tmp_path: Path, certificate: Path) -> Iterator[NatsServer]:
    key = certificate.with_suffix(".key")
    tls = f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}\n'
    running = NatsServer(tmp_path / "nats", more_config=tls)
    running.start()
    yield running
    running.kill()


async def test_a_client_that_trusts_its_authority_is_served(
    server: NatsServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    address = NatsAddress(url=server.url.replace("nats://", "tls://"))
    broker = await Broker.connect(address, NAMES, "test", deadline_seconds=20)
    assert broker.client.is_connected
    await broker.close()


async def test_one_that_does_not_is_not(server: NatsServer) -> None:
    address = NatsAddress(url=server.url.replace("nats://", "tls://"))
    with pytest.raises(TransportError, match=r"no NATS server at tls://"):
        await Broker.connect(address, NAMES, "test", deadline_seconds=3)
