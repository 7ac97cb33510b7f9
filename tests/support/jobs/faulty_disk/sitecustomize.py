"""Gives the Python processes that start with this folder on their PYTHONPATH a disk that can be made to fail.

The file that FAULTY_DISK names says what a flush to disk does at present: `full`, a number of seconds that it
takes longer, or nothing if there is no such file.
"""

import errno
import os
import time
from pathlib import Path
from typing import Any

_flush = os.fsync


def _fsync(descriptor: Any) -> None:
    try:
        state = Path(os.environ["FAULTY_DISK"]).read_text()
    except OSError:
        state = ""
    if state == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if state:
        time.sleep(float(state))
    _flush(descriptor)


os.fsync = _fsync  # type: ignore[assignment]  # the parameter has another name
