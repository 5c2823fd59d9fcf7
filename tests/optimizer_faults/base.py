"""An optimiser that is right, in parts, so that each fault is one part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Momentum"]


class Momentum(Optimizer):
    """Heavy ball in float32, whatever the dtype of the parameters; the step counter is an integer."""

    def __init__(
        self, params: Any, lr: float = 0.05, *, momentum: float = 0.9, weight_decay: float = 0.0, maximize: bool = False
    ) -> None:
        if not float(lr) >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise RuntimeError("Momentum does not support sparse gradients")
                    self.update(p, p.grad, group)
        return loss

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["velocity"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        grad = -grad if group["maximize"] else grad
        self.move(p, grad.add(p, alpha=group["weight_decay"]), state, group)

    def move(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["velocity"].mul_(group["momentum"]).add_(grad)
        p.add_((-group["lr"] * state["velocity"]).to(p.dtype))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, state in state_dict["state"].items():
            for name, value in state.items():
                self.state[params[i]][name] = value.clone() if isinstance(value, Tensor) else value
