"""Small trainings in which the signal or the gradient is lost on its way, each with its cure, and healthy look-alikes.

The faults lie in the model or in what joins it to the optimiser; :mod:`health_runs.dynamics` has those of the steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from health_runs.dynamics import Batch, Case, Run, adam, convnet, mlp, quadrants, sgd, waves

__all__ = ["CASES", "HEALTHY"]

Make = Callable[[], nn.Module]


# Tasks.


def recall(generator: torch.Generator, step: int = 1, n: int = 32, length: int = 60, at: int = 0) -> Batch:
    """Sequences [n, length, 3]: which of two symbols stood at one place, the rest is noise."""
    y = torch.randint(0, 2, (n,), generator=generator)
    x = torch.cat([torch.zeros(n, length, 2), torch.randn(n, length, 1, generator=generator)], 2)
    x[torch.arange(n), at, y] = 1.0
    return (x,), y


def scaled(factor: float) -> Callable[..., Batch]:
    """The images times a factor."""

    def batch(generator: torch.Generator, step: int = 1) -> Batch:
        (x,), y = quadrants(generator, step)
        return (factor * x,), y

    return batch


def last_token(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output[:, -1], target)


# Models.


def initialised(model: nn.Module, start: Callable[[Tensor], object], bias: float = 0.0) -> nn.Module:
    """``start`` on the weight matrices, a constant on the biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            start(module.weight)
            if module.bias is not None:
                nn.init.constant_(module.bias, bias)
    return model


def normal(std: float) -> Callable[[Tensor], object]:
    return lambda w: nn.init.normal_(w, std=std)


def kaiming(w: Tensor) -> object:
    return nn.init.kaiming_normal_(w, nonlinearity="relu")


def normed(depth: int, act: type[nn.Module] = nn.ReLU, width: int = 32) -> nn.Module:
    """A perceptron with a normalisation layer before each activation."""
    parts: list[nn.Module] = [nn.Flatten(), nn.Linear(64, width), nn.LayerNorm(width), act()]
    for _ in range(depth - 1):
        parts += [nn.Linear(width, width), nn.LayerNorm(width), act()]
    return nn.Sequential(*parts, nn.Linear(width, 4))


class Gated(nn.Module):
    """Blocks in a row, each behind a gate of one number; the loss sees what passes them all."""

    def __init__(self, gates: tuple[float, ...]) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in gates)
        self.gates = nn.ParameterList(torch.tensor(gate) for gate in gates)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x.flatten(1)))
        for block, gate in zip(self.blocks, self.gates, strict=True):
            h = F.relu(block(h)) * torch.sigmoid(gate)
        return self.head(h)


class Residual(nn.Module):
    """Pre-norm residual blocks; ``zero`` starts each block's last layer at zero."""

    def __init__(self, depth: int, width: int = 32, zero: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 4)
        if zero:
            for last in [*(block[3] for block in self.blocks), self.head]:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


class Reader(nn.Module):
    """A fused recurrent layer and a head on its last output."""

    def __init__(self, kind: type[nn.RNNBase] = nn.RNN, width: int = 24, remember: float | None = None) -> None:
        super().__init__()
        self.rnn = kind(3, width, batch_first=True)
        self.head = nn.Linear(width, 2)
        if remember is not None:  # the forget gate is the second of four
            nn.init.constant_(self.rnn.bias_hh_l0[width : 2 * width], remember)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Loop(nn.Module):
    """A recurrence written by hand, with a gain on its orthogonal recurrent weight."""

    def __init__(self, gain: float, act: Callable[[Tensor], Tensor] = torch.tanh, width: int = 24) -> None:
        super().__init__()
        self.inward, self.recur = nn.Linear(3, width), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 2)
        self.act = act
        nn.init.orthogonal_(self.recur.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.recur.in_features)
        for step in self.inward(x).unbind(1):
            h = self.act(step + self.recur(h))
        return self.head(h)


class Towers(nn.Module):
    """Two towers side by side; ``cut`` detaches what the second one says, ``unused`` never calls it."""

    def __init__(self, cut: bool = False, unused: bool = False, copied: bool = False) -> None:
        super().__init__()
        self.left, self.right = mlp(2, 32, 64, 16), mlp(2, 32, 64, 16)
        if copied:
            self.right = copy.deepcopy(self.left)
        self.head = nn.Linear(16, 4)
        self.cut, self.unused = cut, unused

    def forward(self, x: Tensor) -> Tensor:
        h = self.left(x)
        if not self.unused:
            right = self.right(x)
            h = h + (right.detach() if self.cut else right)
        return self.head(h)


