"""One reader a format: what a file's columns are called, how many rows each piece has, and the cells of a piece.

To index a file is to read it once, piece by piece, with the checks of :mod:`hesse.multimodal.delimited` and its kin;
Parquet has its index inside. A piece is a block of a text file, a row group of a Parquet file, a slice of a data frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import dataset
from pyarrow import json as arrow_json

from hesse.finding import InputError
from hesse.multimodal.delimited import (
    damaged_rows,
    decimal_comma,
    layout,
    parse,
    ragged_rows,
    unclosed_quote,
    with_point,
)
from hesse.multimodal.encoding import require_utf8
from hesse.multimodal.json_lines import explain, require_object
from hesse.multimodal.stream.blocks import LARGEST, blocks_of_lines, blocks_of_rows, read_block
from hesse.multimodal.table import Table, damaged_parquet

__all__ = ["Delimited", "Frame", "JsonLines", "Reader", "RowGroups", "row_groups"]

SLICE = 1 << 16  # rows of a data frame


class Reader(Protocol):
    """One file, indexed.

    Attributes:
        names: of the columns, as they stand in the file.
        rows: of each piece.
    """

    names: list[str]
    rows: list[int]

    def read(self, piece: int, positions: Sequence[int]) -> pa.Table:
        """Some columns of a piece, in the order asked for."""


class Delimited:
    """A CSV or TSV file."""

    def __init__(self, path: Path, name: str, delimiter: str | None) -> None:
        self._path, self._name = path, name
        self._delimiter, most = layout(path, name, delimiter)
        self.names: list[str] = []
        self.rows: list[int] = []
        self._places: list[tuple[int, int]] = []
        commas: list[tuple[bool, bool]] = []
        done = 0
        for start, block in blocks_of_rows(path, self._delimiter):
            if not block.strip() and len(self.names) > 1:
                continue  # empty lines
            if len(block) > LARGEST:
                raise unclosed_quote(name, done + bool(self.names))
            table = self._parse(block, len(self.names) or most, exact=bool(self.names), before=done)
            if not self.names:
                self.names = [str(column[0].as_py()) for column in table.columns]
                table = table.slice(1)
            self._places.append((start, len(block)))
            self.rows.append(table.num_rows)
            done += table.num_rows
            if self._delimiter == ";":
                seen = [decimal_comma(column) for column in table.columns]
                commas = [(a or c, b and d) for (a, b), (c, d) in zip(commas or seen, seen, strict=True)]
        self._require_closed_quotes(block, done)
        self._points = [i for i, (some, fit) in enumerate(commas) if some and fit]

    def read(self, piece: int, positions: Sequence[int]) -> pa.Table:
        start, size = self._places[piece]
        block = read_block(self._path, start, size)
        table = self._parse(block, len(self.names), exact=True, before=sum(self.rows[:piece]))
        table = table.slice(1) if start == 0 else table
        return pa.table(
            [with_point(table.column(i)) if i in self._points else table.column(i) for i in positions],
            names=[str(i) for i in positions],
        )

    def _parse(self, block: bytes, columns: int, exact: bool, before: int) -> pa.Table:
        ragged: list[Any] = []

        def note(row: Any) -> str:
            ragged.append(row._replace(number=row.number + before + (1 if before else 0)))
            return "skip"

        try:
            table = parse(pa.BufferReader(block), self._delimiter, columns, note, exact=exact)
        except pa.ArrowException as error:
            raise damaged_rows(self._name, error) from error
        if ragged:
            raise ragged_rows(self._name, self._delimiter, ragged)
        return table

    def _require_closed_quotes(self, last: bytes, rows: int) -> None:
        """An unclosed quote swallows the rest of the file into one cell, and pyarrow is content with that."""
        if last.count(b'"') % 2:
            table = self._parse(last, len(self.names), exact=True, before=0)
            if "\n" in (table.column(table.num_columns - 1)[-1].as_py() or ""):
                raise unclosed_quote(self._name, rows)


class JsonLines:
    """A JSON lines file; the type of a column is one that fits all its pieces."""

    def __init__(self, path: Path, name: str) -> None:
        require_utf8(path, name)
        self._path, self._name = path, name
        self.rows: list[int] = []
        self._places: list[tuple[int, int]] = []
        self._schema: pa.Schema | None = None
        types: dict[str, pa.DataType] = {}
        done = 0
        for start, block in blocks_of_lines(path):
            lines = [line.strip(b" \t\r") for line in _unmarked(block, start).split(b"\n")]
            lines = [line for line in lines if line]
            if not lines:
                continue
            for i, line in enumerate(lines):
                require_object(line, f"{name}, row {done + i + 1}")
            found = self._parse(block, start)
            for key, kind in zip(found.schema.names, found.schema.types, strict=True):
                types[key] = self._common(types.get(key, pa.null()), kind)
            self._places.append((start, len(block)))
            self.rows.append(found.num_rows)
            done += found.num_rows
        if not done:
            raise InputError("empty table", name, "The file is empty.", "Check that it was written completely.")
        self.names = list(types)
        self._schema = pa.schema(types)

    def read(self, piece: int, positions: Sequence[int]) -> pa.Table:
        start, size = self._places[piece]
        table = self._parse(read_block(self._path, start, size), start)
        return table.select([self.names[i] for i in positions])

    def _parse(self, block: bytes, start: int) -> pa.Table:
        text = _unmarked(block, start)
        settings = arrow_json.ParseOptions(explicit_schema=self._schema)
        try:
            return arrow_json.read_json(
                pa.BufferReader(text), arrow_json.ReadOptions(use_threads=False, block_size=len(text) + 1), settings
            )
        except pa.ArrowException as error:
            raise explain(self._path, self._name, str(error)) from error

    def _common(self, one: pa.DataType, other: pa.DataType) -> pa.DataType:
        if {one.id, other.id} == {pa.string().id, pa.timestamp("s").id}:
            return pa.string()
        fields = [pa.schema({"value": kind}) for kind in (one, other)]
        try:
            return pa.unify_schemas(fields, promote_options="permissive").field(0).type
        except pa.ArrowException as error:
            raise explain(self._path, self._name, str(error)) from error


class RowGroups:
    """A Parquet file, with the columns that the names of its folders say."""

    def __init__(self, fragment: dataset.ParquetFileFragment, schema: pa.Schema, name: str) -> None:
        self._name, self._schema = name, schema
        own = set(fragment.physical_schema.names) | set(dataset.get_partition_keys(fragment.partition_expression))
        self.names = [column for column in schema.names if column in own]
        if len(fragment.physical_schema.names) != len(set(fragment.physical_schema.names)):
            self.names = list(fragment.physical_schema.names)  # one of them twice, which will be refused
        self._pieces = [piece for piece in fragment.split_by_row_group() if piece.row_groups[0].num_rows]
        self.rows = [piece.row_groups[0].num_rows for piece in self._pieces]

    def read(self, piece: int, positions: Sequence[int]) -> pa.Table:
        wanted = [self.names[i] for i in positions]
        try:
            table = self._pieces[piece].to_table(schema=self._schema, columns=wanted, use_threads=False)
            table.validate(full=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged_parquet(self._name, error) from error
        return table


def row_groups(files: Sequence[Path], names: Sequence[str], folder: Path) -> list[Reader]:
    """A reader for each of the files, which are one dataset."""
    try:
        whole = dataset.dataset(
            [str(file) for file in files],
            format="parquet",
            partitioning=dataset.partitioning(flavor="hive"),
            partition_base_dir=str(folder),
        )
        schema = pa.unify_schemas(
            [whole.schema, *(f.physical_schema for f in whole.get_fragments())], promote_options="permissive"
        )
        return [RowGroups(f, schema, name) for f, name in zip(whole.get_fragments(), names, strict=True)]
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise damaged_parquet(names[0] if len(names) == 1 else folder.name, error) from error


class Frame:
    """A table that is in memory."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.names = table.names
        self.rows = [min(SLICE, len(table) - start) for start in range(0, len(table), SLICE)]

    def read(self, piece: int, positions: Sequence[int]) -> pa.Table:
        return self._table.data.select(list(positions)).slice(piece * SLICE, SLICE)


def _unmarked(block: bytes, start: int) -> bytes:
    return block.removeprefix(b"\xef\xbb\xbf") if start == 0 else block
