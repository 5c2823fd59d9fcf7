"""Sets of inputs by number: each is held once, and unions of many are made at once.

A tensor's elements carry such numbers instead of lists, so that moving elements moves integers, equal sets are found
equal without a look at their members, and a union that was made before costs a look-up.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["IndexSets", "TooDense"]

Numbers = NDArray[np.int64]


class TooDense(Exception):
    """The sets hold more members than was asked for."""


class IndexSets:
    """Sets of inputs 0 .. n - 1 by number, each held once.

    Args:
        n: how many inputs there are.
        most: members that one union may have to look at before :class:`TooDense` is raised.

    Example:
        >>> sets = IndexSets(3, most=100)
        >>> ids = sets.union(np.array([1, 2, 0]), np.array([3, 2, 2]))
        >>> [sets.members(np.array([i]))[1].tolist() for i in ids]
        [[0, 2], [1], [1]]
    """

    def __init__(self, n: int, most: int) -> None:
        self.n, self.most = n, most
        self._pool = np.arange(n)
        self._start = np.concatenate([[0], np.arange(n)])
        self._size = np.concatenate([[0], np.ones(n, dtype=np.int64)])
        self._count, self._filled = n + 1, n
        # A set is known again by the sum of its members' random numbers; two different ones collide once in 2^64.
        self._weights = np.random.default_rng(0).integers(1 << 63, size=n, dtype=np.uint64)
        self._known: dict[int, int] = {}
        self._pairs: dict[int, int] = {}
        self._full = -1

    def members(self, ids: Numbers) -> tuple[Numbers, Numbers]:
        """How many members each of the sets has, and all of them, one set after the other, ascending.

        Raises:
            TooDense: there are more than ``most``.
        """
        sizes = self._size[ids]
        total = int(sizes.sum())
        if total > self.most:
            raise TooDense
        ends = np.cumsum(sizes)
        places = np.repeat(self._start[ids] - ends + sizes, sizes) + np.arange(total)
        return sizes, self._pool[places]

    def union(self, a: Numbers, b: Numbers) -> Numbers:
        """Element by element."""
        result = np.where(a == 0, b, a)
        for side in (a, b):
            result[side == self._full] = self._full
        open_ = np.flatnonzero((a != b) & (a != 0) & (b != 0) & (result != self._full))
        if not open_.size:
            return result
        low, high = np.minimum(a[open_], b[open_]), np.maximum(a[open_], b[open_])
        keys, inverse = np.unique((low << 32) | high, return_inverse=True)
        names = keys.tolist()
        found = np.array([self._pairs.get(key, -1) for key in names])
        new = np.flatnonzero(found < 0)
        if new.size:
            pair = keys[new]
            groups = np.tile(np.arange(new.size), 2)
            found[new] = self.group(groups, np.concatenate([pair >> 32, pair & 0xFFFFFFFF]), new.size)
            self._pairs.update(zip(pair.tolist(), found[new].tolist(), strict=True))
        result[open_] = found[inverse]
        return result

    def group(self, groups: Numbers, ids: Numbers, count: int) -> Numbers:
        """The unions of all ids of one group, for groups 0 .. count - 1."""
        result = np.zeros(count, dtype=np.int64)
        keep = ids > 0
        if not keep.all():
            groups, ids = groups[keep], ids[keep]
        if not ids.size:
            return result
        keys = _distinct(groups * np.int64(self._count) + ids)
        groups, ids = keys // self._count, keys % self._count
        result[groups] = ids
        if self._full > 0:
            result[groups[ids == self._full]] = self._full
        several = (np.bincount(groups, minlength=count) > 1) & (result != self._full)
        todo = several[groups]
        if not todo.any():
            return result
        groups, ids = groups[todo], ids[todo]
        sizes, members = self.members(ids)
        keys = _distinct(np.repeat(groups, sizes) * np.int64(self.n) + members)
        groups, members = keys // self.n, keys % self.n
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        result[groups[starts]] = self._number(members, starts)
        return result

    def _number(self, members: Numbers, starts: Numbers) -> Numbers:
        """The numbers of sets given one after the other; new ones are put into the pool."""
        sizes = np.diff(starts, append=members.size)
        names = np.add.reduceat(self._weights[members], starts).tolist()
        numbers = np.array([self._known.get(name, -1) for name in names])
        fresh: dict[int, int] = {}
        for place in np.flatnonzero(numbers < 0).tolist():
            fresh.setdefault(names[place], place)
        if not fresh:
            return numbers
        chosen = np.fromiter(fresh.values(), dtype=np.int64, count=len(fresh))
        ends = np.cumsum(sizes[chosen])
        places = np.repeat(starts[chosen] - ends + sizes[chosen], sizes[chosen]) + np.arange(ends[-1])
        first = self._count
        self._pool = _append(self._pool, self._filled, members[places])
        self._start = _append(self._start, self._count, self._filled + ends - sizes[chosen])
        self._size = _append(self._size, self._count, sizes[chosen])
        self._count, self._filled = self._count + len(fresh), self._filled + int(ends[-1])
        self._known.update(zip(fresh, range(first, self._count), strict=True))
        whole = np.flatnonzero(sizes[chosen] == self.n)
        if whole.size:
            self._full = first + int(whole[0])
        return np.array([self._known[name] for name in names])


def _distinct(keys: Numbers) -> Numbers:
    """In order; a third of the time of ``np.unique``, which hashes them first."""
    keys = np.sort(keys)
    return keys[np.diff(keys, prepend=keys[:1] - 1) != 0]


def _append(array: Numbers, filled: int, more: Numbers) -> Numbers:
    if filled + more.size > array.size:
        array = np.concatenate([array[:filled], np.zeros(max(filled, more.size), dtype=np.int64)])
    array[filled : filled + more.size] = more
    return array