class Attention(nn.Module):
    """Attention over the rows of an image, its scores times a scale."""

    def __init__(self, scale: float, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(torch.randn(8, width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(self.embed(x[:, 0]) + self.place, (self.place.shape[1],))
        weights = torch.softmax(self.scale * self.query(h) @ self.key(h).mT, -1)
        return self.head((weights @ self.value(h)).mean(1))


class Functional(nn.Module):
    """Activations as functions."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        nn.init.constant_(self.two.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(F.relu(self.two(F.relu(self.one(x.flatten(1))))))


def with_head(model: nn.Module, std: float) -> nn.Module:
    nn.init.normal_(list(model.children())[-1].weight, std=std)
    return model


def with_zero(model: nn.Sequential, *which: int) -> nn.Module:
    for i in which:
        nn.init.zeros_(model[i].weight)
        nn.init.zeros_(model[i].bias)
    return model


def with_bias(model: nn.Sequential, which: int, bias: float) -> nn.Module:
    nn.init.constant_(model[which].bias, bias)
    return model


def without(name: str, lr: float = 3e-3) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Adam over all parameters but those of one part."""
    return lambda model: torch.optim.AdamW([p for n, p in model.named_parameters() if not n.startswith(name)], lr)


def case(kind: str, where: str, by: int, model: Make, cured: Make | None = None, **more: Any) -> Case:
    """A case on the images with Adam, unless told otherwise; ``cure`` names what changes beside the model."""
    cure = more.pop("cure", {})
    run = replace(Run(model, quadrants, adam(3e-3), steps=100), **more)
    return Case(run, kind, tuple(where.split()), by, ({"model": cured} if cured else {}) | cure)


CASES: dict[str, Case] = {
    "sigmoids": case(
        "vanishing", "1", 20, lambda: mlp(10, act=nn.Sigmoid), lambda: normed(10), optimizer=sgd(0.01, 0.9)
    ),
    "sigmoids with adam": case("vanishing", "1", 20, lambda: mlp(10, act=nn.Sigmoid), lambda: normed(10)),
    "closed gate": case(
        "vanishing", "blocks.2 blocks.1 gates stem", 20,
        lambda: Gated((2.0, 2.0, -14.0, 2.0)), lambda: Gated((2.0, 2.0, 2.0, 2.0)),
    ),
    "weights too small": case(
        "bad_init", "1 3", 5, lambda: initialised(mlp(12), normal(0.02)), lambda: initialised(mlp(12), kaiming)
    ),
    "weights too large": case(
        "bad_init", "1 3", 5, lambda: initialised(mlp(8), normal(1.0)), lambda: initialised(mlp(8), kaiming)
    ),
    "examples become alike": case(
        "vanishing", "1", 20, lambda: mlp(20), lambda: initialised(mlp(20), kaiming),
        optimizer=sgd(0.01),
    ),
    "head too large": case(
        "bad_init", "5", 5, lambda: with_head(mlp(2), 20.0), lambda: with_head(mlp(2), 0.1), optimizer=adam(1e-3)
    ),
    "rnn": case(
        "vanishing_through_time", "rnn", 150, Reader, lambda: Reader(nn.LSTM, remember=4.0),
        batch=recall, optimizer=adam(1e-2), steps=200,
    ),
    "lstm that forgets": case(
        "vanishing_through_time", "rnn", 150, lambda: Reader(nn.LSTM, remember=-1.0),
        lambda: Reader(nn.LSTM, remember=4.0), batch=recall, optimizer=adam(1e-2), steps=200,
    ),
    "recurrence by hand": case(
        "vanishing_through_time", "recur Loop", 150, lambda: Loop(0.5), lambda: Reader(nn.LSTM, remember=4.0),
        batch=recall, optimizer=adam(1e-2), steps=200,
    ),
    "recurrence that explodes": case(
        "exploding", "recur Loop", 20, lambda: Loop(2.5, torch.relu), lambda: Reader(nn.LSTM, remember=4.0),
        batch=recall, optimizer=adam(1e-2), steps=200,
    ),
    "dead": case("dead_units", "4", 20, lambda: with_bias(mlp(2), 3, -50.0), lambda: mlp(2)),
    "dead functions": case("dead_units", "two", 20, lambda: Functional(-50.0), Functional),
    "constant weights": case(
        "symmetry", "1", 10, lambda: initialised(mlp(2), lambda w: nn.init.constant_(w, 0.01)), lambda: mlp(2)
    ),
    "zeros in a row": case("symmetry", "1 3", 10, lambda: with_zero(mlp(2), 1, 3), lambda: with_zero(mlp(2), 5)),
    "copied tower": case(
        "symmetry", "left.1 right.1", 10, lambda: Towers(copied=True), Towers
    ),
    "raw pixels into tanh": case(
        "saturation", "1 2", 20, lambda: mlp(2, act=nn.Tanh), None, batch=scaled(255.0),
        optimizer=sgd(0.01, 0.9), cure={"batch": quadrants},
    ),
    "far targets": case(
        "saturation", "3 4", 120, lambda: mlp(2, 64, 6, 2, nn.Tanh), None, batch=lambda g, s: waves(g, s, offset=100.0),
        loss=F.mse_loss, optimizer=adam(3e-2), cure={"batch": waves, "optimizer": adam(1e-2)}, steps=250,
    ),
    "sharp attention": case(
        "saturation", "query key Attention", 20, lambda: Attention(10.0), lambda: Attention(32**-0.5)
    ),
    "detached tower": case("no_gradient", "right.5 right", 60, lambda: Towers(cut=True), Towers),
    "unused tower": case("no_gradient", "right.5 right", 60, lambda: Towers(unused=True), Towers),
    "forgotten layer": case(
        "no_gradient", "3", 60, lambda: mlp(2), None, optimizer=without("3"), cure={"optimizer": adam(3e-3)}
    ),
}  # fmt: skip


def frozen() -> nn.Module:
    model = mlp(3)
    for layer in model[1:4]:
        layer.requires_grad_(False)
    return model


def half_dead() -> nn.Module:
    model = mlp(2, width=64)
    with torch.no_grad():
        model[3].bias[:26] = -50.0
    return model


class Sparse(nn.Module):
    """A large table of which a batch looks up little."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(2000, 16, sparse=sparse)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))


def words(generator: torch.Generator, step: int = 1) -> Batch:
    """Bags of 12 of 2000 words, half of which belong to one class."""
    y = torch.randint(0, 2, (32,), generator=generator)
    return (torch.randint(0, 40, (32, 12), generator=generator) * 50 + 25 * y[:, None],), y


def units(factor: float) -> Callable[[Any, Any], Tensor]:
    return lambda output, target: factor * F.cross_entropy(output, target)


def shampoo(model: nn.Module) -> torch.optim.Optimizer:
    return hesse.optim.Shampoo(model.parameters(), lr=0.03)


def warm(steps: int) -> Callable[[int], float]:
    return lambda step: min(1.0, step / steps)


def run(model: Make, **more: Any) -> Run:
    return replace(Run(model, quadrants, adam(3e-3), steps=120), **more)


HEALTHY: dict[str, Run] = {
    "relu": run(lambda: mlp(2), optimizer=sgd(0.01, 0.9)),
    "tanh": run(lambda: mlp(2, act=nn.Tanh)),
    "deep relu": run(lambda: initialised(mlp(15), kaiming), optimizer=sgd(0.01, 0.9)),
    "deep with norms": run(lambda: normed(6, nn.GELU)),
    "convnet": run(lambda: convnet(False), optimizer=sgd(0.01, 0.9)),
    "convnet with batch norm": run(lambda: convnet(True)),
    "residual": run(lambda: Residual(6), optimizer=sgd(0.01, 0.9)),
    "half dead": run(half_dead),
    "functions": run(Functional),
    "frozen layers": run(frozen),
    "residual, zero blocks, warm-up": run(lambda: Residual(6, zero=True), schedule=warm(50)),
    "dropout": run(lambda: nn.Sequential(*mlp(2, 64)[:-1], nn.Dropout(0.5), nn.Linear(64, 4))),
    "tiny units": run(lambda: mlp(2), loss=units(1e-6)),
    "huge units": run(lambda: mlp(2), loss=units(1e6)),
    "large batch, small steps": run(lambda: mlp(2), batch=lambda g, s: quadrants(g, s, 512), optimizer=adam(3e-4)),
    "shampoo": run(lambda: mlp(2), optimizer=shampoo),
    "sparse embedding": run(lambda: Sparse(True), batch=words, optimizer=sgd(2.0)),
    "large embedding": run(lambda: Sparse(False), batch=words, optimizer=adam(1e-2)),
    "short memory, rnn": run(Reader, batch=lambda g, s: recall(g, s, at=-2), optimizer=adam(1e-2)),
    "short memory, lstm": run(
        lambda: Reader(nn.LSTM), batch=lambda g, s: recall(g, s, at=-2), optimizer=adam(1e-2)
    ),
    "attention": run(lambda: Attention(32**-0.5)),
    "mean squares": run(
        lambda: mlp(2, 64, 6, 2, nn.Tanh), batch=waves, loss=F.mse_loss, optimizer=adam(1e-2), steps=250
    ),
}  # fmt: skip
