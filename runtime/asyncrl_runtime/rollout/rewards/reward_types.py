"""The types of `spec.reward`: how each is loaded, and what it needs.

A new type is an entry in `REWARD_TYPES`, here, and a name in `RewardSpec.type`. Reward processes import this
module, so an entry imports the libraries that it needs only when it is loaded: they take seconds, and a
process holds one reward.
"""

import os
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from asyncrl_api.job import RewardSpec
from asyncrl_api.protocols import Reward
from asyncrl_runtime.rollout.rewards.backend import Backend
from asyncrl_runtime.rollout.rewards.frames import Ready, Setup
from asyncrl_runtime.rollout.rewards.verifiers import MathAnswer, ReasoningGymAnswer

SANDBOX_SECONDS = 10.0
"""The time that a sandbox may spend in addition to its programs' time, which it limits itself."""

_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")


@dataclass(frozen=True)
class ProcessReward:
    """A reward that is a callable in reward processes of this machine."""

    load: Callable[[Setup], tuple[Reward, Ready]]
    """The function that makes the reward ready to score; it runs in the process, and may raise anything."""
    spare_seconds: float = 0.0
    """The time that a process gets beyond `timeoutSeconds`, for a reward that keeps that limit itself."""
    is_user_code: bool = False
    """Whether the reward is the user's own, which may need any of the worker's variables. The others handle
    text of the policy, and reasoning-gym evaluates some of it as Python, so they get no secrets."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables of a process that holds this reward."""
        if self.is_user_code:
            return dict(os.environ)
        return {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}


@dataclass(frozen=True)
class RemoteReward:
    """A reward that something outside of this machine computes; nothing of it is loaded here."""

    connect: Callable[[RewardSpec], Backend]


def load_function(setup: Setup) -> tuple[Reward, Ready]:
    """Import the user's `pkg.module:name`; the setup's import paths come first, in their order."""
    sys.path[:0] = setup.import_paths
    function = pkgutil.resolve_name(setup.function)
    if not callable(function):
        raise TypeError(f"{setup.function} is a {type(function).__name__}, not a callable")
    return function, Ready()


def _load_math(setup: Setup) -> tuple[Reward, Ready]:
    return MathAnswer(setup.answer_field), Ready()


def _load_reasoning_gym(setup: Setup) -> tuple[Reward, Ready]:
    return ReasoningGymAnswer(), Ready()


def _load_code(setup: Setup) -> tuple[Reward, Ready]:
    from asyncrl_runtime.rollout.rewards.programs import ProgramTests

    reward = ProgramTests(setup.timeout_seconds)
    containment = reward.sandbox.containment
    return reward, Ready(note=f"programs run {containment}", is_worker_exposed=not containment.is_apart)


def _connect_service(spec: RewardSpec) -> Backend:
    from asyncrl_runtime.rollout.rewards.service import RewardService

    return RewardService(spec.url, timeout_seconds=spec.timeout_seconds)


REWARD_TYPES: Mapping[str, ProcessReward | RemoteReward] = {
    "Math": ProcessReward(_load_math),
    "ReasoningGym": ProcessReward(_load_reasoning_gym),
    "Code": ProcessReward(_load_code, spare_seconds=SANDBOX_SECONDS),
    "Function": ProcessReward(load_function, is_user_code=True),
    "Service": RemoteReward(_connect_service),
}


def process_reward(name: str) -> ProcessReward:
    """Return the entry of a type whose reward runs in a process.

    Raises:
        ValueError: there is no such type of that name.
    """
    entry = REWARD_TYPES.get(name)
    if not isinstance(entry, ProcessReward):
        raise ValueError(f"reward.type {name} is not one that a reward process can hold")
    return entry
