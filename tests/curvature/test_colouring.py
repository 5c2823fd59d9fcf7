"""Colourings satisfy their definitions on any graph, and are as small as is known on graphs with a structure."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hesse.curvature.colouring import acyclic_colours, star_colours
from hesse.linalg.banded import Pattern

Colours = NDArray[np.int64]


def graph(n: int, edges: set[tuple[int, int]]) -> Pattern:
    places = sorted({(i, i) for i in range(n)} | edges | {(j, i) for i, j in edges})
    rows, columns = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return Pattern.of(rows, columns, n)


def band(n: int, width: int) -> Pattern:
    return graph(n, {(i, j) for i in range(n) for j in range(i + 1, min(n, i + width + 1))})


def grid(m: int, diagonals: bool = False) -> Pattern:
    steps = [(0, 1), (1, 0), *([(1, 1), (1, -1)] if diagonals else [])]
    places = [(i, j, i + a, j + b) for i in range(m) for j in range(m) for a, b in steps]
    return graph(m * m, {(i * m + j, k * m + l) for i, j, k, l in places if k < m and 0 <= l < m})


def neighbours(pattern: Pattern) -> list[set[int]]:
    return [set(pattern.indices[pattern.rows == v].tolist()) - {v} for v in range(pattern.n)]


def proper(pattern: Pattern, colours: Colours) -> bool:
    return all(colours[v] != colours[w] for v, around in enumerate(neighbours(pattern)) for w in around)


def has_two_coloured_path(pattern: Pattern, colours: Colours) -> bool:
    """Whether some path a-b-c-d has two colours."""
    near = neighbours(pattern)
    return any(
        colours[a] == colours[c] and colours[b] == colours[d]
        for b in range(pattern.n)
        for c in near[b]
        for a in near[b] - {c}
        for d in near[c] - {b, a}
    )


def has_two_coloured_cycle(pattern: Pattern, colours: Colours) -> bool:
    """Whether the vertices of some two colours have as many edges between them as a forest cannot have."""
    near = neighbours(pattern)
    for one, other in combinations(np.unique(colours).tolist(), 2):
        left = {v for v in range(pattern.n) if colours[v] in (one, other)}
        while ends := {v for v in left if len(near[v] & left) <= 1}:
            left -= ends
        if left:
            return True
    return False


graphs = st.integers(1, 14).flatmap(
    lambda n: st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] != e[1])).map(
        lambda edges: graph(n, edges)
    )
)


@settings(deadline=None)
@given(graphs)
def test_star_colourings_leave_no_two_coloured_path_of_four(pattern: Pattern) -> None:
    colours = star_colours(pattern)
    assert proper(pattern, colours)
    assert not has_two_coloured_path(pattern, colours)


@settings(deadline=None)
@given(graphs)
def test_acyclic_colourings_leave_no_two_coloured_cycle(pattern: Pattern) -> None:
    colours = acyclic_colours(pattern)
    assert proper(pattern, colours)
    assert not has_two_coloured_cycle(pattern, colours)


def test_the_definitions_tell_good_from_bad() -> None:
    chain, square = band(4, 1), graph(4, {(0, 1), (1, 2), (2, 3), (0, 3)})
    two = np.array([0, 1, 0, 1])
    assert has_two_coloured_path(chain, two)
    assert not has_two_coloured_cycle(chain, two)
    assert has_two_coloured_cycle(square, two)
    assert not proper(chain, np.array([0, 0, 1, 2]))


@pytest.mark.parametrize(
    ("pattern", "star", "acyclic"),
    [
        (graph(5, set()), 1, 1),
        (band(60, 1), 3, 2),
        (band(60, 2), 5, 3),
        (band(60, 4), 9, 5),  # Coleman and More: 2 b + 1 directly, b + 1 by substitution
        (graph(60, {(0, j) for j in range(1, 60)}), 2, 2),
        (graph(60, {(j, 59) for j in range(59)}), 2, 2),
        (graph(60, {(2 * j, 2 * j + 1) for j in range(30)}), 2, 2),
        (graph(12, set(combinations(range(12), 2))), 12, 12),
        (grid(10), 5, 4),  # 5 and 3 are the least (Fertin, Raspaud and Reed)
        (grid(9, diagonals=True), 11, 6),
    ],
    ids=["diagonal", "chain", "band 2", "band 4", "arrow", "arrow, last", "pairs", "complete", "grid", "stencil of 9"],
)
def test_few_colours_are_enough(pattern: Pattern, star: int, acyclic: int) -> None:
    stars, trees = star_colours(pattern), acyclic_colours(pattern)
    assert not has_two_coloured_path(pattern, stars)
    assert not has_two_coloured_cycle(pattern, trees)
    assert stars.max() + 1 <= star
    assert trees.max() + 1 <= acyclic
    assert set(stars.tolist()) == set(range(stars.max() + 1))


def test_nothing_has_no_colour() -> None:
    empty = Pattern(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    assert star_colours(empty).size == acyclic_colours(empty).size == 0
