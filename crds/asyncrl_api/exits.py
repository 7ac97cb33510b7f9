"""What our processes exit with, and the exception that says it."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What our processes exit with; the first three failures are final, the last is tried again."""

    DONE = 0
    USAGE = 64
    """The command line is wrong."""
    UNUSABLE = 65
    """Data, model or numbers cannot be trained on."""
    TRY_AGAIN = 75
    """Something outside failed: broker, disk, port, a lost peer."""
    REFUSED = 78
    """The configuration is refused."""


class ExitError(Exception):
    """Ends a process with `code` and one message that names the cause and the remedy, without a traceback."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code = code
