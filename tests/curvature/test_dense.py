"""Dense Hessians and products from one kept graph, against torch's own Hessian, a row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus
from torch.nn.utils.parametrizations import weight_norm

from flat_functions import FLAT, Flat, chained_rosenbrock, network
from hesse.curvature import DerivativeError, dense
from hesse.curvature.dense import dense_hessian, product, products
from tolerances import ALGEBRA, ROUNDING


@pytest.mark.parametrize("name", FLAT)
def test_the_hessian_is_torchs_own(name: str) -> None:
    case = FLAT[name]
    x = case.start()
    expected = case.hessian(x)
    atol = 1e-14 * float(expected.abs().max())
    gradient, point = case.gradient(x)
    torch.testing.assert_close(dense_hessian(gradient, point), expected, rtol=ALGEBRA["rtol"], atol=atol)
    V = torch.randn(case.n, 3, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(products(gradient, point, V), expected @ V, rtol=ALGEBRA["rtol"], atol=30 * atol)
    torch.testing.assert_close(product(gradient, point, V[:, 0]), expected @ V[:, 0], rtol=1e-10, atol=30 * atol)


A = torch.randn(70, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ENTERED = {  # functions of A x, and whether they take its elements one by one
    "logistic": (lambda x: softplus(A @ x).mean(), True),
    "logistic, from a row": (lambda x: softplus((A @ x.view(1, -1).view(-1)).view(7, 10)).sum(), True),
    "least squares": (lambda x: (A @ x - 1).square().sum(), True),
    "chained": (lambda x: (lambda z: softplus(z).mean() + (z[1:] * z[:-1]).sum())(A @ x), False),
    "one pair": (lambda x: (lambda z: softplus(z).sum() + 1e-6 * z[3] * z[40])(A @ x), False),
    "log of a sum": (lambda x: (A @ x).logsumexp(0), False),
    "x twice": (lambda x: softplus(A @ x).mean() + x @ x, False),
    "two matrices": (lambda x: softplus(A @ x).mean() + (A[:20] @ x).sin().sum(), False),
    "squares of x": (lambda x: softplus(A @ x**2).mean(), False),
}


@pytest.mark.parametrize("name", ENTERED)
def test_a_constant_matrix_that_x_enters_by_is_taken_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fun, alone = ENTERED[name]
    blocks: list[int] = []
    rows = dense._rows
    monkeypatch.setattr(dense, "_rows", lambda g, x, seeds: blocks.append(len(seeds)) or rows(g, x, seeds))
    monkeypatch.setattr(dense, "CACHE", 9 * 8 * 16)  # 16 rows of A at once
    gradient, point = Flat(fun, 9).gradient(torch.linspace(-1, 1, 9, dtype=torch.float64))
    expected = torch.func.hessian(fun)(point.detach())
    torch.testing.assert_close(dense_hessian(gradient, point), expected, rtol=1e-12, atol=1e-13 * float(expected.max()))
    assert bool(blocks) is not alone


@pytest.mark.parametrize("chunk", [1, 5, 24, 100])
def test_blocks_of_rows_make_the_same_matrix(chunk: int) -> None:
    case = Flat(network)
    gradient, point = case.gradient(case.start())
    hessian = dense_hessian(gradient, point, chunk=chunk)
    torch.testing.assert_close(hessian, case.hessian(case.start()), **ROUNDING[torch.float64])


def test_float32_stays_float32() -> None:
    case = Flat(chained_rosenbrock, 12)
    gradient, point = case.gradient(case.start().float())
    hessian = dense_hessian(gradient, point)
    assert hessian.dtype == torch.float32
    expected = case.hessian(case.start())
    torch.testing.assert_close(hessian.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_rows_at_once_are_bounded_by_the_widest_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(x: Tensor) -> Tensor:
        return (x[:, None] * torch.linspace(0, 1, 50_000, dtype=x.dtype)).sin().sum()

    sizes: list[int] = []
    rows = dense._rows
    monkeypatch.setattr(dense, "_rows", lambda g, x, seeds: sizes.append(len(seeds)) or rows(g, x, seeds))
    dense_hessian(*Flat(wide, 12).gradient(torch.ones(12, dtype=torch.float64)))
    assert max(sizes) == dense.FEWEST  # 4.8 MB a row: more rows than the cache has room for, but no more than pay
    monkeypatch.setattr(dense, "MEMORY", 10_000_000)
    sizes.clear()
    dense_hessian(*Flat(wide, 12).gradient(torch.ones(12, dtype=torch.float64)))
    assert sizes == [2] * 6


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_and_one_element(n: int) -> None:
    gradient, point = Flat(lambda x: x.pow(3).sum(), n).gradient(torch.ones(n, dtype=torch.float64))
    assert dense_hessian(gradient, point).tolist() == [[6.0]] * n
    assert products(gradient, point, torch.ones(n, 2, dtype=torch.float64)).tolist() == [[6.0, 6.0]] * n


class Cube(torch.autograd.Function):
    """x^3 with a backward that goes through another Function, which vmap does not know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * Square.apply(x)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # The loop over numbers is what vmap cannot follow.
        return torch.stack([2 * gi * float(xi) if float(gi) else 0 * gi for gi, xi in zip(g, x, strict=True)])


