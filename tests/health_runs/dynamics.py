"""Small trainings that go wrong in the way steps are made, each with its cure, and healthy ones that look alike.

A ``Run`` says everything about a training; ``train`` makes it under a monitor. A ``Case`` is a run with a fault,
what must be found in it and where, and the changes that the remedy asks for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.health import Monitor

Batch = tuple[tuple[Any, ...], Any]


@dataclass(frozen=True)
class Run:
    """A training, made anew from its seed each time.

    Args:
        model: makes the model.
        batch: inputs and target, of a generator and the step (from 1).
        optimizer: of the model.
        loss: of output and target.
        schedule: what multiplies the learning rate at a step (from 1), if anything.
        before: called with the model after the backward pass of a step, before the optimiser (to clip, say).
        autocast: the low precision of the forward pass; with float16, ``scaler`` says whether gradients are scaled.
        gain: the loss must end below this share of its first value for the training to have succeeded.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator, int], Batch]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    schedule: Callable[[int], float] | None = None
    before: Callable[[nn.Module], object] | None = None
    steps: int = 200
    autocast: torch.dtype | None = None
    scaler: bool = False
    gain: float = 0.7
    every: int | None = 10


@dataclass(frozen=True)
class Case:
    """A run with a fault: the kind to be named at one of ``where`` by step ``by``; ``cure`` changes the run."""

    run: Run
    kind: str
    where: tuple[str, ...]
    by: int
    cure: Mapping[str, Any]

    @property
    def cured(self) -> Run:
        return replace(self.run, **self.cure)


def train(run: Run, seed: int = 0, watch: Callable[..., Any] = hesse.watch) -> tuple[Monitor, list[float]]:
    """The monitor after the run, and the loss of every step; a loss that is lost ends the run."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = run.model()
    optimizer = run.optimizer(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler("cpu", enabled=run.scaler)
    losses: list[float] = []
    with watch(model, optimizer, run.every, guard=None) as w:
        for step in range(1, run.steps + 1):
            inputs, target = run.batch(generator, step)
            if run.schedule is not None:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * run.schedule(step)
            optimizer.zero_grad()
            with torch.autocast("cpu", run.autocast) if run.autocast else contextlib.nullcontext():
                output = model(*inputs)
                loss = run.loss(output, target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if run.before is not None:
                run.before(model)
            scaler.step(optimizer)
            scaler.update()
            w.step(loss=loss)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
    return w, losses


def succeeded(run: Run, losses: list[float]) -> bool:
    """Whether the loss has come down, on average over the last steps."""
    tail = losses[-20:]
    return all(map(math.isfinite, losses)) and sum(tail) / len(tail) < run.gain * losses[0]


# Tasks: batches of a generator, the same for the same seed.


def quadrants(generator: torch.Generator, step: int = 1, n: int = 32, wrong: float = 0.0) -> Batch:
    """Images [n, 1, 8, 8] with one bright quadrant in noise; a share of labels is drawn anew."""
    y = torch.randint(0, 4, (n,), generator=generator)
    x = 0.5 * torch.randn(n, 1, 8, 8, generator=generator)
    for i in range(4):
        rows, columns = slice(4 * (i // 2), 4 * (i // 2) + 4), slice(4 * (i % 2), 4 * (i % 2) + 4)
        x[y == i, :, rows, columns] += 1
    other = torch.randint(0, 4, (n,), generator=generator)
    return (x,), torch.where(torch.rand(n, generator=generator) < wrong, other, y)


def waves(generator: torch.Generator, step: int = 1, n: int = 32, scale: float = 1.0, offset: float = 0.0) -> Batch:
    """Regression: a few waves of six numbers, scaled and shifted, with a little noise."""
    x = torch.randn(n, 6, generator=generator)
    y = torch.sin(2 * x[:, :2]) + x[:, 2:4] * x[:, 4:] + 0.1 * torch.randn(n, 2, generator=generator)
    return (x,), scale * y + offset


def tokens(generator: torch.Generator, step: int = 1, n: int = 8, length: int = 16, vocabulary: int = 40) -> Batch:
    """Token sequences in which the next is one of three that the current one allows."""
    x = torch.zeros(n, length + 1, dtype=torch.long)
    x[:, 0] = torch.randint(0, vocabulary, (n,), generator=generator)
    for t in range(length):
        x[:, t + 1] = (3 * x[:, t] + 1 + torch.randint(0, 3, (n,), generator=generator) ** 2) % vocabulary
    return (x[:, :-1],), x[:, 1:]


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


CENTRES = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(3))


def pairs(
    generator: torch.Generator,
    step: int = 1,
    n: int = 64,
    sound: str = "plain",
    scale: float = 1.0,
) -> Batch:
    """Two modalities of one class, neither sufficient alone.

    Args:
        sound: the second is "plain" (four clouds, as the first), "hidden" (the class lies in products of signs, which
            takes longer to find) or "noise" (it says nothing).
        scale: of the second.
    """
    y = torch.randint(0, 4, (n,), generator=generator)
    a, b = torch.randn(2, n, 16, generator=generator)
    if sound == "plain":
        b = b + 0.6 * CENTRES[1][y]
    elif sound == "hidden":
        signs = torch.randint(0, 2, (n, 2), generator=generator) * 2.0 - 1
        b = 0.3 * b
        b[:, :2] += signs
        b[:, 2:4] += signs * torch.stack([y % 2, y // 2], 1).mul(2.0).sub(1)
    return (a + 0.6 * CENTRES[0][y], scale * b), y


# Models.


def mlp(
    depth: int = 2, width: int = 32, inputs: int = 64, outputs: int = 4, act: type[nn.Module] = nn.ReLU
) -> nn.Module:
    parts: list[nn.Module] = [nn.Flatten(), nn.Linear(inputs, width), act()]
    for _ in range(depth - 1):
        parts += [nn.Linear(width, width), act()]
    return nn.Sequential(*parts, nn.Linear(width, outputs))


def regressor(width: int = 64) -> nn.Module:
    return mlp(2, width, 6, 2, nn.Tanh)


def convnet(norm: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2), *([nn.BatchNorm2d(16)] if norm else []), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


class LanguageModel(nn.Module):
    """A causal transformer block between an embedding and a head, which may share their matrix.

    Args:
        gate: what words are multiplied by on their way in.
    """

    def __init__(
        self, tied: bool = True, std: float = 0.02, width: int = 32, vocabulary: int = 40, gate: float = 1.0
    ) -> None:
        super().__init__()
        self.gate = gate
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(16, width)
        self.body = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for table in (self.embed, self.place, self.head):
            nn.init.normal_(table.weight, std=std)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.gate * self.embed(x) + self.place.weight[: x.shape[1]]
        return self.head(self.norm(self.body(h, mask, is_causal=True)))


class Towers(nn.Module):
    """Two towers side by side; ``normalised`` brings the second's inputs to unit size."""

    def __init__(self, normalised: bool = False) -> None:
        super().__init__()
        self.sight = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        first = [nn.BatchNorm1d(16)] if normalised else []
        self.sound = nn.Sequential(*first, nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, sight: Tensor, sound: Tensor) -> Tensor:
        return self.head(torch.cat([self.sight(sight), self.sound(sound)], 1))


def sgd(lr: float, momentum: float = 0.0) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr, momentum=momentum)


def adam(lr: float, **more: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr, **more)
