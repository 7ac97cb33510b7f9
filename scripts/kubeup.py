#!/usr/bin/env python3
"""Starts a Kubernetes control plane on loopback from installed programs: a KUBEUP for tests without pods.

It needs `etcd` and `kube-apiserver`, and `kubectl` to make use of the kubeconfig: the three programs that
come with envtest of kubernetes-sigs. If `kube-controller-manager` and `kube-scheduler` are beside them, it
starts these too. It looks for them in KUBEBUILDER_ASSETS and on PATH. There are no nodes, neither real nor
fake; docs/kube-kit.md says what a kit must answer for the other tests. The script itself needs only the
standard library and openssl.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

NEEDED = ("etcd", "kube-apiserver", "kubectl")
MORE = ("kube-controller-manager", "kube-scheduler")
START_SECONDS = 60.0
STOP_SECONDS = 10.0


class KubeupError(Exception):
    """Something is missing or does not start; the message says what to do."""


def find_program(name: str) -> str | None:
    """Return the path of a program; KUBEBUILDER_ASSETS comes before PATH. None if it is in neither."""
    folders = [os.environ.get("KUBEBUILDER_ASSETS", ""), os.environ.get("PATH", "")]
    return shutil.which(name, path=os.pathsep.join(filter(None, folders)))


def program(name: str) -> str:
    """Return the path of a program.

    Raises:
        KubeupError: there is no such program.
    """
    if found := find_program(name):
        return found
    raise KubeupError(f"{name} is neither in KUBEBUILDER_ASSETS nor on PATH: see docs/kube-kit.md")


def free_port() -> int:
    """Return a loopback port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ControlPlane:
    """One control plane. Everything that belongs to it is in its folder, including the command lines."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._commands = folder / "commands.json"
        self.kubeconfig = folder / "kubeconfig"

    def start(self) -> None:
        """Start it, and return once it answers.

        Raises:
            KubeupError: a program is missing, or it does not answer in time; its log is in the folder.
        """
        if self._commands.exists():
            raise KubeupError(f"{self._folder} has a control plane already: stop it, or name another --dir")
        commands = self._plan()
        self._commands.write_text(json.dumps(commands))
        for name in commands:
            self._run(name)
            if name == "kube-apiserver":
                self._wait()

    def stop(self) -> None:
        """Stop it; do nothing if there is none."""
        if not self._commands.exists():
            return
        for name in reversed(json.loads(self._commands.read_text())):
            self._kill(name, signal.SIGTERM)
        shutil.rmtree(self._folder)

    def restart(self, name: str, down_seconds: float) -> None:
        """Kill a program with SIGKILL, and start it again after a while."""
        self._kill(name, signal.SIGKILL)
        time.sleep(down_seconds)
        self._run(name)
        self._wait()

    def _plan(self) -> dict[str, list[str]]:
        """Return the command line of each program, in the order in which they start."""
        programs = {name: program(name) for name in NEEDED}
        self._folder.mkdir(parents=True, exist_ok=True)
        key, token = self._folder / "service-accounts.key", secrets.token_urlsafe(24)
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        tokens = self._folder / "tokens.csv"
        tokens.write_text(f"{token},admin,admin,system:masters\n")
        etcd, peer, port = (free_port() for _ in range(3))
        store, server = f"http://127.0.0.1:{etcd}", f"https://127.0.0.1:{port}"
        self._write_kubeconfig(server, token)
        has_controllers = find_program("kube-controller-manager") is not None
        config = f"--kubeconfig={self.kubeconfig}"
        commands = {
            "etcd": [
                programs["etcd"],
                f"--data-dir={self._folder / 'etcd'}",
                f"--listen-client-urls={store}",
                f"--advertise-client-urls={store}",
                f"--listen-peer-urls=http://127.0.0.1:{peer}",
            ],
            "kube-apiserver": [
                programs["kube-apiserver"],
                f"--etcd-servers={store}",
                "--bind-address=127.0.0.1",
                f"--secure-port={port}",
                f"--cert-dir={self._folder / 'certificates'}",
                f"--token-auth-file={tokens}",
                "--authorization-mode=RBAC",
                "--service-cluster-ip-range=10.0.0.0/16",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={key}",
                f"--service-account-signing-key-file={key}",
                # Without the controllers nobody would create the accounts that this plugin asks for.
                *([] if has_controllers else ["--disable-admission-plugins=ServiceAccount"]),
            ],
        }
        options = {"kube-controller-manager": [f"--service-account-private-key-file={key}"]}
        for name in MORE:
            if found := find_program(name):
                common = [found, config, "--leader-elect=false", "--secure-port=0"]
                commands[name] = [*common, *options.get(name, [])]
        return commands

    def _write_kubeconfig(self, server: str, token: str) -> None:
        cluster = {"server": server, "insecure-skip-tls-verify": True}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": token}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "admin"}}],
            "current-context": "tests",
        }
        self.kubeconfig.write_text(json.dumps(config))

    def _run(self, name: str) -> None:
        commands = json.loads(self._commands.read_text())
        if name not in commands:
            raise KubeupError(f"there is no {name} here, only {', '.join(commands)}")
        with (self._folder / f"{name}.log").open("ab") as log:
            done = subprocess.Popen(commands[name], stdout=log, stderr=log, start_new_session=True)
        (self._folder / f"{name}.pid").write_text(str(done.pid))

    def _kill(self, name: str, number: int) -> None:
        path = self._folder / f"{name}.pid"
        if not path.exists():
            return
        pid = int(path.read_text())
        deadline = time.monotonic() + STOP_SECONDS
        try:
            os.kill(pid, number)
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    return
                time.sleep(0.05)
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, FileNotFoundError):
            pass
        path.unlink()

    def _wait(self) -> None:
        config = json.loads(self.kubeconfig.read_text())
        url = config["clusters"][0]["cluster"]["server"] + "/readyz"
        headers = {"Authorization": f"Bearer {config['users'][0]['user']['token']}"}
        context = ssl._create_unverified_context()  # noqa: S323  # a server of our own, on loopback
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                request = urllib.request.Request(url, headers=headers)  # noqa: S310  # https, as we wrote it
                with urllib.request.urlopen(request, timeout=5, context=context):  # noqa: S310
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise KubeupError(f"kube-apiserver does not answer: see {self._folder / 'kube-apiserver.log'}")


def tools() -> None:
    """Print which programs there are, and the variables that tell the tests about them.

    Raises:
        KubeupError: a program that is needed is missing.
    """
    if not find_program("kube-apiserver") and (envtest := shutil.which("setup-envtest")):
        done = subprocess.run([envtest, "use", "-p", "path"], check=True, text=True, stdout=subprocess.PIPE)
        os.environ["KUBEBUILDER_ASSETS"] = done.stdout.strip()
    for name in (*NEEDED, *MORE):
        print(f"# {name}: {find_program(name) or 'not there'}", file=sys.stderr)
    for name in NEEDED:
        program(name)
    folder = Path(program("kube-apiserver")).parent
    print(f"export KUBEUP={Path(__file__).resolve()} KUBEBUILDER_ASSETS={folder}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kubeup.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tools", help="print which programs there are, and how to tell the tests")
    commands.add_parser("bin", help="print the folder of the programs")
    for name, text in (
        ("start", "start a control plane"),
        ("stop", "stop it"),
        ("kubeconfig", "print the path of its kubeconfig"),
        ("restart", "kill one of its programs and start it again"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--dir", type=Path, required=True)
        if name == "restart":
            command.add_argument("name")
            command.add_argument("--down", type=float, default=0.0, help="the seconds in between")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run a command; return the exit status."""
    if arguments and arguments[0] in ("kwok", "node", "volumes"):
        print(
            f"kubeup.py {arguments[0]}: this control plane has no nodes: see docs/kube-kit.md",
            file=sys.stderr,
        )
        return 2
    options = parse(arguments)
    try:
        match options.command:
            case "tools":
                tools()
            case "bin":
                print(Path(program("kube-apiserver")).parent)
            case "start":
                ControlPlane(options.dir).start()
            case "stop":
                ControlPlane(options.dir).stop()
            case "kubeconfig":
                print(ControlPlane(options.dir).kubeconfig.resolve())
            case "restart":
                ControlPlane(options.dir).restart(options.name, options.down)
    except KubeupError as error:
        print(f"kubeup.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
