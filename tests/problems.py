"""Small models with their batches, shared by the tests: each is the smallest that has its kind of layer or use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Problem(NamedTuple):
    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batch: tuple[Any, Any]


class Recurrent(nn.Module):
    """A recurrent layer and a readout of its last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(3, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Text(nn.Module):
    """Tokens [B, T], 0 for padding, to classes."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8, padding_idx=0)
        self.middle = middle
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(x)).mean(1))


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=self.need_weights)[0]


class FreeParameter(nn.Module):
    """A linear layer, and a scale that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale)


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, in a second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 5)
        self.decoder = nn.Linear(5, 5)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


class Unused(nn.Module):
    """One layer that is never called, and one whose output goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(5, 3)
        self.never_called = nn.Linear(5, 3)
        self.called_in_vain = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.called_in_vain(x)
        return self.used(x)


def mlp(outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs))


def _vectors(model: nn.Module) -> Problem:
    x = torch.randn(24, 5)
    return Problem(model, F.cross_entropy, (x, x[:, :3].argmax(1)))


def _sequences(model: nn.Module) -> Problem:
    x = torch.randn(24, 4, 3)
    return Problem(model, F.cross_entropy, (x, x.sum(1).argmax(1)))


def _tokens(middle: nn.Module) -> Problem:
    x = torch.randint(12, (24, 5))
    return Problem(Text(middle), F.cross_entropy, (x, x[:, 0] % 3))


def _images(*layers: nn.Module) -> Problem:
    x = torch.randn(24, 2, 6, 6)
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))
    model(x[:1].expand(2, -1, -1, -1))
    return Problem(model, F.cross_entropy, (x, x[:, 0, :3, 0].argmax(1)))


def _regression() -> Problem:
    x = torch.randn(24, 5)
    return Problem(mlp(2), F.mse_loss, (x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)))


def _binary() -> Problem:
    x = torch.randn(24, 5)
    return Problem(mlp(2), F.binary_cross_entropy_with_logits, (x, (x[:, :2] * x[:, 2:4] > 0).float()))


# fmt: off
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp, cross-entropy": lambda: _vectors(mlp()),
    "mlp, binary cross-entropy": _binary,
    "mlp, squared error": _regression,
    "convnet": lambda: _images(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, stride=2)),
    "convnet, BatchNorm": lambda: _images(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "convnet, grouped": lambda: _images(nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Tanh()),
    "text": lambda: _tokens(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())),
    "attention": lambda: _tokens(SelfAttention(need_weights=True)),
    "attention, fused": lambda: _tokens(SelfAttention(need_weights=False)),
    "transformer": lambda: _tokens(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)),
    "transformer, eval": lambda: _tokens(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()),
    "RNN": lambda: _sequences(Recurrent(nn.RNN)),
    "LSTM": lambda: _sequences(Recurrent(nn.LSTM)),
    "GRU": lambda: _sequences(Recurrent(nn.GRU)),
    "free parameter": lambda: _vectors(FreeParameter()),
    "tied weights": lambda: _vectors(Tied()),
    "weight norm": lambda: _vectors(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3))),  # noqa: E501
}
# fmt: on


def problem(name: str, seed: int = 0) -> Problem:
    """The problem of that name: the same model and batch for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PROBLEMS[name]()


def as_double(made: Problem) -> Problem:
    """The problem in float64."""
    x, y = (t.double() if t.is_floating_point() else t for t in made.batch)
    return Problem(made.model.double(), made.loss_fn, (x, y))


def vectors(n: int, k: int, seed: int = 3) -> Tensor:
    """Random columns [n, k]."""
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def still(made: Problem, v: Tensor) -> Tensor:
    """``v`` without the row that autograd holds still: the problems' one padding row is the first eight elements."""
    padded = [m for m in made.model.modules() if isinstance(m, nn.Embedding) and m.padding_idx == 0]
    mask = torch.ones_like(v)
    mask[: 8 * len(padded)] = 0
    return mask * v
