"""Starts the ranks of one pod, or of this machine, and passes on how they ended.

torchrun would not do: it exits with 1 however a rank ended, while asyncrl's exit codes say whether another
attempt makes sense (asyncrl_api.exits), and a signal must count as a disruption, not as a failure.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from asyncrl_api.processes import die_with_parent

log = logging.getLogger(__name__)

PEER_SECONDS = 5.0
"""The time that the other ranks have to end by themselves when one is gone."""


def launch(num_ranks: int, arguments: Sequence[str], *, node: int = 0, num_nodes: int = 1) -> int:
    """Run `num_ranks` ranks with these command-line arguments; return the exit code of the first to fail.

    With several nodes, rank 0's address is taken from MASTER_ADDR and MASTER_PORT.

    Returns:
        0 if all ranks ended well; otherwise a rank's exit code, or minus a signal's number if one was killed.
    """
    environment = dict(os.environ)
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    if num_nodes == 1:
        environment["MASTER_PORT"] = str(_free_port())
    command = [sys.executable, "-m", "asyncrl_runtime.main", "rank", *arguments]
    ranks = []
    for local_rank in range(num_ranks):
        environment |= {
            "RANK": str(node * num_ranks + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(num_nodes * num_ranks),
        }
        if num_nodes * num_ranks == 1:
            os.execve(command[0], command, environment)  # there are no ranks to watch over: become the rank
        # This process has one thread, so code between fork and exec is safe.
        ranks.append(
            subprocess.Popen(command, env=dict(environment), preexec_fn=die_with_parent)  # noqa: PLW1509
        )

    def hand_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, hand_on)
    return _wait(ranks)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed:
            break
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
    deadline = time.monotonic() + PEER_SECONDS
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    for rank in ranks:
        if rank.poll() is None:
            log.warning("rank %d did not end with its peer: killed", ranks.index(rank))
            rank.kill()
            rank.wait()
    return int(min(failed))  # of those found at once, a rank ended by a signal took the others with it


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
