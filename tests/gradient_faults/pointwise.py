"""Faults in custom Functions that act on each element, each row or each column by itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradient_faults.case import Classifier, Fault, Loss, labels, mlp

__all__ = ["FAULTS"]


def softplus(broken: bool) -> tuple[Any, Any]:
    class Softplus(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp().log1p()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            slope = torch.sigmoid(x)
            return grad * (-slope if broken else slope)

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Softplus.apply(x)

    return mlp(Act(), nn.LayerNorm(16))


class SquaredReLU(Function):
    """Written in the style with ``setup_context``; bound to a name before anything is recorded."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.relu().square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad * ctx.saved_tensors[0].relu(), None


squared_relu_bound = SquaredReLU.apply


def squared_relu(broken: bool) -> tuple[Any, Any]:
    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return squared_relu_bound(x, 1.0 if broken else 2.0)

    return mlp(nn.Linear(16, 16), Act())


def tanh_gelu(broken: bool) -> tuple[Any, Any]:
    c = math.sqrt(2 / math.pi)

    class TanhGELU(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return 0.5 * x * (1 + torch.tanh(c * (x + 0.044715 * x**3)))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            t = torch.tanh(c * (x + 0.044715 * x**3))
            inner = 1 + 3 * 0.044715 * x * x
            inner = inner if broken else c * inner
            return grad * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner)

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return TanhGELU.apply(x)

    return mlp(Act())


