"""Six small networks on the 8 x 8 digits that scikit-learn brings, and K-FAC on them: nothing is downloaded.

Every draw is seeded: a picture made twice is the same picture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import hesse

matplotlib.use("agg")
import matplotlib.pyplot as plt

__all__ = ["DATA", "NETWORKS", "ROWS", "Network", "fixed", "mlp", "rows_of", "save", "warmed"]

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
ROWS, BATCH = 1500, 64
WARM = 12  # steps of K-FAC's own before anything is measured
Batch = tuple[Tensor, Tensor]


class Recurrent(nn.Module):
    """The rows of a picture one after the other through a plain recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.view(-1, 8, 8))[0][:, -1])


def mlp(*sizes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layer = nn.Linear(before, after)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for before, after, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 2)):
        layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


@dataclass(frozen=True)
class Network:
    """A model, its loss, and whether it has to say the picture instead of the digit.

    ``noisy`` training labels: three in ten are drawn at random.
    """

    make: Callable[[], nn.Module]
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    picture: bool = False
    scale: float = 1.0  # of the inputs
    noisy: bool = False

    def batch(self, rows: Tensor | slice) -> Batch:
        x, y = DATA
        targets = x if self.picture else NOISY if self.noisy else y
        return self.scale * x[rows], targets[rows]

    def loss(self, model: nn.Module, rows: Tensor | slice = slice(0, ROWS)) -> float:
        """Over many rows, by default all that are trained on."""
        inputs, targets = self.batch(rows)
        with torch.no_grad():
            return float(self.loss_fn(model(inputs), targets))

    def closure(self, model: nn.Module, rows: Tensor | slice) -> Any:
        return hesse.closure(model, self.loss_fn, self.batch(rows))


NETWORKS = {
    "one wide layer, ReLU": Network(lambda: mlp(64, 128, 10, activation=nn.ReLU)),
    "the same, inputs 16 times as large": Network(lambda: mlp(64, 128, 10, activation=nn.ReLU), scale=16.0),
    "12 layers, tanh": Network(lambda: mlp(64, *[24] * 11, 10)),
    "convolutions, ReLU": Network(convnet),
    "recurrent, tanh": Network(Recurrent),
    "autoencoder, tanh": Network(lambda: mlp(64, 48, 24, 8, 24, 48, 64), F.mse_loss, picture=True),
}


def _digits() -> Batch:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]


def _noisy(labels: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(len(labels), generator=generator) < 0.3
    return torch.where(drawn, torch.randint(10, labels.shape, generator=generator), labels)


DATA = _digits()
NOISY = _noisy(DATA[1])


def rows_of(seed: int, count: int) -> list[Tensor]:
    """The rows of each of ``count`` batches."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(ROWS, (BATCH,), generator=generator) for _ in range(count)]


def warmed(network: Network, seed: int, steps: int = WARM) -> Any:
    """K-FAC with its model, after some steps of its own."""
    torch.manual_seed(seed)
    optimizer = hesse.optim.KFAC(network.make())
    for rows in rows_of(1000 + seed, steps):
        optimizer.step(network.closure(optimizer.model, rows))
    return optimizer


def fixed(optimizer: Any, damping: float) -> Any:
    """A copy of optimiser and model that keeps to one damping."""
    optimizer = copy.deepcopy(optimizer)
    group = optimizer.param_groups[0]
    group["damping"], group["fixed"] = damping, (*group["fixed"], "damping")
    return optimizer


def save(figure: Any, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
