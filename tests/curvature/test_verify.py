"""Second derivatives that are refused or wrong are caught, named, and have a way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hesse.curvature import DerivativeError, ggn, hessian, verify
from hesse.objective import Objective
from oracles import gradient_differences
from problems import vectors
from tolerances import ALGEBRA, DIFFERENCES


class StaleCube(torch.autograd.Function):
    """x^3 with a right gradient from a saved intermediate, through which no second derivative flows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * x.square()
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


class OnceCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x.square()


class GoodCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x.square()


class Cube(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def net(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(3, 4))
    model.add_module("middle", nn.Sequential(nn.Tanh(), middle))
    model.add_module("last", nn.Linear(4, 2))
    return model.double()


X = vectors(6, 3)
Y = torch.tensor([0, 1, 0, 1, 0, 1])


def test_a_right_function_is_used() -> None:
    model = net(Cube(GoodCube))
    operator = hessian(model, F.cross_entropy, (X, Y))
    v = vectors(operator.shape[0], 1)[:, 0]
    assert operator.mode == "double-backward"
    torch.testing.assert_close(
        operator @ v, gradient_differences(Objective(model, F.cross_entropy, X, Y), v), **DIFFERENCES
    )


def test_a_silently_wrong_function_is_caught_and_named() -> None:
    with pytest.raises(
        DerivativeError,
        match=r"double-backward is wrong for .*first to fail: module 'middle.1' \(Cube\), through autograd.Function "
        r"StaleCube: the second derivative is wrong by \d+%. Use mode='differences'",
    ):
        hessian(net(Cube(StaleCube)), F.cross_entropy, (X, Y))


def test_a_function_without_a_second_derivative_is_named() -> None:
    with pytest.raises(DerivativeError, match=r"'middle.1' \(Cube\), through autograd.Function OnceCube"):
        hessian(net(Cube(OnceCube)), F.cross_entropy, (X, Y))


@pytest.mark.parametrize("function", [StaleCube, OnceCube])
def test_differences_are_the_way_out(function: Any) -> None:
    model = net(Cube(function))
    operator = hessian(model, F.cross_entropy, (X, Y), mode="differences")
    v = vectors(operator.shape[0], 1)[:, 0]
    expected = hessian(net(Cube(GoodCube)), F.cross_entropy, (X, Y)) @ v
    torch.testing.assert_close(operator @ v, expected, rtol=1e-6, atol=1e-8)
    assert operator.error is not None
    assert 0 < operator.error < 1e-3


def test_the_gauss_newton_matrix_needs_first_derivatives_only() -> None:
    """J' u is linear in u: a stale slope is no fault there."""
    for function in (StaleCube, GoodCube):
        operator = ggn(net(Cube(function)), F.cross_entropy, (X, Y))
        v = vectors(operator.shape[0], 1)[:, 0]
        expected = ggn(net(Cube(GoodCube)), F.cross_entropy, (X, Y)) @ v
        torch.testing.assert_close(operator @ v, expected)


def test_float32_and_unverified_use() -> None:
    low = net(Cube(StaleCube)).float()
    with pytest.raises(DerivativeError, match="StaleCube"):
        hessian(low, F.cross_entropy, (X.float(), Y))
    assert hessian(low, F.cross_entropy, (X.float(), Y), verify=False).mode == "double-backward"


def test_a_refused_double_backward_gives_way_to_forward_over_reverse() -> None:
    class Refused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[0, 0]

    with pytest.raises(DerivativeError, match=r"module 'middle.1' \(Refused\).*refused by aten::_scaled_dot_product"):
        hessian(net(Refused()), F.cross_entropy, (X, Y))


def test_a_hook_on_a_gradient_changes_updates_not_the_loss() -> None:
    model = net(nn.Identity())
    expected = hessian(model, F.cross_entropy, (X, Y)).dense()
    model.first.weight.register_hook(lambda g: 2 * g)
    torch.testing.assert_close(hessian(model, F.cross_entropy, (X, Y)).dense(), expected, **ALGEBRA)


def test_a_wrong_loss_is_the_culprit() -> None:
    with pytest.raises(DerivativeError, match=r"the loss function, through autograd.Function StaleCube"):
        hessian(net(nn.Identity()), lambda o, t: StaleCube.apply(o).square().mean(), (X, Y))


def test_the_verdict_is_remembered_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    before = verify._wrong
    monkeypatch.setattr(verify, "_wrong", lambda *a: asked.append(1) or before(*a))
    model = net(nn.Identity())
    for _ in range(3):
        hessian(model, F.cross_entropy, (X, Y))
    assert len(asked) == 1
    hessian(model.eval(), F.cross_entropy, (X, Y))
    assert len(asked) == 2
    hessian(model, lambda o, t: F.cross_entropy(o, t), (X, Y))
    assert len(asked) == 3
    model.middle.append(nn.ReLU())
    hessian(model, F.cross_entropy, (X, Y))
    assert len(asked) == 4


@pytest.mark.parametrize("seed", range(20))
def test_kinks_and_scales_raise_no_false_alarm(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.LeakyReLU(), nn.MaxPool1d(2), nn.Linear(32, 3)
    )
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[2].weight.mul_(1e2)
    x = 10 * torch.randn(64, 10)
    assert hessian(model, F.cross_entropy, (x, x.argmax(1) % 3)).mode == "double-backward"


def test_units_that_stand_on_a_kink_raise_no_false_alarm() -> None:
    """A silent input and no bias: every hidden unit is exactly at zero, and any step takes all of them off it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    for module in model:
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)
    x = torch.randn(16, 1, 10, 10)
    x[:8] = 0
    assert hessian(model, F.cross_entropy, (x, torch.arange(16) % 3)).mode == "double-backward"
    assert ggn(model, F.cross_entropy, (x, torch.arange(16) % 3)).mode == "double-backward"
