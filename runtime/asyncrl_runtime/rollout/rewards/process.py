"""A reward process: `python -m asyncrl_runtime.rollout.rewards.process FD WORKER_PID`, started by the pool.

It consists of two processes. The outer one only waits: when the inner one ends, or the worker dies or sends
SIGTERM, it kills whatever is left below it and ends too, with the inner one's status. The inner one loads the
reward and scores one response after the other over the socket FD. Nothing here may import torch.
"""

import asyncio
import inspect
import os
import signal
import socket
import sys
import traceback
from numbers import Real
from typing import NoReturn

import msgspec

from asyncrl_api.protocols import Reward, Score
from asyncrl_runtime.rollout.rewards import linux
from asyncrl_runtime.rollout.rewards.descendants import kill_descendants, wait_for
from asyncrl_runtime.rollout.rewards.frames import (
    Failed,
    Refused,
    Scored,
    ScoreRequest,
    Setup,
    pack,
    read,
)
from asyncrl_runtime.rollout.rewards.reward_types import process_reward


def main() -> None:
    descriptor, worker = map(int, sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: end(128 + signal.SIGTERM))
    linux.set_death_signal(signal.SIGTERM)
    linux.become_subreaper()
    if os.getppid() != worker:  # the worker died before we asked for the signal
        sys.exit()

    outer, inner = os.getpid(), os.fork()
    if inner:
        linux.set_inspectable(False)  # it has the same user as programs that the inner one may run
        os.close(descriptor)  # the worker sees the end of the inner process as the end of the stream
        status = wait_for(inner)
        end(status if status >= 0 else 128 - status)  # as a shell reports a signal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    linux.set_death_signal(signal.SIGKILL)
    os.setsid()  # out of reach for a reward that signals its own process group
    if os.getppid() == outer:
        serve(socket.socket(fileno=descriptor))
    os._exit(0)  # without waiting for the user's threads and exit handlers


def end(status: int) -> NoReturn:
    """Kill everything below this process and exit."""
    kill_descendants()
    os._exit(status)


def serve(channel: socket.socket) -> None:
    """Load the reward that the worker names first, then score what the worker sends until it hangs up."""
    channel.set_inheritable(False)
    stream = channel.makefile("rb")
    setup = read(stream, msgspec.msgpack.Decoder(Setup))
    if setup is None:
        return
    try:
        reward, ready = process_reward(setup.type).load(setup)
    except BaseException as error:  # user code may raise anything, and the worker waits for an answer
        channel.sendall(pack(Refused(describe(error))))
        return
    channel.sendall(pack(ready))

    owner = os.getpid()
    requests = msgspec.msgpack.Decoder(list[ScoreRequest])
    with asyncio.Runner() as runner:  # one loop for all calls, so that a client may be kept between them
        while (batch := read(stream, requests)) is not None:
            for request in batch:
                answer = score(reward, request, runner)
                if os.getpid() != owner:
                    os._exit(0)  # the reward forked, and its child came back to us
                channel.sendall(answer)


def score(reward: Reward, request: ScoreRequest, runner: asyncio.Runner) -> bytes:
    """Call the reward and return the frame that answers `request`."""
    try:
        result = reward(request.prompt, request.response, request.row)
        if inspect.iscoroutine(result):
            result = runner.run(result)
        return pack(Scored(*parse_result(result)))
    except BaseException as error:  # sys.exit() included: only the worker ends this process
        return pack(Failed(describe(error)))


def parse_result(result: object) -> Score:
    """Return a reward's result as a `Score`, finite or not.

    Raises:
        TypeError: the result is neither a number nor a pair of a number and a text.
    """
    reward, feedback = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
    if not isinstance(reward, Real) or not isinstance(feedback, str):
        raise TypeError(f"the reward returned {result!r:.100}, not a number or (number, feedback)")
    return Score(float(reward), feedback)


def describe(error: BaseException) -> str:
    """Return the error in one line, with the place where it was raised."""
    text = " ".join(traceback.format_exception_only(error)[-1].split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return (text[:1000] + place).encode(errors="replace").decode()


if __name__ == "__main__":
    main()
