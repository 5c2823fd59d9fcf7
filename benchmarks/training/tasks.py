"""A task is a model, a loss, an endless stream of batches and one number that has to fall below a target.

Everything follows from a seed: the same start and the same batches for every optimiser. The number is measured on rows
of its own, or on the whole fixed data where minimising is all there is to do, and outside the clock. Targets are where
AdamW, at its best learning rate, arrives after the steps that its column of the tables shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import digits
from benchmarks.training import networks, physics

__all__ = ["TASKS", "Problem", "Task", "available"]

Batch = tuple[Any, Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Problem:
    """A freshly seeded model with its loss and data."""

    model: nn.Module
    loss_fn: LossFn
    stream: Callable[[], Iterator[Batch]]
    measure: Callable[[nn.Module], Tensor]

    def batches(self) -> Iterator[Batch]:
        """An endless stream of ``(inputs, targets)``, from its beginning at every call."""
        return self.stream()

    @torch.no_grad()
    def evaluate(self) -> float:
        """The task's number, of the model as it is."""
        return float(self.measure(self.model))


@dataclass(frozen=True)
class Task:
    """What is raced for: the first of ``hold`` evaluations in a row that are at most ``target``."""

    name: str
    metric: str
    target: float
    budget: int  # steps at most
    every: int  # steps between evaluations
    make: Callable[[int], Problem]
    final: float | None = None  # runs go on to their budget, and the last number should be at most this
    hold: int = 1  # more than one where a number that swings would cross the target by luck
    full: bool = False  # every batch is all there is: deterministic methods may run


def available() -> bool:
    return digits.available() and (digits.DATA / "tinyshakespeare").is_dir()


def _autoencoder(seed: int) -> Problem:
    pictures, _ = _small_pictures()
    train, held = pictures[:8000], pictures[8000:]
    torch.manual_seed(seed)
    return Problem(
        networks.autoencoder(),
        F.binary_cross_entropy_with_logits,
        lambda: _rows(train, train, 250, seed),
        lambda model: F.mse_loss(torch.sigmoid(model(held)), held) * held.shape[1],
    )


def _deep(activation: type[nn.Module]) -> Callable[[int], Problem]:
    def make(seed: int) -> Problem:
        pictures, labels = _small_pictures()
        torch.manual_seed(seed)
        return _classifier(networks.deep_mlp(activation), 2 * pictures - 1, labels, 250, seed)

    return make


def _convnet(seed: int) -> Problem:
    pictures, labels = _pictures()
    torch.manual_seed(seed)
    return _classifier(networks.convnet(), pictures, labels, 128, seed)


def _chars(seed: int) -> Problem:
    text = _text()
    train, held = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    torch.manual_seed(seed)
    windows = torch.arange(65) + 65 * torch.arange(200)[:, None]
    inputs, targets = held[windows[:, :-1]], held[windows[:, 1:]]

    def stream() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(train) - 65, (16, 1), generator=generator) + torch.arange(65)
            yield train[rows[:, :-1]], train[rows[:, 1:]]

    model = networks.CharTransformer(int(text.max()) + 1)
    return Problem(model, F.cross_entropy, stream, lambda model: F.cross_entropy(model(inputs), targets))


def _adding(length: int) -> Callable[[int], Problem]:
    def batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        numbers = torch.rand(count, length, generator=generator)
        marks = torch.zeros(count, length)
        half = length // 2
        for begin in (0, half):
            marks.scatter_(1, begin + torch.randint(half, (count, 1), generator=generator), 1.0)
        return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(1, keepdim=True)

    def make(seed: int) -> Problem:
        torch.manual_seed(seed)
        inputs, targets = batch(1000, torch.Generator().manual_seed(1000))

        def stream() -> Iterator[Batch]:
            generator = torch.Generator().manual_seed(seed)
            while True:
                yield batch(128, generator)

        return Problem(networks.Adder(), F.mse_loss, stream, lambda model: F.mse_loss(model(inputs), targets))

    return make


def _logistic(seed: int) -> Problem:
    """In float64: a gap of 1e-6 is where a line search in float32 no longer sees a difference."""
    x, labels, least = _logistic_data()
    torch.manual_seed(seed)
    model = nn.Linear(x.shape[1], 10, dtype=x.dtype)
    return Problem(
        model, F.cross_entropy, lambda: _always((x, labels)), lambda model: F.cross_entropy(model(x), labels) - least
    )


def _fusion(seed: int) -> Problem:
    splits = _modalities()
    (image, sound), labels = splits["train"]
    held, answers = splits["test"]
    torch.manual_seed(seed)
    model = digits.LateFusion(image.shape[2:], sound.shape[2:])

    def stream() -> Iterator[Batch]:
        for rows in _order(len(labels), 128, seed):
            yield (image[rows], sound[rows]), labels[rows]

    return Problem(model, F.cross_entropy, stream, lambda model: F.cross_entropy(model(*held), answers))


