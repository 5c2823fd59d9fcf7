"""The cases: trainings whose steps go wrong, and healthy ones that look as if they did.

``where`` lists the places that a person would accept; ``by`` is the step by which it must have been said. A case of
``kind`` None is healthy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from health_runs.dynamics import (
    Batch,
    Case,
    LanguageModel,
    Run,
    Towers,
    adam,
    convnet,
    mlp,
    pairs,
    quadrants,
    regressor,
    sgd,
    token_loss,
    tokens,
    waves,
)

__all__ = ["CASES", "HEALTHY"]

classify = Run(mlp, quadrants, sgd(0.1))
regress = Run(regressor, waves, adam(3e-3), F.mse_loss, steps=300)
language = Run(LanguageModel, tokens, adam(3e-3), token_loss, steps=150)

ANYWHERE = ("optimizer", "loss", "0", "1", "3", "5", "6")


def groups(rates: dict[str, float], usual: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """SGD with a learning rate of their own for some layers; zero leaves a layer out."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        named = {path: list(m.parameters(recurse=False)) for path, m in model.named_modules()}
        parts = [{"params": ps, "lr": rates.get(path, usual)} for path, ps in named.items() if ps]
        return torch.optim.SGD([part for part in parts if part["lr"]], usual)

    return make


def spoilt(batch: Callable[[torch.Generator, int], Batch], at: int, scale: float) -> Callable[..., Batch]:
    """One batch whose targets are far from where they belong."""

    def make(generator: torch.Generator, step: int) -> Batch:
        (x,), y = batch(generator, step)
        return ((x,), y * scale) if step == at else ((x,), y)

    return make


def whole(batch: Batch) -> Callable[..., Batch]:
    """The same batch at every step."""
    return lambda generator, step: batch


def cosine(steps: int, warm: int) -> Callable[[int], float]:
    return lambda step: min(1.0, step / warm) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def holed(batch: Callable[[torch.Generator, int], Batch], at: int) -> Callable[..., Batch]:
    """One batch with a NaN among its inputs."""

    def make(generator: torch.Generator, step: int) -> Batch:
        (x,), y = batch(generator, step)
        if step == at:
            x[3, 0] = torch.nan
        return (x,), y

    return make


def padded(generator: torch.Generator, step: int) -> Batch:
    """Every eighth row is empty."""
    (x,), y = waves(generator, step)
    x[::8] = 0
    return (x,), y


def nll(output: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(output, target)


class Probabilities(nn.Module):
    """Softmax and logarithm apart."""

    def __init__(self) -> None:
        super().__init__()
        self.out = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x).softmax(1).log()


