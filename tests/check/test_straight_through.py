"""hesse.check.straight_through: what is declared is accepted, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from hesse.check import gradients, straight_through
from hesse.check.straight_through import declared


class Sign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def rounded(x: Tensor) -> Tensor:
    return x + ((3 * x).round() / 3 - x).detach()


class Codes(nn.Module):
    """Vector quantisation: a codebook, its two losses with stopped gradients, and a straight-through output."""

    def __init__(self) -> None:
        super().__init__()
        self.book = nn.Parameter(torch.randn(12, 8))

    def forward(self, z: Tensor) -> Tensor:
        q = self.book[torch.cdist(z, self.book).argmin(-1)]
        gap = (q - z.detach()).square().mean() + (z - q.detach()).square().mean()
        return z + (q - z).detach() + gap


class Using(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) + x.sin()


class Wrong(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0].cos()


def of_function_class(declare: bool) -> nn.Module:
    cls = type("Sign", (Sign,), {})
    return Using((straight_through(cls) if declare else cls).apply)


def of_apply(declare: bool) -> nn.Module:
    apply = type("Sign", (Sign,), {}).apply
    return Using(straight_through(apply) if declare else apply)


def of_function(declare: bool) -> nn.Module:
    return Using(straight_through(rounded) if declare else rounded)


def of_module_class(declare: bool) -> nn.Module:
    cls = type("Codes", (Codes,), {})
    return (straight_through(cls) if declare else cls)()


def of_module(declare: bool) -> nn.Module:
    return straight_through(Codes()) if declare else Codes()


def reversal(declare: bool) -> nn.Module:
    class Reverse(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return -grad

    return Using((straight_through(Reverse) if declare else Reverse).apply)


MAKERS = [of_function_class, of_apply, of_function, of_module_class, of_module, reversal]


def model(middle: nn.Module, *more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), middle, nn.Linear(8, 8), *more, nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize("make", MAKERS)
def test_declared_is_accepted_and_said_and_undeclared_is_a_culprit(make: Callable[[bool], nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 6)
    report = gradients(model(make(True)), x)
    assert report.ok, str(report)
    assert any("declared" in note for note in report.notes)
    assert {c.where for c in gradients(model(make(False)), x).culprits} == {"1"}


@pytest.mark.parametrize("make", MAKERS)
def test_a_fault_elsewhere_is_still_found(make: Callable[[bool], nn.Module]) -> None:
    torch.manual_seed(0)
    report = gradients(model(make(True), Using(Wrong.apply)), torch.randn(9, 6))
    assert [(c.where, c.function) for c in report.culprits] == [("3", "Wrong")], str(report)


@pytest.mark.parametrize("make", [of_function_class, of_apply, of_function])
def test_the_remedy_says_how_to_declare(make: Callable[[bool], nn.Module]) -> None:
    torch.manual_seed(0)
    (culprit,) = gradients(model(make(False)), torch.randn(9, 6)).culprits
    assert culprit.kind in {"straight_through", "detached", "wrong_gradient"}
    if culprit.kind == "straight_through":
        assert "hesse.check.straight_through" in culprit.remedy


def test_a_declared_function_does_what_it_did() -> None:
    marked = straight_through(rounded)
    x = torch.randn(5, requires_grad=True)
    assert torch.equal(marked(x), rounded(x))
    assert marked.__name__ == "rounded" and declared(marked) and not declared(rounded)
    module = Codes()
    assert straight_through(module) is module and not declared(Codes())
    with pytest.raises(TypeError, match="takes a Function"):
        straight_through(3)
