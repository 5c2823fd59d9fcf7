"""A table that need not fit in memory: rows in pieces, each of which can be read by itself, as often as it takes.

Every piece comes out as :func:`hesse.multimodal.read_table` would have read it: trimmed, missing words missing, columns
of texts, int64 and float64. A file that is changed in the meantime is refused.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.stamp import Stamp
from hesse.multimodal.stream.files import find_tables
from hesse.multimodal.stream.readers import Delimited, Frame, JsonLines, Reader, row_groups
from hesse.multimodal.table import Places, Table, check_names, plain, read_table

__all__ = ["Source", "open_source"]


@dataclass(frozen=True)
class _File:
    path: Path | None
    name: str
    stamp: Stamp | None
    reader: Reader
    names: list[str]  # the reader's, composed and trimmed
    first: int  # piece

    def require_unchanged(self) -> None:
        if self.path is not None and self.stamp is not None:
            self.stamp.require(self.path, self.name)


class Source:
    """Rows in pieces; made by :func:`open_source`.

    Attributes:
        name: of the file or folder.
        folder: that paths in cells are relative to; None for a data frame.
        names: of the columns.
        starts: int64 ``[pieces + 1]``, the first row of each piece, and at the end the number of rows.
    """

    def __init__(self, name: str, folder: Path | None, files: Sequence[_File]) -> None:
        self.name, self.folder = name, folder
        self._files = list(files)
        self._firsts = [file.first for file in files]
        self.names = files[0].names
        rows = [count for file in files for count in file.reader.rows]
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def pieces(self) -> int:
        return len(self.starts) - 1

    def gather(self, rows: NDArray[np.int64], columns: Sequence[str] | None = None) -> Table:
        """Some rows of the whole, ascending, from 0; each piece that holds any is read once.

        Types may differ from piece to piece (a whole number here, a fraction there); the table has one that fits.
        """
        ends = np.searchsorted(rows, self.starts)
        parts = [
            self.read(piece, columns).data.take(pa.array(rows[ends[piece] : ends[piece + 1]] - self.starts[piece]))
            for piece in np.flatnonzero(np.diff(ends)).tolist()
        ]
        data = pa.concat_tables(parts, promote_options="permissive").combine_chunks()
        return Table(data, self.name, self.folder, places=self.places(rows))

    def places(self, rows: NDArray[np.int64]) -> Places:
        """Where rows of the whole are in the files."""
        piece_of = np.searchsorted(self.starts, rows, side="right") - 1
        file = np.searchsorted(self._firsts, piece_of, side="right") - 1
        return Places(tuple(f.name for f in self._files), file, rows - self.starts[np.array(self._firsts)[file]])

    def read(self, piece: int, columns: Sequence[str] | None = None) -> Table:
        """A piece as a table, whose errors name rows as the file counts them.

        Raises:
            InputError: the file has been changed, or cannot be read any more.
        """
        file = self._files[bisect_right(self._firsts, piece) - 1]
        columns = self.names if columns is None else columns
        file.require_unchanged()
        try:
            raw = file.reader.read(piece - file.first, [file.names.index(name) for name in columns])
        except InputError:
            file.require_unchanged()  # which would be the better reason
            raise
        except OSError as error:
            raise _unreadable(file.name, error) from error
        data = pa.table([plain(column) for column in raw.columns], names=list(columns)).combine_chunks()
        first = int(self.starts[piece] - self.starts[file.first])
        file.require_unchanged()
        return Table(data, file.name, self.folder, first)


def open_source(source: Any, *, delimiter: str | None = None) -> Source:
    """A table for reading in pieces.

    Args:
        source: path of a CSV, TSV, JSON lines or Parquet file, of a folder of such files, or a data frame.
        delimiter: of CSV or TSV files; found by itself if None.

    Raises:
        InputError: as :func:`hesse.multimodal.read_table`, and: the files of a folder differ in their columns.
        TypeError: ``source`` is neither a path nor a data frame.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for i in range(3):
        ...         _ = Path(folder, f"part-{i}.csv").write_text(f"name,weight\\n Minka,{i}\\nNA,\\n")
        ...     pets = open_source(folder)
        ...     len(pets), pets.read(1).data.to_pydict(), pets.read(2).where("name", 1)
        (6, {'name': ['Minka', None], 'weight': ['1', None]}, "part-2.csv, row 2, column 'name'")
    """
    if not isinstance(source, str | os.PathLike):
        table = read_table(source)
        return Source(table.name, None, [_File(None, table.name, None, Frame(table), table.names, 0)])
    path = Path(os.fspath(source))
    name = os.fsencode(path.name or path.resolve().name).decode("utf-8", "replace")
    try:
        found, paths = find_tables(path, name)
        folder = path if path.is_dir() else path.parent
        within = os.path.realpath(folder)
        names = [os.fsencode(os.path.relpath(p, within)).decode("utf-8", "replace") for p in paths]
        names = names if path.is_dir() else [name]
        stamps = [Stamp.of(p) for p in paths]
        readers: list[Reader]
        if found == "parquet":
            readers = row_groups(paths, names, Path(within) if path.is_dir() else path.parent)
        elif found == "json":
            readers = [JsonLines(p, n) for p, n in zip(paths, names, strict=True)]
        else:
            readers = [Delimited(p, n, delimiter) for p, n in zip(paths, names, strict=True)]
    except OSError as error:
        raise _unreadable(name, error) from error
    files, first = [], 0
    for p, n, stamp, reader in zip(paths, names, stamps, readers, strict=True):
        stamp.require(p, n)
        files.append(_File(p, n, stamp, reader, check_names(reader.names, n), first))
        _require_same_columns(files[0], files[-1])
        first += len(reader.rows)
    if not first or not any(sum(file.reader.rows) for file in files):
        raise InputError(
            "empty table", name, "The table has column names but no rows.", "Check that it was written completely."
        )
    return Source(name, folder, files)


def _require_same_columns(one: _File, other: _File) -> None:
    if set(one.names) == set(other.names):
        return
    lacking = [name for name in one.names if name not in other.names]
    more = [name for name in other.names if name not in one.names]
    parts = [f"lacks {', '.join(lacking[:5])}" if lacking else "", f"has {', '.join(more[:5])} besides" if more else ""]
    raise InputError(
        "different columns",
        other.name,
        f"The files of a folder are one table, and this one {' and '.join(part for part in parts if part)} "
        f"(compared with {one.name}).",
        "Give the files the same columns, or train on one of them.",
    )


def _unreadable(name: str, error: OSError) -> InputError:
    return InputError(
        "unreadable file",
        name,
        f"The file cannot be read: {error.strerror or error}.",
        "Check its permissions and the disk.",
    )
