"""Files for pyarrow's readers, opened without an object of Python's."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

__all__ = ["opened"]


def opened(path: Path) -> pa.NativeFile:
    """A file whose readers may outlive the call that read it.

    Arrow's threads let go of a reader some time after its result is there. If that holds an object of Python's (a file,
    a callback) they ask for the interpreter then, and where it is just being taken down, because the program has ended
    with an error for instance, the process is aborted.
    """
    return pa.OSFile(os.fsencode(path))
