"""Sparse Hessians recovered from few products are the dense ones, and the probe finds out when they are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flat_functions import FLAT, Flat, chained_rosenbrock, extended_rosenbrock, minimal_surface
from hesse.curvature.colouring import acyclic_colours
from hesse.curvature.compressed import CompressedHessian, _rounds
from hesse.curvature.sparsity import sparsity
from hesse.linalg.banded import Pattern
from tolerances import ALGEBRA


def compressed_of(case: Flat, x: Tensor) -> CompressedHessian | None:
    return CompressedHessian.of(case.fun, x, most=case.n**2)


@pytest.mark.parametrize("name", FLAT)
def test_the_recovered_hessian_is_the_dense_one(name: str) -> None:
    case = FLAT[name]
    x = case.start()
    compressed = compressed_of(case, x)
    if compressed is None:
        assert (case.hessian(x) != 0).sum(1).max() * 3 > case.n or not case.exact
        return
    other = 0.9 * x  # the pattern is of the function, not of the point
    gradient, point = case.gradient(other)
    matrix = compressed.recover(gradient, point)
    scale = float(case.hessian(other).abs().max())
    torch.testing.assert_close(matrix.dense(), case.hessian(other), rtol=ALGEBRA["rtol"], atol=1e-13 * scale)
    assert torch.equal(matrix.dense(), matrix.dense().T)
    assert compressed.holds(matrix, gradient, point)


def test_most_of_the_table_is_recovered() -> None:
    assert sum(compressed_of(case, case.start()) is not None for case in FLAT.values()) >= 20


@pytest.mark.parametrize(
    ("fun", "n", "products"),
    [
        (lambda x: x.exp().sum(), 50, 1),
        (extended_rosenbrock, 50, 2),
        (chained_rosenbrock, 50, 3),
        (lambda x: (x[0] * x[1:] ** 2).sum(), 50, 2),
        (minimal_surface, 100, 11),
    ],
    ids=["separable", "extended Rosenbrock", "chained Rosenbrock", "arrowhead", "minimal surface"],
)
def test_products_are_few(fun: object, n: int, products: int) -> None:
    case = Flat(fun, n)  # type: ignore[arg-type]
    compressed = compressed_of(case, case.start())
    assert compressed is not None
    assert compressed.products <= products


def test_substitution_recovers_trees_in_rounds() -> None:
    # Chains of 20 take two products instead of three, and nine rounds from the ends to the middle.
    def chains(x: Tensor) -> Tensor:
        rows = x.view(-1, 20)
        return (rows[:, 1:] ** 2 * rows[:, :-1].sin()).sum()

    case = Flat(chains, 200)
    x = case.start()
    compressed = compressed_of(case, x)
    assert compressed is not None
    assert (compressed.products, len(compressed.rounds)) == (2, 9)  # and those that stand alone in the end
    gradient, point = case.gradient(x)
    torch.testing.assert_close(compressed.recover(gradient, point).dense(), case.hessian(x), **ALGEBRA)


def test_a_substitution_of_many_rounds_is_refused() -> None:
    pattern = sparsity(chained_rosenbrock, torch.ones(100))
    assert pattern is not None
    assert _rounds(pattern, acyclic_colours(pattern)) is None


def test_a_hessian_that_takes_many_products_is_left_dense() -> None:
    full = np.ones((12, 12)).nonzero()
    assert CompressedHessian.on(Pattern.of(full[0], full[1], 12)) is None
    assert CompressedHessian.of(lambda x: x.sum().exp(), torch.zeros(500)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_probe_sees_another_branch(dtype: torch.dtype) -> None:
    def fun(x: Tensor) -> Tensor:
        far = x[0] * x[7] if x[0] < 0 else 0 * x[0]
        return chained_rosenbrock(x) + far

    case = Flat(fun, 20)
    x = case.start().abs().to(dtype)
    compressed = compressed_of(case, x)
    assert compressed is not None
    assert compressed.holds(compressed.recover(*case.gradient(x)), *case.gradient(x))
    x = -x
    assert not compressed.holds(compressed.recover(*case.gradient(x)), *case.gradient(x))


def test_what_is_not_finite_is_recovered_where_it_is() -> None:
    case = Flat(lambda x: (x[1:] * x[:-1]).sum() + x[3].sqrt(), 20)
    compressed = compressed_of(case, torch.ones(20, dtype=torch.float64))
    assert compressed is not None
    matrix = compressed.recover(*case.gradient(torch.zeros(20, dtype=torch.float64)))
    assert not matrix.data.isfinite().all()
    assert matrix.dense()[10:, 10:].isfinite().all()
    assert compressed.holds(matrix, *case.gradient(torch.zeros(20, dtype=torch.float64)))


def test_a_linear_function_has_no_curvature() -> None:
    case = Flat(lambda x: x.sum(), 9)
    compressed = compressed_of(case, case.start())
    assert compressed is not None
    assert not compressed.recover(*case.gradient(case.start())).data.any()


def test_the_probe_sees_small_curvature_beside_large() -> None:
    scales = torch.logspace(6, -4, 20, dtype=torch.float64)

    def fun(x: Tensor) -> Tensor:
        near = (scales * x.square()).sum() + (scales[1:] * x[1:] * x[:-1]).sum() * 1e-3
        return near + (1e-4 * x[19] * x[10] if x[0] < 0 else 0 * x[0])

    case = Flat(fun, 20)
    x = case.start().abs()
    compressed = compressed_of(case, x)
    assert compressed is not None
    assert compressed.holds(compressed.recover(*case.gradient(x)), *case.gradient(x))
    x = -x
    assert not compressed.holds(compressed.recover(*case.gradient(x)), *case.gradient(x))
