"""The exit codes of our processes, and the exception that carries one."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of our processes. A failure is final, except STEP_FAILED and TRY_AGAIN."""

    DONE = 0
    USAGE = 64
    """The command line is wrong."""
    UNUSABLE = 65
    """The data or the model cannot be used, or the numbers of the training have gone bad."""
    STEP_FAILED = 74
    """A recorded step raised an exception of its own: the next attempt repeats it, or gives it up. Below
    TRY_AGAIN, since a launcher passes on the least code of ranks that end together."""
    TRY_AGAIN = 75
    """Something outside failed: the broker, the disk, a port, a lost peer."""
    REFUSED = 78
    """The configuration is refused."""


class ExitError(Exception):
    """Ends the process with `code` and one message that names cause and remedy, without a traceback."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code = code
