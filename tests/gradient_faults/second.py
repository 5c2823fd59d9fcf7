"""Faults that a first gradient does not show: wrong second derivatives and wrong forward mode."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from gradient_faults.case import Fault, mlp

__all__ = ["FAULTS"]


def saved_intermediate(broken: bool) -> tuple[Any, Any]:
    """What the forward computed on the way has no graph: differentiated again, it is a constant."""

    class Sigmoid(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.slope = x.sigmoid() * (1 - x.sigmoid())
            ctx.save_for_backward(x)
            return x.sigmoid()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * (ctx.slope if broken else x.sigmoid() * (1 - x.sigmoid()))

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Sigmoid.apply(x)

    return mlp(Act())


def detached_in_backward(broken: bool) -> tuple[Any, Any]:
    class Swish(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x.sigmoid()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            x = x.detach() if broken else x
            s = x.sigmoid()
            return grad * (s + x * s * (1 - s))

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Swish.apply(x)

    return mlp(nn.LayerNorm(16), Act())


def wrong_double_backward(broken: bool) -> tuple[Any, Any]:
    """The backward is a Function of its own, and its backward forgets a sign."""

    class TanhGrad(Function):
        @staticmethod
        def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
            ctx.save_for_backward(grad, x)
            return grad * (1 - x.tanh() ** 2)

        @staticmethod
        def backward(ctx: Any, to: Tensor) -> tuple[Tensor, Tensor]:
            grad, x = ctx.saved_tensors
            y = x.tanh()
            bend = 2 * to * grad * y * (1 - y * y)
            return to * (1 - y * y), bend if broken else -bend

    class Tanh(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return TanhGrad.apply(grad, ctx.saved_tensors[0])

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Tanh.apply(x)

    return mlp(nn.Linear(16, 16), Act())


def tangent_factor(broken: bool) -> tuple[Any, Any]:
    class Square(Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * x

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad * ctx.saved_tensors[0]

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return (1 if broken else 2) * tangent * ctx.saved_tensors[0]

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Square.apply(x)

    return mlp(Act())


def tangent_of_one_argument(broken: bool) -> tuple[Any, Any]:
    class Product(Function):
        @staticmethod
        def forward(a: Tensor, b: Tensor) -> Tensor:
            return a * b

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            a, b = ctx.saved_tensors
            return grad * b, grad * a

        @staticmethod
        def jvp(ctx: Any, to_a: Tensor, to_b: Tensor) -> Tensor:
            a, b = ctx.saved_tensors
            return to_a * b if broken else to_a * b + a * to_b

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return Product.apply(x, self.gate(x).tanh())

    return mlp(Gated())


def tangent_sign(broken: bool) -> tuple[Any, Any]:
    class Cosine(Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.cos()

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return -grad * ctx.saved_tensors[0].sin()

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return (1 if broken else -1) * tangent * ctx.saved_tensors[0].sin()

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Cosine.apply(x)

    return mlp(nn.Linear(16, 16), Act())


FAULTS = [
    Fault(saved_intermediate, "second_derivative", "body.1", "Sigmoid", "hessian"),
    Fault(detached_in_backward, "second_derivative", "body.2", "Swish", "hessian"),
    Fault(wrong_double_backward, "second_derivative", "body.2", "TanhGrad Tanh", "hessian"),
    Fault(tangent_factor, "forward_mode", "body.1", "Square", "hessian"),
    Fault(tangent_of_one_argument, "forward_mode", "body.1", "Product", "hessian"),
    Fault(tangent_sign, "forward_mode", "body.2", "Cosine", "hessian"),
]
