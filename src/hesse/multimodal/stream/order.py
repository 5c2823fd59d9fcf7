"""The order of an epoch's rows: pieces in random order, and the rows of as many as fill a buffer shuffled together.

It follows from the seed and the epoch alone, whoever asks and from wherever on. With a buffer as large as the table it
is a full shuffle. With a smaller one a batch holds rows of a handful of pieces drawn from all over the table, so a
table that is sorted (by class, by day) is best shuffled once before: whatever half a handful of its pieces have in
common, a batch has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Window", "windows"]


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together.

    Attributes:
        pieces: to read, ascending.
        first: how many rows of the epoch come before.
        rows: how many there are.
        seed: of their order.
    """

    pieces: NDArray[np.int64]
    first: int
    rows: int
    seed: tuple[int, int, int]

    def order(self) -> NDArray[np.int64]:
        """Which of the rows of its pieces, which lie one behind the other, comes when."""
        return np.random.default_rng(self.seed).permutation(self.rows)


def windows(counts: NDArray[np.int64], buffer: int, epoch: int, seed: int) -> list[Window]:
    """The windows of an epoch.

    Args:
        counts: int64 ``[pieces]``, how many rows of each piece are wanted.
        buffer: rows; a window ends with the piece that reaches it.

    Example:
        >>> [(w.pieces.tolist(), w.rows) for w in windows(np.array([4, 0, 5, 3, 6]), buffer=8, epoch=0, seed=0)]
        [([2, 4], 11), ([0, 3], 7)]
    """
    found: list[Window] = []
    some: list[int] = []
    rows = first = 0
    shuffled = np.random.default_rng((seed, epoch)).permutation(len(counts))
    wanted = [int(piece) for piece in shuffled if counts[piece]]
    for piece in wanted:
        some.append(piece)
        rows += int(counts[piece])
        if rows >= buffer or piece == wanted[-1]:
            found.append(Window(np.sort(some), first, rows, (seed, epoch, len(found))))
            first += rows
            some, rows = [], 0
    return found
