"""A small model with two or three towers, batches with absent rows, and slow obvious gradients for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

K = 4
SIZES = {"image": 5, "audio": 3}
WIDTHS = {"image": 6, "audio": 4}
THREE = {"image": 5, "audio": 3, "text": 2}
Inputs = dict[str, tuple[Tensor, Tensor]]


class Towers(nn.Module):
    """A tanh layer a modality; concatenated, zero where absent, and one or two layers on top."""

    def __init__(self, sizes: Mapping[str, int] = SIZES, outputs: int = K, hidden: int | None = 7) -> None:
        super().__init__()
        self.widths = {key: WIDTHS.get(key, 3) for key in sizes}
        self.encoders = nn.ModuleDict(
            {key: nn.Sequential(nn.Linear(size, self.widths[key]), nn.Tanh()) for key, size in sizes.items()}
        )
        total = sum(self.widths.values())
        self.head: nn.Module = nn.Linear(total, outputs)
        if hidden:
            self.head = nn.Sequential(nn.Linear(total, hidden), nn.Tanh(), nn.Linear(hidden, outputs))

    def features(self, **inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {key: encoder(inputs[key][0]) for key, encoder in self.encoders.items()}

    def fuse(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        parts = [torch.where(present[key][:, None], features[key], 0.0) for key in self.encoders]
        output: Tensor = self.head(torch.cat(parts, dim=1))
        return output

    def forward(self, **inputs: tuple[Tensor, Tensor]) -> Tensor:
        return self.fuse(self.features(**inputs), {key: here for key, (_, here) in inputs.items()})


def make(cls: Any, sizes: Mapping[str, int] = SIZES, *, hidden: int | None = 7, seed: int = 0, **settings: Any) -> Any:
    """A cure around a fresh model, in double precision."""
    torch.manual_seed(seed)
    model = Towers(sizes, hidden=hidden)
    return cls(model, K, model.widths, **settings).double()


def batch(rows: int = 12, sizes: Mapping[str, int] = SIZES, *, absent: bool = False, seed: int = 0) -> tuple[Any, Any]:
    """Inputs that say something of the targets, more so in the first modality."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.arange(rows) % K
    inputs: Inputs = {}
    for i, (key, size) in enumerate(sizes.items()):
        means = torch.randn(K, size, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        x = means[targets] * 2.0 / (1 + i) + torch.randn(rows, size, generator=g, dtype=torch.float64)
        here = torch.arange(rows) % 5 != i if absent else torch.ones(rows, dtype=torch.bool)
        inputs[key] = (x, here)
    return inputs, targets


def tower_grads(model: nn.Module, loss: Tensor, key: str) -> list[Tensor]:
    """The gradient of a loss in the parameters of one tower, by a backward pass of its own."""
    encoders: Any = model.encoders
    found = torch.autograd.grad(loss, list(encoders[key].parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(encoders[key].parameters(), found, strict=True)]


def flat(grads: Any) -> Tensor:
    return torch.cat([g.reshape(-1) for g in grads])


def loss_by_rows(outputs: Tensor, targets: Tensor, present: Tensor) -> Tensor:
    """Cross-entropy of the rows that are present, one after another."""
    found = [F.cross_entropy(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets)) if present[i]]
    return torch.stack(found).mean()
