"""A run folder belongs to one process at a time, and says so when the disk is full.

The owner holds a lock on a file in the folder. It is the system's lock, so it ends with the process, however that ends:
after a crash nothing has to be removed by hand. The file says who it is. Reading a run (predicting, reporting) needs
no lock, because every file of a run is whole at all times.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hesse.files import FULL
from hesse.finding import InputError
from hesse.training.checkpoint import CHECKPOINT
from hesse.training.run import LOCK, Run, clear, refuse_used

try:
    import fcntl
except ImportError:  # Windows has no such locks: there folders are not guarded
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked", "owned", "refuse_owned"]

_held: set[IO[str]] = set()


@contextmanager
def owned(folder: Path, resumed: Run | None, overwrite: bool) -> Iterator[None]:
    """Own a run folder while the block runs, cleared first if it is to be overwritten.

    Args:
        folder: made if it is not there.
        resumed: the run in it, as it was read before the lock was got.
        overwrite: whether to remove the run in it.

    Raises:
        InputError: another process owns it, or has used it meanwhile; or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if resumed is None:
                refuse_used(folder, overwrite)
            elif Run(folder).config != resumed.config:
                raise _in_use(folder, "Another process has gone on with this run meanwhile")
            if resumed is None:
                clear(folder)
            yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        saved = (folder / CHECKPOINT).exists()
        free = shutil.disk_usage(folder).free / 2**20
        raise InputError(
            "no space",
            str(error.filename or folder),
            f"The file cannot be written: {error.strerror} ({free:.0f} MiB are free). "
            + ("What was saved before is whole." if saved else "Nothing was saved yet."),
            f"Make room, then {'go on with --resume' if saved else 'start again with --overwrite'}.",
        ) from error


def refuse_owned(folder: Path) -> None:
    """Raise InputError (kind ``"run in use"``) if a process owns the folder right now."""
    if fcntl is None or not (folder / LOCK).exists():
        return
    with suppress(FileNotFoundError), (folder / LOCK).open("r", encoding="utf-8") as file:
        _take(folder, file, fcntl.LOCK_SH)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that exists, a run's or a search's."""
    if fcntl is None:
        yield
        return
    path = folder / LOCK
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _take(folder, file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except FileNotFoundError:
            pass  # the owner before removed it between opening and locking: so there is a new file to be made
        except BaseException:
            file.close()
            raise
        file.close()
    _held.add(file)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        _held.discard(file)
        file.close()


def _take(folder: Path, file: IO[str], how: int) -> None:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip() or "Another process"
        raise _in_use(folder, f"{who[0].upper()}{who[1:]} is training in this folder") from None


def _in_use(folder: Path, what: str) -> InputError:
    return InputError("run in use", str(folder), f"{what}.", "Wait until it has ended, or choose another --out.")


def _forget() -> None:
    """In a forked process (a worker that decodes), which must not keep the lock when its parent is gone."""
    while _held:
        _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
