"""Traced patterns hold every element of the Hessian, and on most functions no other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flat_functions import FLAT, Flat, chained_rosenbrock, minimal_surface
from hesse.curvature.index_sets import IndexSets, TooDense
from hesse.curvature.sparsity import sparsity


def traced(case: Flat, x: Tensor) -> Tensor:
    pattern = sparsity(case.fun, x, most=case.n**2)
    assert pattern is not None
    return pattern.dense()


@pytest.mark.parametrize("name", FLAT)
def test_the_pattern_holds_the_hessian(name: str) -> None:
    case = FLAT[name]
    x = case.start()
    pattern = traced(case, x)
    there = case.hessian(x) != 0
    assert not (there & ~pattern).any()
    assert torch.equal(pattern, pattern.T)
    assert pattern.diagonal().all()
    if case.exact:
        assert torch.equal(pattern, there | torch.eye(case.n, dtype=torch.bool))


def test_a_pattern_is_sorted_by_row_then_column() -> None:
    pattern = sparsity(chained_rosenbrock, torch.ones(4), most=16)
    assert pattern is not None
    assert pattern.indptr.tolist() == [0, 2, 5, 8, 10]
    assert pattern.indices.tolist() == [0, 1, 0, 1, 2, 1, 2, 3, 2, 3]


class Swap(torch.autograd.Function):
    """``x_i x_{n-1-i}``, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.flip(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (g + g.flip(0)) * x.flip(0)


def test_a_custom_function_is_traced_through() -> None:
    case = Flat(lambda x: Swap.apply(x).pow(2).sum(), 7)
    assert torch.equal(traced(case, case.start()), case.hessian(case.start()) != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_point_is_left_as_it_was(dtype: torch.dtype) -> None:
    x = torch.arange(6.0, dtype=dtype)[::2].requires_grad_()
    pattern = sparsity(lambda x: (x[1:] * x[:-1]).sum(), x, most=9)
    assert pattern is not None
    assert pattern.nnz == 7
    assert x.grad is None
    assert x.requires_grad


def test_a_dense_hessian_has_no_pattern() -> None:
    x = torch.linspace(0, 1, 200, dtype=torch.float64)
    assert sparsity(lambda x: torch.logsumexp(x, 0), x) is None
    assert sparsity(lambda x: (x.sum() ** 2 - x[0]) ** 2, x) is None
    assert sparsity(chained_rosenbrock, x) is not None
    assert sparsity(chained_rosenbrock, x, most=200) is None


def test_what_goes_through_a_sparse_tensor_counts_as_dense() -> None:
    index = torch.stack([torch.arange(50), torch.arange(50)])

    def fun(x: Tensor) -> Tensor:
        return torch.sparse.mm(torch.sparse_coo_tensor(index, x * 2, (50, 50), check_invariants=True), x[:, None]).sum()

    assert sparsity(fun, torch.ones(50, dtype=torch.float64)) is None


def test_other_branches_have_other_patterns() -> None:
    def fun(x: Tensor) -> Tensor:
        return (x[0] * x[1]) if x[0] > 0 else (x[0] * x[2])

    one, other = sparsity(fun, torch.ones(3), most=9), sparsity(fun, -torch.ones(3), most=9)
    assert one is not None
    assert other is not None
    assert one.dense().int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert other.dense().int().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_and_one_element(n: int) -> None:
    pattern = sparsity(lambda x: x.square().sum(), torch.ones(n), most=4)
    assert pattern is not None
    assert (pattern.n, pattern.nnz) == (n, n)


def test_a_large_grid_has_its_stencil() -> None:
    m = 60
    pattern = sparsity(minimal_surface, torch.linspace(-1, 1, m * m, dtype=torch.float64))
    assert pattern is not None
    i = np.arange(m * m)
    apart = np.maximum(abs(i[:, None] // m - i // m), abs(i[:, None] % m - i % m))
    assert np.array_equal(pattern.dense().numpy(), apart <= 1)


def test_index_sets_unite_as_python_sets_do() -> None:
    rng = np.random.default_rng(0)
    sets = IndexSets(12, most=10_000)
    known = {0: frozenset[int]()} | {j + 1: frozenset({j}) for j in range(12)}
    for _ in range(30):
        ids = np.array(list(known))
        a, b = rng.choice(ids, 40), rng.choice(ids, 40)
        groups = rng.integers(0, 9, 40)
        for i, j, united in zip(a.tolist(), b.tolist(), sets.union(a, b).tolist(), strict=True):
            assert known.setdefault(united, known[i] | known[j]) == known[i] | known[j]
        for g, united in enumerate(sets.group(groups, a, 9).tolist()):
            expected = frozenset().union(*(known[i] for i in a[groups == g].tolist()))
            assert known.setdefault(united, expected) == expected
    assert len(set(known.values())) == len(known)  # each set once
    for i, members in known.items():
        assert frozenset(sets.members(np.array([i]))[1].tolist()) == members


def test_index_sets_stop_at_their_limit() -> None:
    sets = IndexSets(100, most=50)
    with pytest.raises(TooDense):
        sets.group(np.zeros(100, dtype=np.int64), np.arange(1, 101), 1)
