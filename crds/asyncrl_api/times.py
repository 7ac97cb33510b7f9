"""Times as Kubernetes writes them: RFC 3339, UTC, whole seconds."""

import re
from datetime import UTC, datetime


def to_text(seconds: float) -> str:
    """Return a Unix time as text; fractions of a second are cut off."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})", re.ASCII
)


def is_time(text: str) -> bool:
    """Return whether a text is a time that a status may hold and that can be counted with: RFC 3339."""
    if not _RFC_3339.fullmatch(text):
        return False
    try:
        to_text(to_seconds(text))
    except (ValueError, OverflowError):
        return False
    return True


def to_seconds(text: str) -> float:
    """Return the Unix time of a text.

    Raises:
        ValueError: the text is not RFC 3339.
    """
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
