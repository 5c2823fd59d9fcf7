"""Files named in cells: found inside the data folder, decoded by threads into one array.

A cell's path is taken relative to the data folder, links are followed, and what comes out must still be
inside. The arrays are allocated before anything is decoded, in memory if they are small and in a nameless
temporary file if not, so that a table of a million pictures needs disk and not memory.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.sequences import sequences
from hesse.multimodal.table import Table
from hesse.multimodal.values import short

__all__ = ["OUTSIDE", "allocate", "decode_files", "find_file", "find_files", "find_sequences"]

T = TypeVar("T")

OUTSIDE = "path outside the data folder"
IN_MEMORY = 2 << 30  # bytes of one array
SPAN = 32  # files a thread takes at a time


def find_file(root: Path, cell: str, top: str | None = None) -> Path:
    """The file that a cell names, with symbolic links followed; it need not exist.

    The name may be spelled in either of Unicode's normal forms: file systems differ in which they keep. ``top`` is the
    root with links followed, for who asks often.

    Raises:
        InputError: ``..``, an absolute path or a link leads out of ``root``.

    Example:
        >>> try:
        ...     find_file(Path("pets"), "../secret.png")
        ... except InputError as error:
        ...     print(error.finding.kind)
        path outside the data folder
    """
    if "\0" in cell:
        raise InputError("missing file", short(cell), "A path cannot contain a NUL character.", "Correct the path.")
    if re.match(r"[a-z][a-z0-9+.-]+://", cell, re.IGNORECASE):
        message, remedy = "This is an address, and nothing is fetched.", "Download the file and write its path."
        raise InputError("missing file", short(cell, 200), message, remedy)
    top = os.path.realpath(root) if top is None else top
    spellings = dict.fromkeys((cell, unicodedata.normalize("NFC", cell), unicodedata.normalize("NFD", cell)))
    # Not Path.resolve, which raises for circular links and names that are too long.
    paths = [os.path.realpath(f"{top}{os.sep}{s}" if not os.path.isabs(s) else s) for s in spellings]  # noqa: PTH117
    path = next((p for p in paths if os.path.exists(p)), paths[0])  # noqa: PTH110
    if not path.startswith(top if top.endswith(os.sep) else top + os.sep):
        raise InputError(
            OUTSIDE,
            short(cell, 200),
            f"The path leads to {path}, which is not inside {top}.",
            "Move the files into the folder, or name a folder that holds them all with --data-root (data_root=).",
        )
    return Path(path)


def find_files(
    table: Table, column: str, cells: Sequence[str | None], rows: Sequence[int], root: Path
) -> list[Path | None]:
    """The files of several cells, None for missing ones.

    Args:
        table, column: for the error.
        cells: of the rows ``rows`` (indices from 0).
        root: the data folder.

    Raises:
        InputError: as :func:`find_file`, naming the row.
    """
    files, top = [], os.path.realpath(root)
    for cell, row in zip(cells, rows, strict=True):
        try:
            files.append(None if cell is None else find_file(root, cell, top))
        except InputError as error:
            raise at_cell(error, table, column, row, cell or "") from error
    return files


def find_sequences(
    table: Table, column: str, values: pa.Array, rows: NDArray[np.int64], root: Path
) -> list[tuple[Path, ...] | None]:
    """The files of cells that name several each, None for missing ones; errors as of :func:`find_files`."""
    found: list[tuple[Path, ...] | None] = []
    for cells, row in zip(sequences(values), rows.tolist(), strict=True):
        paths = find_files(table, column, cells or (), [row] * len(cells or ()), root)
        found.append(tuple(path for path in paths if path is not None) or None)
    return found


def at_cell(error: InputError, table: Table, column: str, row: int, cell: str) -> InputError:
    """The same error, told by the place in the table."""
    f = error.finding
    return InputError(f.kind, f"{table.where(column, row)} ({short(cell, 200)})", f.message, f.remedy, f.value)


def decode_files(
    files: Sequence[T | None],
    decode: Callable[[T], NDArray[Any]],
    out: NDArray[Any],
    tick: Callable[[int], None],
) -> dict[int, InputError]:
    """Decode ``files[i]`` into ``out[i]`` on several threads; the decoders release Python's lock.

    Args:
        files: a path, or several of one row; None leaves the zeros that are there.
        decode: gives an array of ``out``'s shape and dtype, or raises InputError.
        out: ``[len(files), ...]``.
        tick: told, in this thread, how many more files are done.

    Returns:
        The errors, by position.
    """

    def decode_span(start: int) -> tuple[int, dict[int, InputError]]:
        done, errors = 0, {}
        for i in range(start, min(start + SPAN, len(files))):
            file = files[i]
            if file is None:
                continue
            done += 1
            try:
                out[i] = decode(file)
            except InputError as error:
                errors[i] = error
        return done, errors

    failed: dict[int, InputError] = {}
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        try:
            for done, errors in pool.map(decode_span, range(0, len(files), SPAN)):
                failed.update(errors)
                tick(done)
        except BaseException:  # Ctrl-C: what has not begun need not be waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros: in memory, or, from 2 GiB on, in a temporary file that vanishes with the array.

    Raises:
        InputError: the disk has no room for the file.
    """
    size = math.prod(shape) * dtype.itemsize
    if size <= IN_MEMORY:
        return np.zeros(shape, dtype)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if size > free:  # found out later, while writing, it would be a bus error
        raise InputError(
            "no space",
            folder,
            f"The decoded data need {size / 2**30:.1f} GiB of disk and {free / 2**30:.1f} GiB are free.",
            "Set TMPDIR to a folder on a larger disk.",
        )
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=shape)
