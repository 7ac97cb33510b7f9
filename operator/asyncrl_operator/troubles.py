"""Remembers which jobs' passes fail by an error that is not the API server's, until one succeeds."""

from dataclasses import dataclass, field

from asyncrl_api.job_status import Status
from asyncrl_operator.api_server.api import ApiError
from asyncrl_operator.decide import reasons
from asyncrl_operator.workqueue import Key

TRIES = 3
"""The number of passes in a row that fail before the status says so: most of what fails passes by itself."""
LONGEST_MESSAGE = 1000


@dataclass
class Trouble:
    """What passes over one job have failed by."""

    tries: int = 0
    message: str = ""


@dataclass
class Troubles:
    """The troubles of all jobs. Only a count: what users are told lies in the status."""

    _of: dict[Key, Trouble] = field(default_factory=dict)

    def add(self, key: Key, error: Exception) -> None:
        """Note that a pass has failed."""
        trouble = self._of.setdefault(key, Trouble())
        trouble.tries += 1
        trouble.message = first_line(error)

    def over(self, key: Key) -> None:
        """Note that a pass has done all that it should."""
        self._of.pop(key, None)

    def message(self, key: Key, stored: Status) -> str:
        """Return what the status must say about a job; empty if nothing.

        What an operator before this one has said stays until a pass succeeds.
        """
        trouble = self._of.get(key, Trouble())
        if trouble.tries >= TRIES:
            return trouble.message
        said = stored.condition("Degraded")
        return said.message if said is not None and said.reason == reasons.OPERATOR_ERROR else ""


def is_passing(error: ApiError) -> bool:
    """Whether a failed call means only that the API server is away or busy, or that the job has changed."""
    return error.status in (0, 408, 409, 429) or error.status >= 500


def first_line(error: Exception) -> str:
    """Return an exception in one line, as a condition shows it."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}".removesuffix(": ")[:LONGEST_MESSAGE]
