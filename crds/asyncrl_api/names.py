"""Names on the broker, and where it is."""

from typing import Self

from asyncrl_api.wire import Wire

PROMPT_CONSUMER = "w"
"""The durable consumer of the prompt stream that all workers pull from."""
ASK_CONSUMER, ANSWER_CONSUMER = "ask", "answer"
"""The two directions of the evaluation stream: prompts to workers, results to the controller."""


class NatsAddress(Wire):
    """Where the broker is, and who this process is to it."""

    url: str
    credentials_file: str = ""
    """Of this role: JSON with `user` and `password`, or, named *.creds, a NATS credentials file. Empty: none
    are asked for."""


class JobNames(Wire):
    """Names on the broker. One set of streams per job: ticket = stream sequence allows no sharing."""

    job: str
    prefix: str = ""
    """Before every subject, where an account has only some."""

    @classmethod
    def on_own_server(cls, namespace: str, name: str) -> Self:
        return cls(job=f"{namespace}_{name}")

    @classmethod
    def on_shared_server(cls, namespace: str, name: str, uid: str, prefix: str = "") -> Self:
        """There, what an earlier object of this name left must not be taken for this one's."""
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
        """`live` (the fields marked L), `version`, and `part.<ticket>` (what is kept of one handed back)."""
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
        """`direction` is `ask` or `answer`."""
        return self._subject(f"eval.{direction}.{key}")

    def heartbeat(self, worker: str) -> str:
        return self._subject(f"hb.{worker}")

    def control(self, worker: str) -> str:
        """Where a worker is asked to take part in a weight epoch."""
        return self._subject(f"weights.{worker}")

    @property
    def announcements(self) -> str:
        """Where changes of the state bucket are republished."""
        return self._subject("ann")

    def _subject(self, rest: str) -> str:
        return self._prefixed(f"rl.{self.job}.{rest}")

    def _prefixed(self, subject: str) -> str:
        return f"{self.prefix}.{subject}" if self.prefix else subject


def ticket_of(trajectory_subject: str) -> int:
    """Return the ticket that `JobNames.trajectory` has put into a subject."""
    return int(trajectory_subject.rpartition(".traj.")[2].partition(".")[0])
