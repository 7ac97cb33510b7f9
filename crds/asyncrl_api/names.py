"""The broker's address, and the names of a job's streams, buckets and subjects on it."""

import re
from typing import Self

from asyncrl_api.wire import Wire

PROMPT_CONSUMER = "w"
"""The durable consumer of the prompt stream that all workers pull from."""
ASK_CONSUMER, ANSWER_CONSUMER = "ask", "answer"
"""The two directions of the evaluation stream: prompts to workers, results to the controller."""


class NatsAddress(Wire):
    """The broker's address, and the credentials that this process presents."""

    url: str
    credentials_file: str = ""
    """A file with the credentials of this process's role: JSON with `user` and `password`, or a NATS
    credentials file if its name ends in .creds. Empty: the broker asks for none."""


class JobNames(Wire):
    """Names on the broker. Each job has streams of its own, because a ticket is a stream sequence."""

    job: str
    prefix: str = ""
    """A prefix of every subject, for an account that may use only some subjects."""

    @classmethod
    def on_own_server(cls, namespace: str, name: str) -> Self:
        return cls(job=f"{namespace}_{name}")

    @classmethod
    def on_shared_server(cls, namespace: str, name: str, uid: str, prefix: str = "") -> Self:
        """Return names with the object's uid, so that what an earlier job of this name left is not ours."""
        return cls(job=f"{namespace}_{name}_{uid}", prefix=prefix)

    @property
    def prompt_stream(self) -> str:
        return f"RL_{self.job}_PROMPT"

    @property
    def trajectory_stream(self) -> str:
        return f"RL_{self.job}_TRAJ"

    @property
    def evaluation_stream(self) -> str:
        return f"RL_{self.job}_EVAL"

    @property
    def state_bucket(self) -> str:
        """The bucket with the keys `live` (the fields marked L), `version`, and `part.<ticket>` (what is kept
        of a ticket that was handed back).
        """
        return f"rl_{self.job}"

    @property
    def lease_bucket(self) -> str:
        return f"rl_{self.job}_lease"

    @property
    def inbox_prefix(self) -> str:
        return self._prefixed(f"_INBOX_{self.job}")

    def prompt(self, ticket: int | str) -> str:
        return self._subject(f"prompt.{ticket}")

    def trajectory(self, ticket: int | str, sample: int | None = None) -> str:
        return self._subject(f"traj.{ticket}" + ("" if sample is None else f".{sample}"))

    def evaluation(self, direction: str, key: str) -> str:
        """Return the subject of one evaluation prompt; `direction` is `ask` or `answer`."""
        return self._subject(f"eval.{direction}.{key}")

    def heartbeat(self, worker: str) -> str:
        return self._subject(f"hb.{worker}")

    def control(self, worker: str) -> str:
        """Return the subject on which a worker is asked to take part in a weight epoch."""
        return self._subject(f"weights.{worker}")

    @property
    def control_all(self) -> str:
        """The subject on which all workers are asked at once; no worker has such a name."""
        return self.control("_all")

    @property
    def announcements(self) -> str:
        """The subject on which changes of the state bucket are republished."""
        return self._subject("ann")

    def _subject(self, rest: str) -> str:
        return self._prefixed(f"rl.{self.job}.{rest}")

    def _prefixed(self, subject: str) -> str:
        return f"{self.prefix}.{subject}" if self.prefix else subject


def ticket_of(trajectory_subject: str) -> int | None:
    """Return the ticket in a subject that `JobNames.trajectory` made; None for any other subject."""
    match = _TRAJECTORY.fullmatch(trajectory_subject)
    return int(match[1]) if match else None


_TRAJECTORY = re.compile(r".+\.traj\.([1-9][0-9]{0,17})(?:\.[0-9]{1,9})?", re.ASCII | re.DOTALL)
