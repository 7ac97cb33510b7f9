"""Faults in the processes of a job: Python imports this file at its start if the folder is on its path.

ASYNCRL_FAULT says which. `disk`: the file that ASYNCRL_DISK names says what a flush to disk does at present:
`full`, a number of seconds that it takes longer, or nothing if there is no such file. The others concern the
ranks of a trainer alone. `slow-disk`: the first flush of each rank's part of a checkpoint, and the final
export, last longer than the ranks wait for each other, and rank 1's flush fails after that. `slow-passes`:
from the first step that begins while the file ASYNCRL_SLOW_FROM exists, each training pass of a micro-batch,
or with the word `all` in that file every pass, lasts PASS_SECONDS.
"""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

WAIT_SECONDS = 5.0
"""What stands in for COMMAND_SECONDS."""
DISK_SECONDS = 8.0
PASS_SECONDS = 4.0


def let_the_disk_fail(said: Path) -> None:
    flush = os.fsync

    def fsync(descriptor: Any) -> None:
        try:
            state = said.read_text()
        except OSError:
            state = ""
        if state == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if state:
            time.sleep(float(state))
        flush(descriptor)

    os.fsync = fsync  # type: ignore[assignment]  # the parameter has another name


def slow_down_the_disk() -> None:
    from transformers import PreTrainedModel

    import asyncrl_runtime.trainer.assemble  # noqa: F401  # first, so that the ranks find each other in the usual time
    from asyncrl_runtime.trainer.update import ranks

    ranks.COMMAND_SECONDS, ranks.PING_SECONDS = WAIT_SECONDS, 0.5
    fsync, save_pretrained = os.fsync, PreTrainedModel.save_pretrained
    slow = [True]

    def slow_fsync(descriptor: int) -> None:
        if slow and "/policy/" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            slow.clear()
            time.sleep(DISK_SECONDS)
            if os.environ["RANK"] == "1":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    def slow_export(*args: Any, **kwargs: Any) -> None:
        time.sleep(DISK_SECONDS)
        save_pretrained(*args, **kwargs)

    os.fsync, PreTrainedModel.save_pretrained = slow_fsync, slow_export  # type: ignore[method-assign,assignment]


def slow_down_passes(begin: Path) -> None:
    import torch

    from asyncrl_runtime.trainer.update import policy

    forward = policy.ResponseModel.forward

    steps_begun: list[bool] = []

    def slow_forward(model: policy.ResponseModel, batch: Any) -> Any:
        if begin.exists():
            trains = torch.is_grad_enabled()
            if not trains:  # a step begins with the pass for proximal log-probs
                steps_begun.append(True)
            if steps_begun and (trains or begin.read_text() == "all"):
                begin.with_name("inside").touch()
                time.sleep(PASS_SECONDS)
        return forward(model, batch)

    policy.ResponseModel.forward = slow_forward  # type: ignore[method-assign,assignment]


is_a_rank = "asyncrl_runtime.main" in sys.orig_argv and "rank" in sys.orig_argv
match os.environ.get("ASYNCRL_FAULT"):
    case "disk":
        let_the_disk_fail(Path(os.environ["ASYNCRL_DISK"]))
    case "slow-disk" if is_a_rank:
        slow_down_the_disk()
    case "slow-passes" if is_a_rank:
        slow_down_passes(Path(os.environ["ASYNCRL_SLOW_FROM"]))
