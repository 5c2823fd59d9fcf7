"""Files that are whole or absent: written beside the target, flushed to disk, then renamed over it.

A reader never meets half a file, and a crash leaves the previous version in place. JSON is strict (no NaN literals:
they become null), so that any language can read a run's records.
"""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["FULL", "atomic_path", "read_json", "read_lines", "write_json", "write_lines", "write_text"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a disk that has no room, or a file that may not grow


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; when the block ends well, it becomes ``path`` in one step.

    Raises:
        OSError: it cannot be written (the disk is full, for one); what was at ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files private; a report is meant to be shared
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, name):  # a full disk names none, or one nobody knows
            error.filename = os.fspath(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically.

    File names that are not UTF-8 reach Python as lone surrogates; they are written as ``\\udc80``, the escape of JSON.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, atomically."""
    write_text(path, json.dumps(_strict(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read what :func:`write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write one JSON value a line, atomically."""
    write_text(path, "".join(_line(value) for value in values))


def read_lines(path: Path) -> list[Any]:
    """Read JSON lines; an absent file has none, and a torn last line (a copy broken off) is dropped."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")  # bytes: the tear may go through a character
    return [json.loads(line) for line in lines[:-1] if line]


def _line(value: Any) -> str:
    return json.dumps(_strict(value), ensure_ascii=False, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: null says "no number" to every reader."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
