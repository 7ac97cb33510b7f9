"""Rows, rewards and a workflow for jobs that meet faults, imported by their processes by name."""

import contextlib
import importlib
import itertools
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from asyncrl_api.protocols import Session

SHORT = "short: "
SCORING_SECONDS = 3.0
BLOCKED_SECONDS = 10.0


def some_too_long(*, split: str, seed: int, size: int = 40) -> Iterable[dict[str, Any]]:
    """Return rows of which every fourth has a prompt that fills the context of a small job."""
    return [{"question": "7 + " * (100 if n % 4 == 0 else 1) + f"{n} ="} for n in range(size)]


def all_too_long(*, split: str, seed: int) -> Iterable[dict[str, Any]]:
    return [{"question": "7 + " * 100 + f"{n} ="} for n in range(40)]


class FirstGroupShort:
    """Gives one answer: short in a worker's first group of two, as long as is allowed in all others."""

    def __init__(self) -> None:
        self._num_samples = 0

    async def run(self, session: Session) -> float:
        self._num_samples += 1
        is_short = self._num_samples <= 2
        turn = await session.generate(8 if is_short else None)
        return (await session.score(SHORT + turn.text if is_short else turn.text)).reward


def many(*, split: str, seed: int) -> Iterable[dict[str, Any]]:
    return [{"question": f"{n} + 1 ="} for n in range(1000)]


class BlocksOnce:
    """Notes the prompt of each sample, and holds up the whole worker in one, as `requests.get` may."""

    async def run(self, session: Session) -> float:
        folder = Path(os.environ["BLOCKS_ONCE"])
        with (folder / "samples").open("a") as notes:
            notes.write(f"{session.prompt}\n")
        with contextlib.suppress(FileExistsError):
            (folder / "blocked").touch(exist_ok=False)
            time.sleep(BLOCKED_SECONDS)  # noqa: ASYNC251  # that is the fault
        turn = await session.generate()
        return (await session.score(turn.text)).reward


def slow_for_short(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    if response.startswith(SHORT):
        time.sleep(SCORING_SECONDS)
    return float(sum(character.isdigit() for character in response)) / 100


def raises(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    raise ValueError(f"cannot score {prompt!r}")


def constant(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    return 1.0


_calls = itertools.count()


def learned(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """Return what varies within a group at first, and is the highest reward in all of them later."""
    number = next(_calls)
    return 1.0 if number >= 16 else float(number % 2)


def rows_and_little_memory(*, split: str, seed: int) -> Iterable[dict[str, Any]]:
    """Return rows; and in the trainer, which asks for them, let memory be enough for two samples."""
    import torch

    policy: Any = importlib.import_module("asyncrl_runtime.trainer.update.policy")
    compute_loss = policy.compute_loss

    def compute(algorithm: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        if batch.num_sequences > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute_loss(algorithm, batch, *arguments, **options)

    policy.compute_loss = compute
    return [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in range(40)]


POISON = (499, 499, 499)
"""Tokens that no random model says by chance."""


def rows_and_poison(*, split: str, seed: int) -> Iterable[dict[str, Any]]:
    """Return rows; and in the trainer, which asks for them, let a step fail of POISON."""
    policy: Any = importlib.import_module("asyncrl_runtime.trainer.update.policy")
    compute_loss = policy.compute_loss

    def compute(algorithm: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        if str(list(POISON))[1:-1] in str(batch.input_ids.tolist()):
            raise IndexError("index out of range in self")
        return compute_loss(algorithm, batch, *arguments, **options)

    policy.compute_loss = compute
    return [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in range(40)]


def huge_for_some(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """Return rewards whose gradients are infinite in float32, for one row in three."""
    reward = float(sum(character.isdigit() for character in response)) / 8
    return 3e38 * reward if int(row["answer"]) % 3 == 0 else reward
