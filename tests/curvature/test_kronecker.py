"""Kronecker blocks against dense inverses, one and many at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hesse.curvature.kronecker import apply_inverse, invert
from tolerances import ALGEBRA


def moments(*shape: int, rank: int | None = None) -> Tensor:
    """Semidefinite matrices [.., n, n], of that rank."""
    x = torch.randn(*shape[:-1], shape[-1], rank or 2 * shape[-1], dtype=torch.float64)
    return x @ x.mT


def damped(a: Tensor, g: Tensor, damping: float) -> Tensor:
    """(G + sqrt(d) / pi I) (x) (A + pi sqrt(d) I), acting on the matrix written row by row."""
    a = a.diag() if a.ndim == 1 else a
    trace_a, trace_g = float(a.trace()) / len(a), float(g.trace()) / len(g)
    pi = math.sqrt(trace_a / trace_g)
    eye_a, eye_g = (torch.eye(len(t), dtype=t.dtype) for t in (a, g))
    return torch.kron(g + math.sqrt(damping) / pi * eye_g, a + pi * math.sqrt(damping) * eye_a)


@pytest.mark.parametrize("damping", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_inverse_is_that_of_the_damped_product(damping: float, diagonal: bool) -> None:
    torch.manual_seed(0)
    a, g, w = moments(4), moments(3), torch.randn(3, 4, dtype=torch.float64)
    a = a.diagonal() if diagonal else a
    inverse = invert(a, g, damping)
    assert inverse is not None
    exact = torch.linalg.solve(damped(a, g, damping), w.flatten()).view(3, 4)
    torch.testing.assert_close(apply_inverse(inverse.a, inverse.g, w), exact, **ALGEBRA)


def test_the_effective_dimension_is_the_trace_it_stands_for() -> None:
    torch.manual_seed(0)
    a, g = moments(4, rank=2), moments(3)
    inverse = invert(a, g, 0.1)
    assert inverse is not None
    exact = torch.linalg.solve(damped(a, g, 0.1), torch.kron(g, a)).trace()
    assert inverse.rank.item() == pytest.approx(float(exact), rel=1e-10)


def test_many_blocks_are_inverted_as_one_by_one() -> None:
    torch.manual_seed(0)
    a, g, w = moments(5, 4), moments(5, 3), torch.randn(5, 3, 4, dtype=torch.float64)
    a[1] *= 1e6  # each block splits the damping by its own pi
    inverse = invert(a, g, 0.1)
    singles = [invert(one, other, 0.1) for one, other in zip(a, g, strict=True)]
    assert inverse is not None
    found = apply_inverse(inverse.a, inverse.g, w)
    for i, single in enumerate(singles):
        assert single is not None
        torch.testing.assert_close(found[i], apply_inverse(single.a, single.g, w[i]), **ALGEBRA)
        torch.testing.assert_close(inverse.rank[i], single.rank, **ALGEBRA)


def test_a_block_that_saw_nothing_is_damping_alone() -> None:
    a, g = torch.zeros(2, 3, 3), torch.zeros(2, 2, 2)
    a[1], g[1] = torch.eye(3), torch.eye(2)
    inverse = invert(a, g, 4.0)
    assert inverse is not None
    found = apply_inverse(inverse.a, inverse.g, torch.ones(2, 2, 3))
    torch.testing.assert_close(found[0], torch.full((2, 3), 1 / 4))
    torch.testing.assert_close(found[1], torch.full((2, 3), 1 / 9))
    assert inverse.rank.sum().item() == pytest.approx(6 / 9)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3)])
def test_what_has_no_inverse_is_none(shape: tuple[int, ...]) -> None:
    good = torch.eye(3).expand(shape)
    for bad in (math.nan, math.inf, -2.0):
        broken = good.clone()
        broken[..., 0, 0] = bad
        assert invert(broken, good, 1e-3) is None
        assert invert(good, broken, 1e-3) is None


def test_inverses_keep_the_dtype_of_their_factors() -> None:
    for shape in ((3, 3), (2, 3, 3)):
        inverse = invert(torch.eye(3).expand(shape), torch.eye(3).expand(shape), 1.0)
        assert inverse is not None
        assert inverse.a.dtype == inverse.g.dtype == torch.float32
        assert inverse.a.shape == shape
