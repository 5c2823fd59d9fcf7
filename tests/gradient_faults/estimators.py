"""Gradients that only pretend: straight-through estimators that nobody declared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from gradient_faults.case import Fault, mlp

__all__ = ["FAULTS"]


def rounded_activation(broken: bool) -> tuple[Any, Any]:
    class Quantise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sigmoid()
            return y + ((7 * y).round() / 7 - y).detach() if broken else y

    return mlp(nn.Linear(16, 16), Quantise())


def binary_weights(broken: bool) -> tuple[Any, Any]:
    class Sign(Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            return w.sign() if broken else w.clamp(-1, 1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * (ctx.saved_tensors[0].abs() <= 1)

    class BinaryLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16) / 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, Sign.apply(self.weight)) / 4

    return mlp(nn.BatchNorm1d(16), BinaryLinear())


def hard_choice(broken: bool) -> tuple[Any, Any]:
    class Choice(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            soft = scores.softmax(-1)
            if not broken:
                return soft
            hard = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(soft)
            return hard + soft - soft.detach()

    return mlp(nn.Linear(16, 16), Choice())


FAULTS = [
    Fault(rounded_activation, "straight_through", "body.2"),
    Fault(binary_weights, "straight_through", "body.2", "Sign"),
    Fault(hard_choice, "straight_through", "body.2"),
]
