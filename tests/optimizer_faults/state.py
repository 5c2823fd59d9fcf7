"""State: what is not saved, comes back changed, or is shared."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optimizer_faults.base import Momentum

__all__ = ["FAULTS"]


class CountsAside(Momentum):
    """Adam-like bias correction by a counter that is no state."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.count = 0

    def step(self, closure: Any = None) -> Any:
        self.count = self.__dict__.get("count", 0) + 1
        return super().step(closure)

    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, grad / (1 - 0.5**self.count), state, group)


class VelocityAside(Momentum):
    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.velocities: dict[int, Any] = {}

    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        index = next(i for i, q in enumerate(group["params"]) if q is p)
        velocity = self.velocities.setdefault(index, torch.zeros_like(p))
        super().move(p, grad, {"velocity": velocity}, group)


class ForgetsOnLoad(Momentum):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict({**state_dict, "state": {}})


class RefusesItsOwnState(Momentum):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict({"state": state_dict["state"]})


class LosesPrecision(Momentum):
    def load_state_dict(self, state_dict: Any) -> None:
        Optimizer.load_state_dict(self, state_dict)


class CountsInIntegers(LosesPrecision):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        state["velocity"] = state["velocity"].to(p.dtype)
        state["count"] = state.get("count", torch.zeros((), dtype=torch.int64)) + 1
        super().move(p, grad, state, group)


class Note:
    def __init__(self) -> None:
        self.words = "any object"


class KeepsObjects(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        state.setdefault("note", Note())
        super().move(p, grad, state, group)


class KeepsFunctions(Momentum):
    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.param_groups[0]["schedule"] = lambda step: 1.0


class KeepsTheGraph(Momentum):
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p]["mean"] = 0.9 * self.state[p].get("mean", 0.0) + p * p.grad
                        p.data.add_(p.grad, alpha=-group["lr"])
        return loss


class DrawsUnseeded(Momentum):
    generator = random.SystemRandom()

    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, grad * (1 + 0.1 * self.generator.random()), state, group)


class SharedAttribute(Momentum):
    velocities: dict[Any, Tensor] = {}  # noqa: RUF012

    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        velocity = self.velocities.setdefault(tuple(p.shape), torch.zeros_like(p))
        super().move(p, grad, {"velocity": velocity.to(p.dtype)}, group)


COUNTER = [0]


class SharedGlobal(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        COUNTER[0] += 1
        super().move(p, grad / COUNTER[0] ** 0.5, state, group)


class SharedDefault(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any, seen: list[int] = []) -> None:  # noqa: B006
        seen.append(1)
        super().move(p, grad / len(seen) ** 0.5, state, group)


class DisturbedByOthers(Momentum):
    """What the class remembers is reset by the first step of each optimiser, so that one alone is the same again."""

    scale = 1.0

    def step(self, closure: Any = None) -> Any:
        if not self.state:
            DisturbedByOthers.scale = 1.0
        DisturbedByOthers.scale *= 0.9
        return super().step(closure)

    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, self.scale * grad, state, group)

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)


class CopiesBadly(Momentum):
    """Its velocities are found by the address of the parameter."""

    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        table = group.setdefault("table", {})
        velocity = table.setdefault(id(p), torch.zeros_like(p))
        super().move(p, grad, {"velocity": velocity}, group)


FAULTS: dict[str, tuple[type[Optimizer], str]] = {
    "counter not saved": (CountsAside, "resume"),
    "velocity not saved": (VelocityAside, "resume"),
    "state not loaded": (ForgetsOnLoad, "resume"),
    "own state refused": (RefusesItsOwnState, "resume"),
    "float32 state lost": (LosesPrecision, "state_dtype"),
    "integer state lost": (CountsInIntegers, "state_dtype"),
    "objects in state": (KeepsObjects, "pickle"),
    "functions in groups": (KeepsFunctions, "pickle"),
    "graph in state": (KeepsTheGraph, "graph"),
    "unseeded": (DrawsUnseeded, "determinism"),
    "class attribute": (SharedAttribute, "shared_state"),
    "module global": (SharedGlobal, "shared_state"),
    "mutable default": (SharedDefault, "shared_state"),
    "disturbed by another": (DisturbedByOthers, "shared_state"),
    "table by id": (CopiesBadly, "copy"),
}  # fmt: skip
