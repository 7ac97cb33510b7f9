"""Keeps an untrusted program away from the rest of the machine, as far as the machine allows."""

import contextlib
import os
import signal
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from asyncrl_runtime.rollout.rewards import linux

MAX_SCRATCH_BYTES = 64 << 20

NOBODY = 65534
FREE_USERS = range(61184, 65520)
"""Users without accounts or files: systemd's for services, which come and go as our programs do."""

INTERPRETER = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])}
SCRATCH_FOLDERS = [
    folder
    for folder in ("/tmp", "/var/tmp", "/dev/shm")
    if Path(folder).is_dir() and not any(Path(prefix).is_relative_to(folder) for prefix in INTERPRETER)
]
"""The folders where anyone may write. Each run gets empty ones: it cannot fill the disk or meet others."""


@dataclass(frozen=True)
class Containment:
    """The protections in force, besides resource limits and a clean environment."""

    namespaces: bool
    """Whether there is no network, no other process and no writable file outside the scratch folders."""
    own_user: bool
    """Whether programs run as a user to whom nothing else belongs."""

    def __str__(self) -> str:
        reach = (
            "without network, with read-only files and processes apart"
            if self.namespaces
            else "with network, files and processes in reach, since namespaces are not allowed here"
        )
        return f"{reach}, as {'a user of their own' if self.own_user else 'the user of the worker'}"

    @property
    def is_apart(self) -> bool:
        """Whether the kernel tells the programs from the worker, which is then safe from their signals."""
        return self.namespaces or self.own_user

    def enter(self, user: int) -> None:
        """Put this process where its programs will run; there is no way back.

        Args:
            user: the user to become first if this process is only the root of a container.
        """
        with contextlib.suppress(OSError):  # if memory runs out, the worker must not be the victim
            Path("/proc/self/oom_score_adj").write_text("1000")
        if self.namespaces:
            is_mighty = self.own_user and linux.has_capabilities(linux.CAP_SYS_ADMIN)
            if self.own_user and not is_mighty:
                become_user(user)
            if not is_mighty:
                enter_user_namespace()
            linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
            linux.make_mounts_private()
            if is_mighty:
                uncover(INTERPRETER)
            linux.make_mounts_read_only()
        linux.set_inspectable(False)  # the memory holds tests and answers of later runs
        linux.set_death_signal(signal.SIGKILL)  # again: a change of user undoes it


def become_user(user: int) -> None:
    """Give up root and all groups for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def enter_user_namespace() -> None:
    """Enter a namespace in which this process may do everything, and the programs that it starts nothing."""
    user, group = os.geteuid(), os.getegid()
    linux.set_inspectable(True)  # after a change of user, /proc/self would belong to root
    linux.unshare(linux.CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")


def uncover(folders: set[str]) -> None:
    """Let every user reach `folders` that lie below folders that are closed to others.

    For example, if the interpreter is below root's home, the home is covered by an empty folder, in which the
    path to the interpreter is made anew.
    """
    closed = {f: [p for p in Path(f).parents if not p.stat().st_mode & stat.S_IXOTH] for f in folders}
    kept = {folder: os.open(folder, os.O_PATH) for folder in folders if closed[folder]}
    for top in {closed[folder][-1] for folder in kept}:
        cover(str(top), "mode=755,size=1m")
    for folder, descriptor in kept.items():
        Path(folder).mkdir(parents=True, exist_ok=True)
        linux.mount(f"/proc/self/fd/{descriptor}", folder, "", linux.MS_BIND)
        os.close(descriptor)


def give_scratch_folders() -> None:
    """Cover the scratch folders with empty ones."""
    for folder in SCRATCH_FOLDERS:
        cover(folder, f"mode=1777,size={MAX_SCRATCH_BYTES},nr_inodes=10000")


def cover(folder: str, options: str) -> None:
    """Cover `folder` with an empty one in memory."""
    linux.mount("tmpfs", folder, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)
