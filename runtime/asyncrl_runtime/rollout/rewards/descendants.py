"""Ends a process together with everything it started, whatever those processes did to get away."""

import contextlib
import os
import time

import psutil


def num_descendants() -> int:
    """Count the processes below this one."""
    return len(psutil.Process().children(recursive=True))


def kill_descendants() -> None:
    """Kill all processes below this one, which must be a subreaper, and wait until they are gone.

    They are stopped before any is killed: a process that forks faster than we look would otherwise always
    have a child that we have not seen. Stopped processes still count toward the limit on processes, so no new
    ones can be made in the end.
    """
    stopped: set[psutil.Process] = set()
    while _has_children():
        family = set(psutil.Process().children(recursive=True))
        running = family - stopped
        for process in running or family:
            with contextlib.suppress(psutil.Error):
                process.suspend() if running else process.kill()
        stopped |= running
        if not running:
            time.sleep(0.001)  # give the kernel time to end them


def _has_children() -> bool:
    """Collect the children that have ended and tell whether others are left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def wait_for(child: int) -> int:
    """Wait until `child` ends, and collect orphans meanwhile; return its exit status, or minus its signal."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return os.waitstatus_to_exitcode(status)
