"""A text file in blocks of whole rows: every block ends where a row ends, so that each can be read by itself.

Where a row of a CSV file ends depends on all quotes before it; so the file is walked through once, block by block, and
the places are kept. A block begins at a row, which makes a quote after a delimiter or a line's end an opening one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["blocks_of_lines", "blocks_of_rows", "read_block"]

BLOCK = 1 << 20  # bytes
LARGEST = 64 << 20  # of a row


def blocks_of_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Where each block begins, and its bytes; blocks end at line ends."""
    return _blocks(path, lambda block: block.rfind(b"\n") + 1)


def blocks_of_rows(path: Path, delimiter: str) -> Iterator[tuple[int, bytes]]:
    """The same for a CSV file, where a line's end inside quotes ends no row."""
    opening = re.escape(delimiter.encode()) + rb"\r\n"
    quoted = re.compile(rb'(?:\A(?:\xef\xbb\xbf)?|(?<=[%s]))"[^"]*(?:""[^"]*)*(?:"|\Z)' % opening)

    def end(block: bytes) -> int:
        return _last_row_end(block, [m.span() for m in quoted.finditer(block)] if b'"' in block else [])

    return _blocks(path, end)


def read_block(path: Path, start: int, size: int) -> bytes:
    """The bytes of a block."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _blocks(path: Path, end_of: object) -> Iterator[tuple[int, bytes]]:
    assert callable(end_of)
    start, rest = 0, b""
    with path.open("rb") as file:
        while True:
            more = file.read(BLOCK)
            block = rest + more
            # A row that goes on and on: an unclosed quote, which whoever reads the block will see.
            end = end_of(block) if more and len(block) <= LARGEST else len(block)
            if end:
                yield start, block[:end]
            start, rest = start + end, block[end:]
            if not more:
                return


def _last_row_end(block: bytes, quoted: list[tuple[int, int]]) -> int:
    """Behind the last line's end that is in no quotes; 0 if there is none."""
    mark = b"\n" if b"\n" in block else b"\r"
    # A carriage return at the very end may be half of a line's end.
    end = len(block) if mark == b"\n" else len(block) - 1
    while True:
        at = block.rfind(mark, 0, end)
        while quoted and quoted[-1][0] > at:
            quoted.pop()
        if at < 0 or not quoted or at >= quoted[-1][1]:
            return at + 1
        end = quoted[-1][0]
