"""An optimiser put to work: made, given something convex to minimise, and stepped in the way it asks for.

Most take parameters and step on the gradients in ``.grad`` (Adam); some want a closure (LBFGS), one that carries the
loss itself (Newton methods), or the model (K-FAC); some take matrices only (Muon), or sparse gradients (SparseAdam).
A :class:`Stand` finds out which by trying, and then makes as many trials as are asked for, all from the same numbers.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.check.passes.functions import defined
from hesse.finding import Finding, InputError
from hesse.objective import closure

__all__ = ["ANY", "LATE", "MATRICES", "RAISED", "Stand", "Trial", "gap", "same", "sentence", "undisturbed"]

# What an optimiser may raise that belongs in a finding; an interrupt or a lack of memory does not.
RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
Shapes = Sequence[tuple[int, ...]]
ANY: Shapes = ((4, 3), (3,))
MATRICES: Shapes = ((4, 3), (3, 5))
ROWS = 8  # examples of a problem
GIVEN_LR = 0.01  # for a class that asks for a learning rate and names none itself
LATE = 10  # steps within which a latecomer has to move
PATIENCE = 10  # steps within which something has to move: some warm up


class Bowls(nn.Module):
    """Parameters of any shapes, each in a bowl of its own: outputs are ``x * p``, element by element."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype) -> None:
        super().__init__()
        values = [torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32) for shape in shapes]
        # Small beside the minimum, so that weight decay has little to say.
        self.parts = nn.ParameterList([nn.Parameter((0.1 * value).to(dtype)) for value in values])
        self.used = len(self.parts)
        self.width = sum(p.numel() for p in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.cat([p.reshape(-1) for p in list(self.parts)[: self.used]])
        return x[:, : len(flat)] * flat


class Layers(nn.Module):
    """Two linear layers whose outputs are added, for those that look at layers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 3, dtype=dtype), nn.Linear(4, 3, dtype=dtype)])
        self.used, self.width = 2, 4

    def forward(self, x: Tensor) -> Tensor:
        return sum((part(x) for part in list(self.parts)[: self.used]), torch.zeros((), dtype=x.dtype))


class Trial:
    """One optimiser on one problem.

    Args:
        stand: says how it is made and stepped.
        settings: beside those of the stand.
        groups: settings for each part of the parameters; None puts all into one group.
        loss_fn: of outputs and targets.
    """

    def __init__(
        self,
        stand: Stand,
        *,
        shapes: Shapes | None = None,
        dtype: torch.dtype = torch.float32,
        groups: Sequence[dict[str, Any]] | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        prepare: Callable[[nn.Module], Any] | None = None,
        **settings: Any,
    ) -> None:
        stand.sow()
        self.stand, self.loss_fn = stand, loss_fn
        self.model = Layers(dtype) if stand.takes == "model" else Bowls(shapes or stand.shapes, dtype)
        if prepare is not None:
            prepare(self.model)
        width = self.model.width
        self.x = (0.5 + torch.rand(ROWS, width)).to(dtype)
        self.y = torch.randn(ROWS, 3 if stand.takes == "model" else width).to(dtype)
        given: Any = self.model if stand.takes == "model" else self.params
        if groups is not None:
            given = [{"params": self.part(i), **group} for i, group in enumerate(groups)]
        self.optimizer: torch.optim.Optimizer = stand.make(given, **stand.own_settings(*settings), **settings)
        self.train()

    def train(self) -> None:
        """Schedule-free methods keep two points, and step at one of them only."""
        mode = getattr(self.optimizer, "train", None)
        if callable(mode):
            mode()

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def part(self, i: int) -> list[Tensor]:
        """The parameters of one half of the problem."""
        part = list(self.model.parts)[i]
        return list(part.parameters()) if isinstance(part, nn.Module) else [part]

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def forward(self) -> Tensor:
        outputs = self.model(self.x)
        return self.loss_fn(outputs, self.y[:, : outputs.shape[1]])

    def loss(self) -> float:
        with torch.no_grad():
            return float(self.forward())

    def gradients(self) -> list[Tensor]:
        """Of the loss as it is minimised, zero for what is not used; ``.grad`` is left alone."""
        with torch.enable_grad():
            found = torch.autograd.grad(self.forward(), self.params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found, strict=True)]

    def backward(self) -> Tensor:
        """Fill ``.grad``; returns the loss."""
        with torch.enable_grad():
            self.model.zero_grad()
            loss = self.forward()
            loss.backward()
        if self.stand.needs == "sparse gradient":
            for p in self.params:
                p.grad = None if p.grad is None else p.grad.to_sparse()
        return loss.detach()

    def step(self) -> Any:
        """One step in the way the optimiser asks for."""
        if self.stand.needs in ("gradient", "sparse gradient"):
            self.backward()
            return self.optimizer.step()
        if self.stand.needs == "gradient and closure":
            self.backward()
        if self.stand.needs == "hesse.closure":
            loss_fn, used = self.loss_fn, self.y
            batch = (self.x, used)
            return self.optimizer.step(closure(self.model, lambda o, y: loss_fn(o, y[:, : o.shape[1]]), batch))  # type: ignore[arg-type]
        return self.optimizer.step(self.backward)  # type: ignore[arg-type]

    def run(self, steps: int, seed: int = 1) -> list[list[Tensor]]:
        """The parameters after each of so many steps; random numbers are those of the seed."""
        self.stand.sow(seed)
        found = []
        for _ in range(steps):
            self.step()
            found.append(self.values())
        return found

    def copy(self) -> Trial:
        """A twin with copies of the model and of the optimiser, made together."""
        twin = copy.copy(self)
        twin.model, twin.optimizer = copy.deepcopy((self.model, self.optimizer))
        return twin

    def slope(self) -> tuple[float, int]:
        """The slope of the loss along the first step that moves anything, and how many steps that took, 0 if none does.

        It is relative: -1 along the negative gradient, 0 across it.
        """
        for i in range(1, PATIENCE + 1):
            before, grads = self.values(), self.gradients()
            self.step()
            moves = [_wide(a) - _wide(b) for a, b in zip(self.values(), before, strict=True)]
            if any(bool(move.any()) for move in moves):
                pairs = [(_wide(g), move) for g, move in zip(grads, moves, strict=True)]
                along = sum(float((g * move).sum()) for g, move in pairs)
                sizes = [math.sqrt(sum(float(x.square().sum()) for x in xs)) for xs in zip(*pairs, strict=True)]
                return along / (sizes[0] * sizes[1]) if all(sizes) else math.nan, i
        return 0.0, 0


class Stand:
    """How an optimiser is made and stepped.

    Args:
        make: its class, or a function of parameters that returns one.
        settings: its keyword arguments.
        seed: of all numbers.

    Raises:
        InputError: it can be made neither from parameters nor from a model.
    """

    def __init__(self, make: Callable[..., torch.optim.Optimizer], settings: dict[str, Any], seed: int) -> None:
        self.make, self.settings, self.seed = make, dict(settings), seed
        self.takes, self.needs, self.shapes = "parameters", "gradient", ANY
        self.name = getattr(make, "__name__", type(make).__name__)
        self.notes: list[str] = []
        self.defaults = _settings(make)
        self.accepts = self.defaults.keys()
        if self.defaults.get("lr") is inspect.Parameter.empty:
            self.settings.setdefault("lr", GIVEN_LR)
        self.trouble = self._find_a_way()
        self.kind: type = type(self.example.optimizer)
        self.name = self.kind.__name__

    @property
    def plain(self) -> bool:
        """Whether it steps on dense gradients that are there before it is called."""
        return self.needs == "gradient"

    @property
    def lr(self) -> float | None:
        """The learning rate, unless it has none or sets it itself."""
        trial = Trial(self)
        lr = trial.optimizer.param_groups[0].get("lr")
        if lr is None or not float(lr) > 0 or ("lr" not in self.settings and self.defaults.get("lr", lr) is None):
            return None
        try:
            trial.run(2)
        except RAISED:
            return None
        return float(lr) if float(trial.optimizer.param_groups[0]["lr"]) == float(lr) else None

    def own_settings(self, *without: str) -> dict[str, Any]:
        """A copy: schedulers write into a learning rate that is a tensor."""
        return {name: copy.deepcopy(value) for name, value in self.settings.items() if name not in without}

    def method(self, *names: str) -> str:
        """The first of the methods that is not inherited from torch's base class, or else the step."""
        own = (n for n in names if getattr(self.kind, n) is not getattr(torch.optim.Optimizer, n))
        return next(own, "step")

    def sow(self, seed: int = 0) -> None:
        """Start all random generators anew."""
        torch.default_generator.manual_seed(self.seed + seed)  # torch.manual_seed formats a stack for every device
        random.seed(self.seed + seed)
        np.random.seed((self.seed + seed) % 2**32)

    def trial(self, **how: Any) -> Trial:
        return Trial(self, **how)

    def finding(
        self, kind: str, message: str, remedy: str, *, method: str = "step", severity: Any = "error", **evidence: Any
    ) -> Finding:
        """A finding about one of the optimiser's methods."""
        file, line = defined(getattr(self.kind, method))
        return Finding(
            kind, self.name, message, remedy, severity, function=method, file=file, line=line, evidence=evidence
        )

    def _find_a_way(self) -> Finding | None:
        """Choose the first way that works; a finding if none does, or if what works leaves something out."""
        needs = ("gradient", "sparse gradient", "closure", "gradient and closure", "hesse.closure")
        made: dict[str, Trial] = {}  # by what it takes
        refusals: list[str] = []
        crashes: dict[tuple[Any, ...], str] = {}
        for takes, shapes, need in itertools.product(("parameters", "model"), (ANY, MATRICES), needs):
            if takes == "model" and (shapes is MATRICES or need == "sparse gradient" or "parameters" in made):
                continue
            self.takes, self.shapes, self.needs = takes, shapes, need
            try:
                trial = self.trial()
            except RAISED as error:
                refusals.append(sentence(error))
                continue
            made.setdefault(takes, trial)
            if need == "sparse gradient" and not any("dense" in words for words in crashes.values()):
                continue
            try:
                trial.run(3)
            except RAISED as error:
                crashes[takes, shapes, need] = sentence(error)
                continue
            self.example = trial
            return self._left_out(crashes)
        if not made:
            raise InputError(
                "cannot be made",
                self.name,
                f"It can be made neither from parameters nor from a model: {refusals[0]}.",
                "Give its settings, optimizer(cls, lr=0.1), or a function of parameters that returns it.",
            )
        ((self.takes, self.example),) = made.items()
        self.kind, self.name = type(self.example.optimizer), type(self.example.optimizer).__name__
        message = f"A step raises {next(iter(crashes.values()))}, and so it does with a closure."
        return self.finding("step", message, "A step on ordinary float32 parameters has to work.")

    def _left_out(self, crashes: dict[tuple[Any, ...], str]) -> Finding | None:
        if self.takes == "model":
            self.notes.append("It takes the model.")
        if "closure" in self.needs:
            first = next(iter(crashes.values()), "")
            self.notes.append(f"It needs a {self.needs}" + (f" (without: {first})." if first else "."))
        elif self.needs == "sparse gradient":
            self.notes.append("It takes sparse gradients only.")
        if self.shapes is MATRICES:
            self.notes.append("It takes matrices only.")
            crash = crashes.get(("parameters", ANY, "gradient"))
            if crash is not None:
                self.kind = type(self.example.optimizer)
                message = f"A step raises {crash} for parameters that are not matrices, which it was made with."
                return self.finding(
                    "shape", message, "Refuse them when it is made, or handle them: biases are vectors."
                )
        return None


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether tensors are the same bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def gap(one: list[Tensor], other: list[Tensor]) -> float:
    """How far apart two points are."""
    return float(sum((a.double() - b.double()).square().sum() for a, b in zip(one, other, strict=True))) ** 0.5


def sentence(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def undisturbed() -> Iterator[None]:
    """What happens inside leaves the random generators of torch, NumPy and Python as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        # Sparse gradients are made on purpose: torch warns unless one says whether it is to check them.
        with torch.random.fork_rng(), torch.sparse.check_sparse_tensor_invariants(enable=False):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _settings(make: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of the settings; ``inspect.Parameter.empty`` for one that must be given."""
    try:
        return {name: p.default for name, p in inspect.signature(make).parameters.items()}
    except (TypeError, ValueError):
        return {}


def _wide(x: Tensor) -> Tensor:
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.to_dense().double()