def test_what_vmap_cannot_follow_goes_row_by_row() -> None:
    gradient, point = Flat(lambda x: Cube.apply(x).sum(), 4).gradient(torch.arange(4.0, dtype=torch.float64))
    torch.testing.assert_close(dense_hessian(gradient, point), torch.diag(6 * point.detach()))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x.square()


def test_a_function_that_is_once_differentiable_is_refused() -> None:
    gradient, point = Flat(lambda x: Once.apply(x).square().sum(), 4).gradient(torch.ones(4, dtype=torch.float64))
    with pytest.raises(DerivativeError, match=r"once_differentiable.*bfgs"):
        dense_hessian(gradient, point)


def test_it_is_refused_too_behind_a_matrix_beside_what_is_differentiable() -> None:
    def fun(x: Tensor) -> Tensor:
        z = A @ x
        return softplus(z).sum() + Once.apply(z).square().sum()

    with pytest.raises(DerivativeError, match="once_differentiable"):
        dense_hessian(*Flat(fun, 9).gradient(torch.ones(9, dtype=torch.float64)))


def test_a_missing_second_derivative_says_what_to_use() -> None:
    def attention(x: Tensor) -> Tensor:
        q, k, v = x.view(3, 1, 1, 4, 2).unbind(0)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).square().sum()

    gradient, point = Flat(attention).gradient(Flat(attention).start())
    with pytest.raises(DerivativeError, match=r"no second derivative of \S*attention.*bfgs"):
        dense_hessian(gradient, point)


def test_other_errors_of_a_backward_pass_come_through() -> None:
    gradient, point = Flat(chained_rosenbrock, 6).gradient(torch.ones(6))
    torch.autograd.grad(gradient.sum(), point)  # frees the graph
    with pytest.raises(RuntimeError, match="second time"):
        dense_hessian(gradient, point)


class Skew(torch.autograd.Function):
    """``x_i x_{i+1}``, whose backward takes a saved number for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.stale = x.detach().roll(-1)
        return x * x.roll(-1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * ctx.stale + (g * x).roll(1)


def test_a_hessian_that_is_not_symmetric_is_refused() -> None:
    gradient, point = Flat(lambda x: Skew.apply(x).pow(2).sum(), 6).gradient(torch.linspace(1, 2, 6))
    with pytest.raises(DerivativeError, match="not symmetric"):
        dense_hessian(gradient, point)


def test_torchs_wrong_second_derivative_of_weight_norm_is_refused() -> None:
    torch.manual_seed(0)
    layer = weight_norm(torch.nn.Linear(3, 4).double())
    names = [name for name, _ in layer.named_parameters()]
    shapes = [p.shape for p in layer.parameters()]
    inputs = torch.randn(5, 3, dtype=torch.float64)

    def fun(x: Tensor) -> Tensor:
        parts = x.split([shape.numel() for shape in shapes])
        params = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(layer, params, (inputs,)).tanh().square().sum()

    x = torch.cat([p.detach().reshape(-1) for p in layer.parameters()])
    with pytest.raises(DerivativeError, match="not symmetric"):
        dense_hessian(*Flat(fun, len(x)).gradient(x))


def test_infinite_curvature_is_the_callers_to_judge() -> None:
    gradient, point = Flat(lambda x: x.sqrt().sum(), 3).gradient(torch.zeros(3))
    assert not dense_hessian(gradient, point).isfinite().all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    gradient, point = Flat(chained_rosenbrock, 6).gradient(torch.ones(6))
    with pytest.raises(ValueError, match="Flatten"):
        dense_hessian(gradient.view(2, 3), point)
    with pytest.raises(ValueError, match=r"\[n, k\] with n = 6"):
        products(gradient, point, torch.ones(2, 6))
    with pytest.raises(ValueError, match="shape of x"):
        product(gradient, point, torch.ones(5))
