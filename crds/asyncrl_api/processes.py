"""What all processes of a job need: children that die with their parent, and an error if a port is taken."""

import ctypes
import os
import signal
import socket
import sys

from asyncrl_api.exits import ExitCode, ExitError

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)  # loaded before any fork


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies; made for `preexec_fn`.

    Works on Linux only; elsewhere a SIGKILL of the parent leaves children that must be ended by hand. The
    signal comes when the *thread* that forked ends, so processes must be started from a thread that stays.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def bind(host: str, port: int, who: str, options: str) -> socket.socket:
    """Take a port; connections are refused until somebody listens on it.

    Args:
        who: the process that wants the port, for the message.
        options: the command-line options that choose another address, for the message.

    Raises:
        ExitError: the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's delay (40 ms per response) off only if the protocol is spelled out.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ExitError(
            ExitCode.TRY_AGAIN,
            f"{who}: cannot listen on {host}:{port}: {error.strerror}. Stop what listens there, or choose "
            f"another address with {options}",
        ) from error
    return listener
