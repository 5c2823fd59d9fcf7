"""A kind of layer each, between a batch of a few examples and a head: small enough for dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from problems import Problem, Unused, as_double, problem

B = 6  # examples
CLASSES = 3


class Takes(nn.Module):
    """A layer, its outputs made real vectors of an example each, and a head."""

    def __init__(self, layer: nn.Module, features: int, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(features, CLASSES)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.layer, x).flatten(1).sin())


def layer(module: nn.Module, *shape: int, call: Callable[..., Tensor] = lambda m, x: m(x)) -> Problem:
    """The layer on inputs of that shape, an example each."""
    x = torch.randn(B, *shape)
    with torch.no_grad():
        features = call(module, x).flatten(1).shape[1]
    return classes(Takes(module, features, call), x)


def tokens(model: nn.Module, length: int = 4) -> Problem:
    return classes(model, torch.randint(7, (B, length)))


def classes(model: nn.Module, x: Tensor) -> Problem:
    return Problem(model, F.cross_entropy, (x, torch.arange(B) % CLASSES))


class Reads(nn.Module):
    """Tokens, something in the middle, a head."""

    def __init__(self, middle: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, **options)
        self.middle = middle
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(x)).mean(1))


class TiedTokens(nn.Module):
    """An embedding that is the head's weight as well."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 4, padding_idx=padding)
        nn.init.normal_(self.embedding.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.embedding(x % CLASSES).tanh().mean(1), self.embedding.weight)


class TiedConvolutions(nn.Module):
    """An encoder's convolution, and the decoder's transposed one with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2, 3, 2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv_transpose1d(self.convolution(x).tanh(), self.convolution.weight).flatten(1))


class Twice(nn.Module):
    """One layer called on two halves of the input, and on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layer(x[:, :3]), self.layer(x[:, 3:])
        return self.head(self.layer((a * b).tanh()))


class Self(nn.Module):
    """Attention of an input to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class BothWays(nn.Module):
    """One attention of an input to itself and to another: its packed projection is used whole and in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x)[0]
        return self.attention(y, x.cos(), x.cos())[0]


class Cross(nn.Module):
    """Attention of an input to another of other width, or with a packed projection used in parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=width, vdim=width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        width = self.attention.kdim
        source = torch.cat([x.cos(), x], 2)[..., :width]
        return self.attention(x, source, source)[0]


class Positions(nn.Module):
    """A learned embedding of positions, and a free scale and shift."""

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(4, 4)
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(1, 4, 1))
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.head(self.layer(h * self.scale + self.shift).mean(1))


class Halved(nn.Module):
    """Examples b and b + 3 see one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h + 0.3 * h.roll(3, 0))


def packed(module: nn.RNNBase, x: Tensor, *lengths: int) -> Tensor:
    state = module(pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False))[1]
    return (state[0] if isinstance(state, tuple) else state).transpose(0, 1)


def descending(module: nn.RNNBase, x: Tensor) -> Tensor:
    return packed(module, x, 4, 4, 3, 2, 2, 1)


def mixed(module: nn.RNNBase, x: Tensor) -> Tensor:
    return packed(module, x, 4, 2, 3, 1, 4, 2)


def decoded(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x.cos())


def recurrent(module: nn.RNNBase, x: Tensor) -> Tensor:
    out = module(x if module.batch_first else x.transpose(0, 1))[0]
    return out if module.batch_first else out.transpose(0, 1)


def cell(module: nn.RNNCellBase, x: Tensor) -> Tensor:
    state: Any = None
    for t in range(x.shape[1]):
        state = module(x[:, t], state)
    return state[0] if isinstance(state, tuple) else state


def sequence_first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.transpose(0, 1)).transpose(0, 1)