class Unit(nn.Module):
    """Divides by the length of features, zero for padding: the slope of a norm at zero is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.hidden, self.out = nn.Linear(6, 64, bias=False), nn.Linear(64, 64), nn.Linear(64, 2)

    def length(self, h: Tensor) -> Tensor:
        return h.square().sum(1, keepdim=True).sqrt() + 1e-6

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.out(self.hidden(8 * h / self.length(h)).tanh())


class SafeUnit(Unit):
    """A small number inside the root."""

    def length(self, h: Tensor) -> Tensor:
        return (h.square().sum(1, keepdim=True) + 1e-6).sqrt()


def clip(norm: float) -> Callable[[nn.Module], object]:
    return lambda model: nn.utils.clip_grad_norm_(model.parameters(), norm)


def in_bfloat16(generator: torch.Generator, step: int) -> Batch:
    (x,), y = quadrants(generator, step)
    return (x.bfloat16(),), y


def scaled_loss(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: scale * F.cross_entropy(output.float(), target)


fuse = Run(Towers, pairs, adam(2e-3), steps=200)
fixed = waves(torch.Generator().manual_seed(5), 1, 64)
full = Run(lambda: regressor(32), whole(fixed), sgd(0.3), F.mse_loss, steps=200)

CASES: dict[str, Case] = {
    "SGD far too fast": Case(
        replace(classify, optimizer=sgd(30.0)), "learning_rate_too_large", ANYWHERE, 5, {"optimizer": sgd(0.17)}
    ),
    "SGD too fast": Case(
        replace(classify, optimizer=sgd(3.0)), "learning_rate_too_large", ANYWHERE, 10, {"optimizer": sgd(0.2)}
    ),
    "Adam far too fast": Case(
        replace(classify, optimizer=adam(1.0)), "learning_rate_too_large", ANYWHERE, 5, {"optimizer": adam(1e-3)}
    ),
    "Adam too fast for a language model": Case(
        replace(language, optimizer=adam(0.3)),
        "learning_rate_too_large",
        ("optimizer", "loss", "embed"),
        20,
        {"optimizer": adam(1e-3), "steps": 200},
    ),
    "convnet with momentum, too fast": Case(
        replace(classify, model=convnet, optimizer=sgd(5.0, 0.9)),
        "learning_rate_too_large",
        ANYWHERE,
        10,
        {"optimizer": sgd(0.026, 0.9)},
    ),
    "one layer's group too fast": Case(
        replace(classify, optimizer=groups({"5": 100.0}, 0.1)),
        "learning_rate_too_large",
        ("5",),
        10,
        {"optimizer": groups({"5": 0.1}, 0.1)},
    ),
    "learning rate raised in the middle": Case(
        replace(regress, optimizer=sgd(0.05), schedule=lambda step: 1.0 if step < 150 else 60.0, steps=200),
        "learning_rate_too_large",
        ANYWHERE,
        170,
        {"schedule": None, "gain": 1.5},
    ),
    "whole batch diverges": Case(
        replace(full, optimizer=sgd(2.0)), "learning_rate_too_large", ANYWHERE, 10, {"optimizer": sgd(0.05)}
    ),
    "SGD far too slow": Case(
        replace(classify, optimizer=sgd(1e-6)), "update_too_small", ("optimizer",), 100, {"optimizer": sgd(0.1)}
    ),
    "Adam far too slow for a language model": Case(
        replace(language, optimizer=adam(1e-6)), "update_too_small", ("optimizer",), 130, {"optimizer": adam(3e-3)}
    ),
    "Adam's eps above the gradients": Case(
        replace(classify, optimizer=adam(3e-3), loss=scaled_loss(1e-12)),
        "update_too_small",
        ("optimizer",),
        100,
        {"loss": scaled_loss(1.0)},
    ),
    "a layer left out of the optimiser": Case(
        replace(classify, optimizer=groups({"3": 0.0}, 0.1)),
        "update_too_small",
        ("3",),
        100,
        {"optimizer": groups({}, 0.1)},
    ),
    "schedule ends too early": Case(
        replace(classify, schedule=lambda step: 0.5**step), "update_too_small", ("optimizer",), 150, {"schedule": None}
    ),
    "one batch with absurd targets": Case(
        replace(regress, batch=spoilt(waves, 120, 100.0), optimizer=sgd(0.02), steps=200),
        "loss_spike",
        ("loss",),
        140,
        {"batch": waves, "steps": 600, "gain": 1.2},
    ),
    "one step a hundred times too long": Case(
        replace(regress, optimizer=sgd(0.02), schedule=lambda step: 300.0 if step == 120 else 1.0, steps=200),
        "loss_spike",
        ("loss",),
        140,
        {"schedule": None, "steps": 600, "gain": 1.2},
    ),
    "shuffled labels": Case(
        replace(classify, batch=lambda g, s: quadrants(g, s, 32, 1.0), optimizer=adam(1e-3)),
        "plateau",
        ("loss",),
        200,
        {"batch": quadrants},
    ),
    "half of the labels wrong": Case(
        replace(classify, batch=lambda g, s: quadrants(g, s, 32, 0.5), optimizer=adam(3e-3), steps=300),
        "plateau",
        ("loss",),
        300,
        {"batch": quadrants},
    ),
    "float16 without a scaler": Case(
        replace(classify, optimizer=adam(3e-3), loss=scaled_loss(1e-6), autocast=torch.float16),
        "underflow",
        ("1", "3", "5"),
        50,
        {"scaler": True},
    ),
    "bfloat16 weights, SGD": Case(
        replace(classify, model=lambda: mlp().bfloat16(), batch=in_bfloat16, optimizer=sgd(1e-3)),
        "stagnant_update",
        ("1", "3", "5"),
        50,
        {"model": mlp, "batch": quadrants, "optimizer": sgd(0.1)},
    ),
    "log of a probability that becomes zero": Case(
        replace(classify, model=Probabilities, loss=nll, optimizer=sgd(50.0)),
        "non_finite",
        ("Probabilities", "Probabilities.log", "out", "loss"),
        50,
        {"loss": F.cross_entropy, "model": mlp, "optimizer": sgd(0.1)},
    ),
    "NaN in one batch": Case(
        replace(regress, batch=lambda g, s: holed(waves, 120)(g, s)),
        "non_finite",
        ("input", "x"),
        120,
        {"batch": waves},
    ),
    "norm of a row of zeros": Case(
        replace(regress, model=Unit, batch=padded), "non_finite", ("Unit", "body"), 5, {"model": SafeUnit, "gain": 0.9}
    ),
    "a tied matrix that is hardly read": Case(
        replace(language, model=lambda: LanguageModel(gate=1e-2)),
        "tied_imbalance",
        ("embed.weight",),
        60,
        {"model": LanguageModel},
    ),
    "a modality on a tiny scale": Case(
        replace(fuse, batch=lambda g, s: pairs(g, s, scale=0.01)),
        "starved_branch",
        ("sound",),
        150,
        {"model": lambda: Towers(normalised=True)},
    ),
    "edge of stability": Case(full, "curvature", ("optimizer",), 200, {"optimizer": sgd(0.03)}),
}

HEALTHY: dict[str, Run] = {
    "SGD": classify,
    "momentum": replace(classify, optimizer=sgd(0.01, 0.9)),
    "Adam": replace(classify, optimizer=adam(3e-3)),
    "RMSprop": replace(classify, optimizer=lambda m: torch.optim.RMSprop(m.parameters(), 1e-3)),
    "warm-up and cosine": replace(classify, optimizer=adam(3e-3), schedule=cosine(300, 50), steps=300),
    "long warm-up": replace(classify, optimizer=adam(3e-3), schedule=lambda step: (step / 200) ** 2),
    "cosine to zero": replace(language, schedule=cosine(150, 20)),
    "step decay": replace(regress, schedule=lambda step: 0.1 ** (step // 200), steps=400),
    "two rows a batch": replace(classify, batch=lambda g, s: quadrants(g, s, 2), optimizer=adam(1e-3), steps=400),
    "one row a batch": replace(classify, batch=lambda g, s: quadrants(g, s, 1), optimizer=sgd(0.01), steps=600),
    "regression": regress,
    "regression, slow and steady": replace(regress, optimizer=sgd(0.03), steps=600, gain=1.1),
    "large targets": replace(
        regress,
        model=lambda: mlp(2, 64, 6, 2),
        batch=lambda g, s: waves(g, s, 32, 100.0, 50.0),
        optimizer=adam(3e-3),
        steps=400,
    ),
    "convnet with batch norm": replace(classify, model=convnet, optimizer=sgd(0.05, 0.9)),
    "convnet without norm": replace(classify, model=lambda: convnet(False), optimizer=adam(3e-3)),
    "converged": replace(classify, optimizer=adam(0.01), steps=400),
    "tied language model": language,
    "tied language model, SGD": replace(language, optimizer=sgd(0.3, 0.9), steps=200, gain=0.9),
    "tied, larger weights": replace(language, model=lambda: LanguageModel(std=0.2)),
    "clipped": replace(language, before=clip(0.5)),
    "bfloat16 autocast": replace(classify, autocast=torch.bfloat16, loss=scaled_loss(1.0)),
    "float16 autocast with a scaler": replace(
        classify, optimizer=adam(3e-3), autocast=torch.float16, scaler=True, loss=scaled_loss(1.0)
    ),
    "bfloat16 weights that learn": replace(
        classify, model=lambda: mlp().bfloat16(), batch=in_bfloat16, optimizer=adam(3e-3)
    ),
    "tiny unit of the loss, SGD": replace(classify, optimizer=sgd(1e5), loss=scaled_loss(1e-6)),
    "two towers": fuse,
    "two towers, one learns later": replace(fuse, batch=lambda g, s: pairs(g, s, sound="hidden"), steps=300),
    "two towers, one has only noise": replace(fuse, batch=lambda g, s: pairs(g, s, sound="noise")),
    "negative loss": replace(classify, optimizer=adam(3e-3), loss=lambda o, y: F.cross_entropy(o, y) - 5.0, gain=-9.0),
}
