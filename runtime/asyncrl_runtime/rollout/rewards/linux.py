"""System calls that Python 3.11 lacks. Each raises OSError if the kernel refuses it."""

import ctypes
import os
import struct
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND = 2, 4, 8, 4096

CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN = 5, 6, 7, 21

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
_MOUNT_ATTR_RDONLY = 1
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442  # the same on all architectures

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _prctl(option: int, value: int, what: str) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), what)


def set_death_signal(signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent dies; a change of user and exec undo it.

    To be exact, the signal comes when the thread that started this process ends. A parent that died before
    the call goes unnoticed, so look at `os.getppid()` afterwards.
    """
    _prctl(_PR_SET_PDEATHSIG, signum, "set death signal")


def become_subreaper() -> None:
    """Make orphans below this process its children, so that none can slip away from it."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, "become subreaper")


def set_inspectable(inspectable: bool) -> None:
    """Allow or forbid others of the same user to read this process's memory and environment."""
    _prctl(_PR_SET_DUMPABLE, inspectable, "set dumpable")


def forbid_new_privileges() -> None:
    """Make set-user-id programs run without their privileges, here and in everything started from here."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "forbid new privileges")


def unshare(flags: int) -> None:
    """Move this process into new namespaces."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount `source`, a file system of `kind`, at `target`."""
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()
    )
    _check(result, f"mount {kind or source} at {target}")


def make_mounts_private() -> None:
    """Keep what is mounted in this mount namespace from showing up in others."""
    mount("none", "/", "", _MS_REC | _MS_PRIVATE)


def make_mounts_read_only() -> None:
    """Make every mount of this mount namespace read-only (Linux 5.12)."""
    attributes = struct.pack("=4Q", _MOUNT_ATTR_RDONLY, 0, 0, 0)  # set, clear, propagation, user namespace
    result = _libc.syscall(
        _SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes))
    )
    _check(result, "make mounts read-only")


def has_capabilities(*capabilities: int) -> bool:
    """Tell whether this process holds all of `capabilities` effectively."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return all(effective >> capability & 1 for capability in capabilities)
