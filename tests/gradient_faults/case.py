"""What a case of the corpus is, and the bodies that faults are planted in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Block", "Fault", "Healthy", "Loss", "mlp"]


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Args:
        make: ``make(broken)`` is a model (or function, or closure) and its inputs; ``make(False)`` is repaired.
        kinds: what it may be called, best name first.
        where: the place that has to be named first.
        function: what ``.function`` has to contain, if the fault is in one.
        check: the check that has to see it.
    """

    make: Callable[[bool], tuple[Any, Any]]
    kinds: str
    where: str
    function: str | None = None
    check: str = "gradients"

    @property
    def name(self) -> str:
        return self.make.__name__


@dataclass(frozen=True)
class Healthy:
    """A correct model that looks suspicious; ``check`` as for :class:`Fault`."""

    make: Callable[[], tuple[Any, Any]]
    check: str = "gradients"

    @property
    def name(self) -> str:
        return self.make.__name__


class Loss(nn.Module):
    """``body(*inputs)`` against nothing: its mean square, or ``loss`` of it."""

    def __init__(self, body: nn.Module, loss: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.body = body
        self.loss = loss

    def forward(self, *inputs: Any) -> Tensor:
        y = self.body(*inputs)
        return self.loss(y) if self.loss else y.square().mean()


def mlp(*middle: nn.Module, rows: int = 12, width: int = 16) -> tuple[nn.Module, Tensor]:
    """Linear, ``middle``, Linear, with data; the first of ``middle`` is at ``body.1``."""
    body = nn.Sequential(nn.Linear(6, width), *middle, nn.Linear(width, 3))
    return Loss(body), torch.randn(rows, 6)


class Block(nn.Module):
    """A transformer block around a given attention; ``(rows, time, 16)`` in and out."""

    def __init__(self, attention: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(16, 32), act or nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """A body, a head and the cross entropy."""

    def __init__(self, body: nn.Module, width: int, classes: int = 4) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.body(x)
        return F.cross_entropy(self.head(h.flatten(1)), labels)


def labels(rows: int, classes: int = 4) -> Tensor:
    return torch.arange(rows) % classes