# fmt: off
# Examples do not mix: a backward pass for each class is all that the exact diagonal may take.
APART: dict[str, Callable[[], Problem]] = {
    "Linear": lambda: layer(nn.Linear(5, 4), 5),
    "Linear, no bias": lambda: layer(nn.Linear(5, 4, bias=False), 5),
    "Linear on few positions": lambda: layer(nn.Linear(9, 4), 3, 9),
    "Linear on many positions": lambda: layer(nn.Linear(3, 4), 5, 3),
    "Linear on as many positions as examples": lambda: layer(nn.Linear(3, 4), B, 3),
    "Linear, examples second": lambda: layer(nn.Linear(3, 4), 5, 3, call=sequence_first),
    "Linear, folded": lambda: layer(nn.Linear(3, 4), 5, 3, call=lambda m, x: m(x.flatten(0, 1)).unflatten(0, (B, 5))),
    "Conv1d": lambda: layer(nn.Conv1d(2, 3, 3, stride=2, padding=1), 2, 7),
    "Conv1d, dilated": lambda: layer(nn.Conv1d(2, 3, 3, dilation=2, padding="same"), 2, 7),
    "Conv1d, circular": lambda: layer(nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), 2, 5),
    "Conv2d": lambda: layer(nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), 2, 5, 4),
    "Conv2d, one position": lambda: layer(nn.Conv2d(2, 3, 3), 2, 3, 3),
    "Conv2d, grouped": lambda: layer(nn.Conv2d(4, 6, 2, groups=2, bias=False), 4, 3, 3),
    "Conv2d, depthwise": lambda: layer(nn.Conv2d(3, 6, 2, groups=3), 3, 3, 3),
    "Conv2d, reflected": lambda: layer(nn.Conv2d(2, 3, 2, padding=1, padding_mode="reflect"), 2, 3, 3),
    "Conv2d, replicated": lambda: layer(nn.Conv2d(2, 3, 2, padding=1, padding_mode="replicate"), 2, 3, 3),
    "Conv3d": lambda: layer(nn.Conv3d(2, 2, 2, stride=(1, 2, 1), dilation=(1, 1, 2)), 2, 2, 4, 3),
    "ConvTranspose1d": lambda: layer(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), 2, 4),
    "ConvTranspose2d": lambda: layer(nn.ConvTranspose2d(2, 3, 2, stride=2, dilation=2), 2, 3, 2),
    "ConvTranspose2d, grouped": lambda: layer(nn.ConvTranspose2d(4, 4, 2, groups=2), 4, 2, 2),
    "ConvTranspose3d": lambda: layer(nn.ConvTranspose3d(1, 2, 2), 1, 2, 2, 2),
    "Embedding": lambda: tokens(Reads(torch.tanh)),
    "Embedding, padding": lambda: tokens(Reads(torch.tanh, padding_idx=2)),
    "Embedding, as many tokens as examples": lambda: tokens(Reads(torch.tanh), B),
    "LayerNorm": lambda: layer(nn.LayerNorm((4, 2)), 3, 4, 2),
    "RMSNorm": lambda: layer(nn.RMSNorm(4), 3, 4),
    "GroupNorm": lambda: layer(nn.GroupNorm(2, 4), 4, 3),
    "InstanceNorm": lambda: layer(nn.InstanceNorm2d(2, affine=True), 2, 3, 3),
    "BatchNorm, evaluating": lambda: layer(nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).eval(), 2, 3, 3),
    "RNN": lambda: layer(nn.RNN(3, 4, batch_first=True), 4, 3, call=recurrent),
    "RNN, as long as there are examples": lambda: layer(nn.RNN(3, 4), B, 3, call=recurrent),
    "LSTM, both ways, two layers": lambda: layer(nn.LSTM(3, 2, 2, bidirectional=True), 3, 3, call=recurrent),
    "GRU": lambda: layer(nn.GRU(3, 4, bias=False), 4, 3, call=recurrent),
    "LSTM, packed": lambda: layer(nn.LSTM(3, 2, batch_first=True), 4, 3, call=descending),
    "GRUCell": lambda: layer(nn.GRUCell(3, 4), 4, 3, call=cell),
    "LSTMCell": lambda: layer(nn.LSTMCell(3, 4), 4, 3, call=cell),
    "MultiheadAttention": lambda: layer(Self(), 3, 4),
    "MultiheadAttention, packed in parts": lambda: layer(Cross(4), 3, 4),
    "MultiheadAttention, packed, whole and in parts": lambda: layer(BothWays(), 3, 4),
    "MultiheadAttention, other widths": lambda: layer(Cross(3), 3, 4),
    "TransformerEncoderLayer": lambda: layer(nn.TransformerEncoderLayer(4, 2, 6, 0.1, batch_first=True), 3, 4),
    "TransformerEncoderLayer, examples second":
        lambda: layer(nn.TransformerEncoderLayer(4, 2, 6, 0.0), 5, 4, call=sequence_first),
    "TransformerEncoderLayer, square":
        lambda: layer(nn.TransformerEncoderLayer(4, 2, 6, 0.0, norm_first=True), B, 4, call=sequence_first),
    "TransformerDecoderLayer":
        lambda: layer(nn.TransformerDecoderLayer(4, 2, 6, 0.0, batch_first=True), 3, 4, call=decoded),
    "tied layers": lambda: few(problem("tied weights")),
    "tied embedding": lambda: tokens(TiedTokens()),
    "tied embedding, padding": lambda: tokens(TiedTokens(padding=0)),
    "tied convolution": lambda: classes(TiedConvolutions(), torch.randn(B, 2, 4)),
    "a layer called three times": lambda: classes(Twice(), torch.randn(B, 6)),
    "dropout": lambda: layer(nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 4)), 5),
    "layers in vain": lambda: classes(Unused(), torch.randn(B, 5)),
    "checkpointed": lambda: layer(
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)), 5,
        call=lambda m, x: checkpoint(m, x, use_reentrant=False),
    ),
}
# Here they do, or a parameter is used as no rule knows: the number is how many passes that takes.
MIXED: dict[str, tuple[Callable[[], Problem], int]] = {
    "BatchNorm, training": (lambda: layer(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), 5), CLASSES + CLASSES * B),
    "BatchNorm, no statistics": (lambda: layer(nn.BatchNorm2d(2, track_running_stats=False), 2, 2, 2), CLASSES),
    "halves mixed": (lambda: classes(Halved(), torch.randn(B, 5)), CLASSES + CLASSES * B),
    "LSTM, packed, sorted anew": (
        lambda: layer(nn.LSTM(3, 2, batch_first=True), 4, 3, call=mixed),
        CLASSES + CLASSES * B,
    ),
    "positions and free parameters": (lambda: tokens(Positions()), 2 * CLASSES),
    "free parameter": (lambda: few(problem("free parameter")), 2 * CLASSES),
    "weight norm": (lambda: few(problem("weight norm")), 2 * CLASSES),
    "PReLU": (lambda: layer(nn.PReLU(4), 4), 2 * CLASSES),
    "Bilinear": (lambda: layer(nn.Bilinear(2, 3, 4), 5, call=lambda m, x: m(x[:, :2], x[:, 2:])), 2 * CLASSES),
}
# fmt: on


def few(case: Problem) -> Problem:
    """The problem with its first examples only."""
    x, y = case.batch
    return Problem(case.model, case.loss_fn, (x[:B], y[:B]))


def made(make: Callable[[], Problem], seed: int = 0) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = as_double(make())
        for p in found.model.parameters():  # norms and biases leave ones and zeros
            p.data.add_(0.1 * torch.randn_like(p))
    return found
