"""Steps and settings: wrong directions, shapes, gradients, closures, groups, schedules."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optimizer_faults.base import Momentum

__all__ = ["FAULTS", "IMPOLITE"]


class Uphill(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        p.add_(group["lr"] * grad)


class UphillOnBiases(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, -grad if p.ndim == 1 else grad, state, group)


class Still(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        p = p - group["lr"] * grad


class NeedsTwoDimensions(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, grad / (1e-8 + grad.norm(dim=1, keepdim=True)), state, group)


class NoScalars(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, grad / len(grad), state, group)


class SinglePrecisionOnly(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, torch.eye(len(grad)) @ grad if grad.ndim == 2 else grad, state, group)


class AssumesLayout(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, torch.as_strided(grad, grad.shape, torch.empty(grad.shape).stride()), state, group)


class ViewsGradients(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, grad.view(-1).view(grad.shape), state, group)


class NeverMaximizes(Momentum):
    def update(self, p: Tensor, grad: Tensor, group: Any) -> None:
        super().update(p, grad, {**group, "maximize": False})


class DecaysWithoutGradients(Momentum):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.01 * group["lr"])
        return super().step(closure)


class AsksForEveryGradient(Momentum):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            torch.stack([p.grad.norm() for p in group["params"]])
        return super().step(closure)


class OnlyFirstComers(Momentum):
    """Parameters without a gradient at the first step never move."""

    def update(self, p: Tensor, grad: Tensor, group: Any) -> None:
        group.setdefault("known", [i for i, q in enumerate(group["params"]) if q.grad is not None])
        if any(group["params"][i] is p for i in group["known"]):
            super().update(p, grad, group)


class DividesByNorm(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, grad / grad.norm(), state, group)


class Factorises(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        if grad.ndim == 2:
            torch.linalg.cholesky(grad.double().T @ grad.double())
        super().move(p, grad, state, group)


class ForgetsTheLoss(Momentum):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)


class ClosureWithoutGrad(Momentum):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        super().step()
        return loss


class IgnoresTheClosure(Momentum):
    def step(self, closure: Any = None) -> Any:
        return super().step()


class ReadsGradientsFirst(Momentum):
    def step(self, closure: Any = None) -> Any:
        super().step()
        with torch.enable_grad():
            return closure() if closure is not None else None


class OtherName(Momentum):
    def step(self, loss_fn: Any = None) -> Any:
        return super().step(loss_fn)


class SwitchesGradOff(Momentum):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        torch.set_grad_enabled(False)
        return loss


class FirstGroupsRate(Momentum):
    def update(self, p: Tensor, grad: Tensor, group: Any) -> None:
        super().update(p, grad, {**group, "lr": self.param_groups[0]["lr"]})


class LastGroupsRate(Momentum):
    def update(self, p: Tensor, grad: Tensor, group: Any) -> None:
        super().update(p, grad, {**group, "lr": self.param_groups[-1]["lr"]})


class DefaultDecay(Momentum):
    def update(self, p: Tensor, grad: Tensor, group: Any) -> None:
        super().update(p, grad, {**group, "weight_decay": self.defaults["weight_decay"]})


class DecayOutwards(Momentum):
    def update(self, p: Tensor, grad: Tensor, group: Any) -> None:
        super().update(p, grad, {**group, "weight_decay": -group["weight_decay"]})


class OtherForeach(Momentum):
    def __init__(self, params: Any, lr: float = 0.05, foreach: bool | None = None) -> None:
        super().__init__(params, lr)
        self.foreach = foreach

    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, grad if not self.foreach else 1.1 * grad, state, group)


class KeepsOldGradients(Momentum):
    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"][:1]:
            p.grad = None


class NoHooks(Momentum):
    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.step = torch.no_grad()(functools.partial(inspect.unwrap(Momentum.step), self))  # type: ignore[method-assign]


class KeepsTheList(Momentum):
    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.known = {id(p) for group in self.param_groups for p in group["params"]}

    def update(self, p: Tensor, grad: Tensor, group: Any) -> None:
        if id(p) in self.known:
            super().update(p, grad, group)


class KeepsTheRate(Momentum):
    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.lr = lr

    def update(self, p: Tensor, grad: Tensor, group: Any) -> None:
        super().update(p, grad, {**group, "lr": self.lr})


class DoublesTensorRate(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        super().move(p, grad, state, group)
        if isinstance(group["lr"], Tensor):
            group["lr"].mul_(0.5)


class EditsGradients(Momentum):
    def update(self, p: Tensor, grad: Tensor, group: Any) -> None:
        super().update(p, grad.add_(p, alpha=group["weight_decay"]), {**group, "weight_decay": 0.0})


class FreesGradients(Momentum):
    def update(self, p: Tensor, grad: Tensor, group: Any) -> None:
        super().update(p, grad, group)
        p.grad = None


class DivergesLater(Momentum):
    """The velocity grows without bound, at any learning rate."""

    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        state["count"] = state.get("count", torch.zeros((), dtype=torch.int64)) + 1
        sign = 1.0 if int(state["count"]) == 1 else -1.0
        state["velocity"].mul_(group["momentum"]).add_(grad)
        p.add_((-sign * group["lr"] * state["velocity"]).to(p.dtype))


class Crashes(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        raise KeyError("velocity")


class SparseCrash(Momentum):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.data_ptr()
                    self.update(p, p.grad, group)
        return loss


class MovesMemory(Momentum):
    def move(self, p: Tensor, grad: Tensor, state: Any, group: Any) -> None:
        moved = p.detach().clone()
        super().move(moved, grad, state, group)
        p.data = moved


FAULTS: dict[str, tuple[type[Optimizer], str]] = {
    "uphill": (Uphill, "direction"),
    "uphill on biases": (UphillOnBiases, "direction"),
    "nothing moves": (Still, "direction"),
    "vectors crash": (NeedsTwoDimensions, "shape"),
    "scalars crash": (NoScalars, "shape"),
    "float64 crashes": (SinglePrecisionOnly, "dtype"),
    "layout assumed": (AssumesLayout, "layout"),
    "gradients viewed": (ViewsGradients, "layout"),
    "maximize ignored": (NeverMaximizes, "maximize"),
    "decay without gradients": (DecaysWithoutGradients, "none_gradient"),
    "every gradient needed": (AsksForEveryGradient, "none_gradient"),
    "late gradients ignored": (OnlyFirstComers, "none_gradient"),
    "zero gradients are NaN": (DividesByNorm, "zero_gradient"),
    "zero gradients crash": (Factorises, "zero_gradient"),
    "loss not returned": (ForgetsTheLoss, "closure"),
    "closure without grad": (ClosureWithoutGrad, "closure"),
    "closure not called": (IgnoresTheClosure, "closure"),
    "closure called last": (ReadsGradientsFirst, "closure"),
    "closure by another name": (OtherName, "closure"),
    "autograd left off": (SwitchesGradOff, "closure"),
    "first group's lr": (FirstGroupsRate, "groups"),
    "last group's lr": (LastGroupsRate, "groups"),
    "default weight decay": (DefaultDecay, "groups"),
    "weight decay outwards": (DecayOutwards, "weight_decay"),
    "foreach differs": (OtherForeach, "foreach"),
    "zero_grad forgets": (KeepsOldGradients, "zero_grad"),
    "hooks passed by": (NoHooks, "hooks"),
    "added group ignored": (KeepsTheList, "groups"),
    "scheduler ignored": (KeepsTheRate, "scheduler"),
    "tensor lr written": (DoublesTensorRate, "tensor_lr"),
    "gradient edited": (EditsGradients, "gradient_changed"),
    "gradient freed": (FreesGradients, "gradient_changed"),
    "diverges": (DivergesLater, "convergence"),
    "crashes": (Crashes, "step"),
}  # fmt: skip

# Loud, or no promise of torch's: warnings.
IMPOLITE: dict[str, tuple[type[Optimizer], str]] = {
    "sparse gradients crash": (SparseCrash, "sparse_gradient"),
    "memory changes": (MovesMemory, "memory"),
}
