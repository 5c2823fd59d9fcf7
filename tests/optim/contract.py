"""The table of optimisers that the contract is tried on, and how each is driven.

A row says what an optimiser is made of, and what it offers of the things that cases ask for. What a row does not offer
has its reason in ``REASONS``; what it does differently, a :class:`Differs` in its own line.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import hesse
from hesse.optim.adahessian import AdaHessian
from hesse.optim.line_search import LineSearch
from hesse.optim.sophia import SophiaG, SophiaH
from problems import Problem, as_double, problem

__all__ = ["REASONS", "ROWS", "Differs", "Row"]


class Differs(NamedTuple):
    """What happens in place of a case: an error that says so, or, with no error, that it is none of this row's."""

    reason: str
    error: type[Exception] | None = None
    match: str = ""


# What a case can ask for, and why an optimiser may not offer it.
REASONS = {
    "gradients": "its step is found on the loss itself: it computes the gradient, and steps on no other",
    "plain": "it asks more of the loss than a plain closure has",
    "groups": "it takes the model: all parameters are one group, in the model's order",
    "lr": "there is no learning rate to set",
    "weight_decay": "it has no weight decay",
    "l1": "torch's own has no l1",
    "maximize": "it only minimises",
    "guarded": "torch's own takes what it is given: NaN, sparse or complex",
}
GRADIENTS = frozenset({"gradients", "plain", "groups", "lr", "weight_decay", "l1", "maximize", "guarded"})
SEARCH = frozenset({"plain", "groups", "lr", "weight_decay", "maximize", "guarded"})
TORCH = GRADIENTS - {"l1", "guarded"}
MODEL = frozenset({"lr", "weight_decay", "l1", "maximize", "guarded"})


@dataclass(frozen=True)
class Row:
    """One optimiser.

    Args:
        make: ``make(params, **settings)``, or ``make(model, **settings)`` if it does not offer "groups".
        offers: of ``REASONS``.
        lr: at which it makes way on the small problems here; those that find it are given it only where a case asks.
        differs: by the name of a case.
        looks: how many steps from one that needs a :func:`hesse.closure` to the next; 0 if none does.
    """

    make: Callable[..., Optimizer]
    offers: frozenset[str] = GRADIENTS
    lr: float = 0.01
    differs: dict[str, Differs] = field(default_factory=dict)
    looks: int = 0

    def of(self, model: nn.Module, **settings: Any) -> Optimizer:
        """The optimiser of all parameters of a model."""
        if "groups" not in self.offers:
            return self.make(model, **settings)
        return self.on(model.parameters(), **settings)

    def on(self, params: Iterable[Any], **settings: Any) -> Optimizer:
        """The optimiser of parameters or groups."""
        return self.make(params, **{"lr": self.lr, **settings})

    def gradient_step(self, optimizer: Optimizer, p: Problem) -> None:
        """A step after ``loss.backward()``, or, where it is due, on a closure."""
        if self.due(optimizer):
            optimizer.step(closure_of(p))
            return
        optimizer.zero_grad()
        backward(p)
        optimizer.step()

    def due(self, optimizer: Optimizer) -> bool:
        return self.looks > 0 and any(group["steps"] % self.looks == 0 for group in optimizer.param_groups)


def searching(inner: Callable[..., Optimizer]) -> Callable[..., LineSearch]:
    return lambda params, **settings: LineSearch(inner(params, **settings))


def later(module: str, name: str) -> Callable[..., Optimizer]:
    """The optimiser of that name, imported when a test makes one."""
    return lambda *args, **settings: getattr(import_module(module), name)(*args, **settings)


LOOK = Differs("curvature is due at the first step", TypeError, "hesse.closure")
GIVEN = Differs("gradients alone do not say enough", TypeError, "hesse.closure")
WHOLE = Differs("it takes the model it was given", ValueError, "no further parameter groups")
BETWEEN = {"skorch's closure": LOOK}
ON_CLOSURES = {"GradScaler": GIVEN, "gradients without a closure": GIVEN}
FLAT = Differs(
    "which keys its state has depends on the batch; torch asks a fresh optimiser for them and loads no others, so that "
    "training goes on with curvature made anew"
)
ON_MODELS = {
    **ON_CLOSURES,
    "skorch's closure": GIVEN,
    "a group that joins": WHOLE,
    "flat distributed checkpoint": FLAT,
}
MOVED = Differs("torch's own wants models moved before it is made")

DENSE = Differs("torch's Adam takes dense gradients", RuntimeError, "does not support sparse gradients")

ROWS: dict[str, Row] = {
    "AdamW": Row(AdamW, TORCH, differs={"model moved": MOVED}),
    "SOAP": Row(later("hesse.optim.soap", "SOAP")),
    "Shampoo": Row(later("hesse.optim.shampoo", "Shampoo")),
    "AdaHessian": Row(partial(AdaHessian, every=3), lr=0.05, differs=BETWEEN, looks=3),
    "SophiaH": Row(partial(SophiaH, every=3), differs=BETWEEN, looks=3),
    "SophiaG": Row(partial(SophiaG, every=3), differs=BETWEEN, looks=3),
    "LineSearch(SGD)": Row(searching(SGD), SEARCH, lr=1.0, differs=ON_CLOSURES),
    "LineSearch(Adam)": Row(
        searching(Adam), SEARCH, differs={**ON_CLOSURES, "model moved": MOVED, "sparse gradients": DENSE}
    ),
    "KFAC": Row(later("hesse.optim.kfac", "KFAC"), MODEL, differs=ON_MODELS),
    "NewtonCG": Row(later("hesse.optim.newton_cg", "NewtonCG"), MODEL, differs=ON_MODELS),
    "GaussNewton": Row(later("hesse.optim.gauss_newton", "GaussNewton"), MODEL, differs=ON_MODELS),
}


def closure_of(p: Problem) -> hesse.Closure:
    return hesse.closure(p.model, p.loss_fn, p.batch)


def backward(p: Problem) -> Tensor:
    x, y = p.batch
    loss = p.loss_fn(p.model(x), y)
    loss.backward()
    return loss.detach()


def train(optimizer: Optimizer, p: Problem, steps: int, seed: int = 0) -> list[float]:
    """The losses before each of so many steps on one batch."""
    torch.manual_seed(seed)
    return [float(optimizer.step(closure_of(p))) for _ in range(steps)]


def double(name: str = "mlp, cross-entropy") -> Problem:
    return as_double(problem(name))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(one: Any, other: Any) -> bool:
    """Whether two nests of tensors, states or models are the same bit for bit, types of numbers included."""
    one, other = (x.state_dict() if isinstance(x, nn.Module) else x for x in (one, other))
    if isinstance(one, Tensor):
        if not (isinstance(other, Tensor) and one.dtype == other.dtype and one.shape == other.shape):
            return False
        return bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(x, y) for x, y in zip(one, other, strict=True))
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def twins(name: str = "mlp, cross-entropy") -> Iterator[Problem]:
    """As many copies of one problem as are asked for, in float64."""
    while True:
        yield double(name)


def frozen_copy(state: Any) -> Any:
    """A state dict that later steps cannot change."""
    return copy.deepcopy(state)
