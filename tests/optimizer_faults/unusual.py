"""Correct optimisers that do not look like Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optimizer_faults.base import Momentum

__all__ = ["UNUSUAL"]


class Noisy(Momentum):
    """Langevin noise, from torch's generator."""

    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, grad + 1e-3 * torch.randn_like(p), state, group)


class WarmsUp(Momentum):
    """The first step is of length zero."""

    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        count = state.setdefault("step", torch.zeros(()))
        super().move(p, grad * min(1.0, float(count) / 5), state, group)
        count += 1


class LeavesVectorsOut(Momentum):
    """Layer-wise rates, and no decay of biases (LARS)."""

    def update(self, p: Tensor, grad: Tensor, group: Any) -> None:
        if p.ndim <= 1:
            super().update(p, grad, {**group, "weight_decay": 0.0})
        else:
            super().update(p, grad * p.norm() / grad.norm().clamp_min(1e-12), group)


class TwoPoints(Optimizer):
    """Schedule-free: gradients at a mean of two points, which has to be asked for."""

    def __init__(self, params: Any, lr: float = 0.5, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "k": 0, "training": False})

    def train(self) -> None:
        for group in self.param_groups:
            group["training"] = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not all(group["training"] for group in self.param_groups):
            raise RuntimeError("call train() first")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["k"] += 1
            c, lr = 1 / group["k"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                z = self.state[p].setdefault("z", p.clone())
                grad = p.grad.to_dense()
                p.lerp_(z, c).add_(grad, alpha=lr * (group["momentum"] * (1 - c) - 1))
                z.sub_(grad, alpha=lr)
        return loss


class Sharp(Optimizer):
    """Sharpness-aware: the closure is called twice, and the gradient of the first call is needed by the second."""

    def __init__(self, params: Any, lr: float = 0.1, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "Sharp needs a closure"
        closure = torch.enable_grad()(closure)
        loss = closure()
        params = [(p, p.clone(), group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p, *_ in params]).norm()
        for p, _, group in params:
            p.add_(p.grad, alpha=float(group["rho"] / (norm + 1e-12)))
        closure()
        for p, old, group in params:
            p.copy_(old).add_(p.grad, alpha=-group["lr"])
        return loss


UNUSUAL: list[type[Optimizer]] = [Noisy, WarmsUp, LeavesVectorsOut, TwoPoints, Sharp]
