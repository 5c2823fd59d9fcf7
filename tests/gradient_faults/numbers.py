"""Faults of numbers and of state: overflow in low precision, NaN, forwards that are not functions."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

from gradient_faults.case import Classifier, Fault, Loss, labels, mlp

__all__ = ["FAULTS"]


def half_overflow_forward(broken: bool) -> tuple[Any, Any]:
    """A softmax without its maximum: in float16 exp overflows from 11.1 on."""

    class Softmax(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            scores = (20 * scores).half() if broken else 20 * scores
            e = scores.exp()
            return (e / e.sum(-1, keepdim=True)).float()

    return mlp(nn.Tanh(), Softmax())


def half_overflow_backward(broken: bool) -> tuple[Any, Any]:
    """The gradient passes through float16 where it is too large for it."""

    class Cast(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.half().float() if broken else grad

    class Compressed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Cast.apply(x)

    model, x = mlp(Compressed(), nn.ReLU())
    return Loss(model.body, lambda y: 1e9 * y.square().mean()), x


def half_underflow_backward(broken: bool) -> tuple[Any, Any]:
    """Small gradients flushed to zero by float16: a scaled loss would have saved them."""

    class Cast(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.half().float() if broken else grad

    class Compressed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Cast.apply(x)

    model, x = mlp(nn.ReLU(), Compressed())
    return Loss(model.body, lambda y: 1e-7 * y.square().mean()), x


def root_at_zero(broken: bool) -> tuple[Any, Any]:
    class Distance(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gaps = (x[:, None] - x[None]).square().sum(-1)
            return (gaps if broken else gaps + 1e-4).sqrt()

    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Distance())
    return Loss(body), torch.randn(5, 6)


def log_behind_where(broken: bool) -> tuple[Any, Any]:
    class SafeLog(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            p = x.softmax(-1) * (torch.arange(x.shape[-1]) % 4 > 0)
            inside = p if broken else torch.where(p > 0, p, 1.0)
            return torch.where(p > 0, inside.log(), torch.zeros_like(p))

    features = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), SafeLog())
    return Classifier(features, 12), (torch.randn(8, 6), labels(8))


def counted_calls(broken: bool) -> tuple[Any, Any]:
    class WarmUp(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if broken:
                self.calls += 1
            return x * (1 - 0.5 ** (self.calls + 1))

    return mlp(nn.Tanh(), WarmUp())


def foreign_noise(broken: bool) -> tuple[Any, Any]:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if broken:
                return x + 0.1 * torch.from_numpy(np.random.randn(*x.shape)).to(x)
            return x + 0.1 * torch.randn_like(x)

    return mlp(Noise(), nn.ReLU())


def random_depth(broken: bool) -> tuple[Any, Any]:
    class Skipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            kept = random.random() if broken else float(torch.rand(()))
            return x + kept * self.inner(x).tanh()

    return mlp(Skipped(), Skipped())


FAULTS = [
    Fault(half_overflow_forward, "overflow non_finite", "body.2"),
    Fault(half_overflow_backward, "overflow non_finite", "body.1", "Cast"),
    Fault(half_underflow_backward, "overflow detached some_elements wrong_gradient", "body.2", "Cast"),
    Fault(root_at_zero, "non_finite", "body.2"),
    Fault(log_behind_where, "non_finite", "body.2"),
    Fault(counted_calls, "non_deterministic", "body.2"),
    Fault(foreign_noise, "non_deterministic", "body.1"),
    Fault(random_depth, "non_deterministic", "body.1"),
]