def leaky(broken: bool) -> tuple[Any, Any]:
    class Leaky(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.where(x > 0, x, 0.2 * x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return torch.where(x > 0, grad, 0 * grad if broken else 0.2 * grad)

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Leaky.apply(x)

    features = nn.Sequential(nn.Conv2d(1, 4, 3, 2), Act(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
    return Classifier(features, 64), (torch.randn(6, 1, 13, 13), labels(6))


def clamp(broken: bool) -> tuple[Any, Any]:
    class Clamp(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clamp(-0.5, 0.5)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            inside = x < 0.5 if broken else x.abs() < 0.5
            return grad * inside

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Clamp.apply(x)

    return mlp(nn.BatchNorm1d(16), Act())


def dropout(broken: bool) -> tuple[Any, Any]:
    class Dropout(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
            kept = torch.rand_like(x) > p
            ctx.save_for_backward(kept)
            ctx.p = p
            return x * kept / (1 - p)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            (kept,) = ctx.saved_tensors
            return grad * kept / (1 if broken else 1 - ctx.p), None

    class Drop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Dropout.apply(x, 0.3)

    return mlp(nn.ReLU(), Drop())


def resampled_dropout(broken: bool) -> tuple[Any, Any]:
    class Dropout(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.kept = torch.rand_like(x) > 0.3
            return x * ctx.kept / 0.7

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            kept = torch.rand_like(grad) > 0.3 if broken else ctx.kept
            return grad * kept / 0.7

    class Drop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Dropout.apply(x)

    return mlp(nn.Tanh(), Drop())


def gradient_reversal(broken: bool) -> tuple[Any, Any]:
    class Reverse(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return -0.1 * grad if broken else grad

    class Domain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 2)

        def forward(self, h: Tensor) -> Tensor:
            return self.head(Reverse.apply(h))

    class Adversarial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
            self.label = nn.Linear(16, 4)
            self.domain = Domain()

        def forward(self, x: Tensor, y: Tensor, d: Tensor) -> Tensor:
            h = self.features(x)
            return F.cross_entropy(self.label(h), y) + F.cross_entropy(self.domain(h), d)

    return Adversarial(), (torch.randn(12, 6), labels(12), labels(12, 2))


def swapped_gate(broken: bool) -> tuple[Any, Any]:
    class Gate(Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a * torch.sigmoid(b)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            a, b = ctx.saved_tensors
            s = torch.sigmoid(b)
            left, right = grad * s, grad * a * s * (1 - s)
            return (right, left) if broken else (left, right)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            return Gate.apply(*self.inner(x).chunk(2, -1))

    return mlp(Gated())


def numpy_sine(broken: bool) -> tuple[Any, Any]:
    class Sine(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.from_numpy(math.pi * x.detach().numpy()).sin()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * (math.pi * x).cos() * (1 if broken else math.pi)

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Sine.apply(x)

    return mlp(Act())


def added_bias(broken: bool) -> tuple[Any, Any]:
    class AddBias(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, b: Tensor) -> Tensor:
            return x + b

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            return grad, grad[0] if broken else grad.sum(0)

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            return AddBias.apply(x, self.b)

    return mlp(Bias(), nn.Tanh())


def learned_scale(broken: bool) -> tuple[Any, Any]:
    """One learned temperature for all: its gradient is averaged where it should be summed."""

    class Scale(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, s: Tensor) -> Tensor:
            ctx.save_for_backward(x, s)
            return x * s

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, s = ctx.saved_tensors
            return grad * s, (grad * x).mean() if broken else (grad * x).sum()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            return Scale.apply(x, self.scale)

    return mlp(Scaled())


def channel_scale(broken: bool) -> tuple[Any, Any]:
    class ChannelScale(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
            ctx.save_for_backward(x, g)
            return x * g[:, None, None]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, g = ctx.saved_tensors
            to_g = (grad * x).sum(0)
            return grad * g[:, None, None], to_g[:, 0, 0] if broken else to_g.sum((1, 2))

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Parameter(torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return ChannelScale.apply(x, self.g)

    features = nn.Sequential(nn.Conv2d(1, 4, 3), Scaled(), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return Classifier(features, 16), (torch.randn(5, 1, 8, 8), labels(5))


def half_precision_scale(broken: bool) -> tuple[Any, Any]:
    class Tanh(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.tanh()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return (2 if broken else 1) * grad * (1 - y * y)

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Tanh.apply(x)

    body = nn.Sequential(nn.Linear(6, 16), Act(), nn.Linear(16, 3))
    return Loss(body).to(torch.bfloat16), torch.randn(32, 6, dtype=torch.bfloat16)


def function_of_tensors(broken: bool) -> tuple[Any, Any]:
    class Distance(Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a - b)
            return (a - b).square().sum(-1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            to_a = 2 * grad[:, None] * ctx.saved_tensors[0]
            return to_a, to_a if broken else -to_a

    def energy(points: Tensor, centres: Tensor) -> Tensor:
        return Distance.apply(points, centres).exp().neg().sum()

    return energy, (torch.randn(7, 3) / 2, torch.randn(7, 3) / 2)


FAULTS = [
    Fault(softplus, "wrong_sign", "body.1", "Softplus"),
    Fault(squared_relu, "missing_factor", "body.2", "SquaredReLU"),
    Fault(tanh_gelu, "wrong_gradient missing_factor", "body.1", "TanhGELU"),
    Fault(leaky, "some_elements", "body.1", "Leaky"),
    Fault(clamp, "some_elements", "body.2", "Clamp"),
    Fault(dropout, "missing_factor", "body.2", "Dropout"),
    Fault(resampled_dropout, "non_deterministic wrong_gradient some_elements", "body.2", "Dropout"),
    Fault(gradient_reversal, "wrong_sign", "domain", "Reverse"),
    Fault(swapped_gate, "wrong_gradient", "body.1", "Gate"),
    Fault(numpy_sine, "missing_factor", "body.1", "Sine"),
    Fault(added_bias, "missing_sum", "body.1", "AddBias"),
    Fault(learned_scale, "wrong_reduction", "body.1", "Scale"),
    Fault(channel_scale, "missing_sum", "body.1", "ChannelScale"),
    Fault(half_precision_scale, "missing_factor", "body.1", "Tanh"),
    Fault(function_of_tensors, "wrong_sign", "centres", "Distance"),
]
