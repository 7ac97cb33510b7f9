"""What every process that starts others needs: they must not outlive it."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)  # loaded before any fork


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies; for `preexec_fn`.

    Linux only; elsewhere a SIGKILL of the parent leaves its children to be ended by hand. The signal comes
    when the *thread* that forked ends, so processes must be started from a thread that stays.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