def _poisson(seed: int) -> Problem:
    torch.manual_seed(seed)
    points = physics.poisson_points()
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None]
    return _residual(physics.Poisson(), points, x, physics.poisson_solution(x))


def _burgers(seed: int) -> Problem:
    torch.manual_seed(seed)
    points = physics.burgers_points()
    x = torch.cartesian_prod(torch.linspace(-1, 1, 101), torch.linspace(0, 1, 51)[1:]).double()
    return _residual(physics.Burgers(), points, x, physics.burgers_solution(x))


def _residual(model: physics.Field, points: tuple[Tensor, Tensor], x: Tensor, solution: Tensor) -> Problem:
    batch = points, torch.zeros(len(points[0]), 1, dtype=torch.float64)
    return Problem(
        model, F.mse_loss, lambda: _always(batch), lambda model: (model.value(x) - solution).norm() / solution.norm()
    )


def _classifier(model: nn.Module, pictures: Tensor, labels: Tensor, batch: int, seed: int) -> Problem:
    """The number is the loss of 2000 of the 8000 training rows: the race is about minimising."""
    return Problem(
        model,
        F.cross_entropy,
        lambda: _rows(pictures[:8000], labels[:8000], batch, seed),
        lambda model: F.cross_entropy(model(pictures[:2000]), labels[:2000]),
    )


def _rows(inputs: Tensor, targets: Tensor, batch: int, seed: int) -> Iterator[Batch]:
    for rows in _order(len(inputs), batch, seed):
        yield inputs[rows], targets[rows]


def _order(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Whole batches of a new permutation each epoch, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // batch * batch].split(batch)


def _always(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


@cache
def _pictures() -> tuple[Tensor, Tensor]:
    """[10000, 1, 28, 28] in 0..1 and labels, in one fixed order: 8000 rows to train on, 2000 held out."""
    images, labels = digits._mnist()
    order = np.random.default_rng(0).permutation(len(images))
    return torch.from_numpy(images[order] / np.float32(255))[:, None], torch.from_numpy(labels[order]).long()


@cache
def _small_pictures() -> tuple[Tensor, Tensor]:
    pictures, labels = _pictures()
    return F.avg_pool2d(pictures, 2).flatten(1), labels


@cache
def _modalities() -> dict[str, digits.Split]:
    return digits.load(0)


@cache
def _text() -> Tensor:
    text = (digits.DATA / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    places = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([places[character] for character in text])


@cache
def _logistic_data(rows: int = 3000, components: int = 100) -> tuple[Tensor, Tensor, float]:
    """Principal components of pictures, labels, and the least loss.

    A tenth of the labels is drawn at random: no class splits off linearly, so the least loss is attained.
    """
    pictures, labels = _small_pictures()
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(10, (rows,), generator=generator)
    x, y = pictures[:rows].double(), torch.where(torch.rand(rows, generator=generator) < 0.1, random, labels[:rows])
    x = x - x.mean(0)
    _, axes = torch.linalg.eigh(x.T @ x)
    scores = x @ axes[:, -components:].flip(1)
    model = nn.Linear(components, 10, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    solver = torch.optim.LBFGS(
        model.parameters(),
        max_iter=5000,
        history_size=100,
        tolerance_grad=1e-7,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(model(scores), y)
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
        return scores, y, float(closure().detach())


TASKS = {
    task.name: task
    for task in (
        Task("autoencoder", "squared error a held-out picture", 3.0, 1200, 5, _autoencoder),
        Task("tanh30", "training cross-entropy", 0.18, 600, 5, _deep(nn.Tanh)),
        Task("relu30", "training cross-entropy", 0.25, 600, 5, _deep(nn.ReLU)),
        Task("chars", "held-out cross-entropy", 2.17, 600, 5, _chars),
        Task("adding50", "held-out squared error", 0.05, 500, 5, _adding(50)),
        Task("adding100", "held-out squared error", 0.05, 500, 5, _adding(100)),
        Task("logistic", "gap to the least loss", 1e-6, 1500, 1, _logistic, full=True),
        Task("fusion", "held-out cross-entropy", 0.7, 400, 5, _fusion),
        Task("poisson", "relative error", 2.5e-3, 1000, 1, _poisson, final=1e-5, hold=10, full=True),
        Task("burgers", "relative error", 5e-2, 1000, 1, _burgers, final=1e-5, hold=10, full=True),
        Task("convnet", "training cross-entropy", 0.08, 400, 5, _convnet),
    )
}
