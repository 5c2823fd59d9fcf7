"""Few groups of columns from which a sparse symmetric matrix can be read off: colours of the vertices of its graph.

The product of H with the sum of the unit vectors of one colour holds, in each row, the sum of the elements in the
columns of this colour. Neighbours must differ, so that the diagonal stands alone. If no path of four vertices has two
colours only (a star colouring), each element stands alone in its row or, by symmetry, in its column. If no cycle has
(an acyclic colouring), two colours make trees, and elements follow one another from the leaves inward: fewer colours,
but rounding errors add up along the way.

References:
    Coleman and More, Estimation of sparse Hessian matrices and graph coloring problems, Math. Programming 1984.
    Gebremedhin, Tarafdar, Manne and Pothen, New acyclic and star coloring algorithms with application to computing
    Hessians, SIAM J. Sci. Comput. 2007.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hesse.linalg.banded import Pattern

__all__ = ["acyclic_colours", "star_colours"]

Numbers = NDArray[np.int64]


def star_colours(pattern: Pattern) -> Numbers:
    """Colours [n], 0 and up, of which every path on four vertices has three.

    Greedy, vertices in their own order: two-coloured stars are held with their hubs, so that only colours are
    forbidden that would make a path of four. Time grows with ``sum_v sum_{w ~ v} degree(w)``.

    Example:
        An arrowhead, whose first row and column are full, needs two products, whatever its size:

        >>> rows = np.array([0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
        >>> columns = np.array([0, 1, 2, 3, 0, 1, 0, 2, 0, 3])
        >>> star_colours(Pattern.of(rows, columns, 4))
        array([0, 1, 1, 1])
    """
    around = _neighbours(pattern)
    n = pattern.n
    colour = [-1] * n
    forbidden: list[int] = []  # by colour: the vertex that may not take it
    first: list[tuple[int, int]] = []  # by colour: a vertex, and its first neighbour of this colour
    treated = [-1] * n
    hub: list[int] = []  # by star: its middle, -1 while it is one edge
    # By vertex and colour: the star of the edges to neighbours of this colour, and one of them.
    stars: list[dict[int, tuple[int, int]]] = [{} for _ in range(n)]
    for v in range(n):
        coloured = [w for w in around[v] if colour[w] >= 0]
        for w in coloured:
            c = colour[w]
            forbidden[c] = v
            vertex, other = first[c]
            if vertex == v:
                # Two neighbours of one colour: v is the hub between them, nothing next to them may look like v.
                for u in (other, w):
                    if treated[u] != v:
                        treated[u] = v
                        for taken in stars[u]:
                            forbidden[taken] = v
            else:
                first[c] = (v, w)
                for taken, (s, x) in stars[w].items():
                    if hub[s] == x:  # a star with its middle at x reaches v through w
                        forbidden[taken] = v
        mark = _least(forbidden, v)
        if mark == len(forbidden):
            forbidden.append(-1)
            first.append((-1, -1))
        colour[v] = mark
        mine = stars[v]
        for w in coloured:
            c = colour[w]
            if mark in stars[w]:
                s = stars[w][mark][0]
                hub[s] = w
            elif c in mine:
                s = mine[c][0]
                hub[s] = v
            else:
                s = len(hub)
                hub.append(-1)
            mine[c] = (s, w)
            stars[w][mark] = (s, v)
    return np.array(colour, dtype=np.int64)


def acyclic_colours(pattern: Pattern) -> Numbers:
    """Colours [n], 0 and up, of which every cycle has three.

    Greedy, vertices in their own order; the trees that two colours make are held as sets that grow together.

    Example:
        A tridiagonal matrix, whose graph is a chain, needs two products, where a star colouring needs three:

        >>> rows = np.array([0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
        >>> columns = np.array([0, 1, 0, 1, 2, 1, 2, 3, 2, 3])
        >>> acyclic_colours(Pattern.of(rows, columns, 4))
        array([0, 1, 0, 1])
    """
    around = _neighbours(pattern)
    n = pattern.n
    colour = [-1] * n
    forbidden: list[int] = []
    parent: list[int] = []  # of trees that have grown together
    tree: list[dict[int, int]] = [{} for _ in range(n)]  # by vertex and neighbour's colour: the tree of the edges

    def root(t: int) -> int:
        while parent[t] != t:
            parent[t] = parent[parent[t]]
            t = parent[t]
        return t

    for v in range(n):
        coloured = [w for w in around[v] if colour[w] >= 0]
        reached: dict[int, tuple[int, int]] = {}  # tree: the colour that v would need to close a cycle in it
        for w in coloured:
            forbidden[colour[w]] = v
        for w in coloured:
            for c, t in tree[w].items():
                if forbidden[c] == v:
                    continue
                t = root(t)
                # Two neighbours of one colour in one tree, which v of the tree's other colour would close.
                if reached.setdefault(t, (c, w)) != (c, w):
                    forbidden[c] = v
        mark = _least(forbidden, v)
        if mark == len(forbidden):
            forbidden.append(-1)
        colour[v] = mark
        for w in coloured:
            mine, theirs = tree[v].get(colour[w]), tree[w].get(mark)
            if mine is None and theirs is None:
                mine = theirs = len(parent)
                parent.append(mine)
            elif mine is None:
                mine = theirs
            elif theirs is not None:
                parent[root(theirs)] = root(mine)
            assert mine is not None
            tree[v][colour[w]] = mine
            tree[w][mark] = mine
    return np.array(colour, dtype=np.int64)


def _neighbours(pattern: Pattern) -> list[list[int]]:
    indptr, indices = pattern.indptr.tolist(), pattern.indices.tolist()
    return [[w for w in indices[indptr[v] : indptr[v + 1]] if w != v] for v in range(pattern.n)]


def _least(forbidden: list[int], v: int) -> int:
    for c, by in enumerate(forbidden):
        if by != v:
            return c
    return len(forbidden)
