"""The ordinary networks of the training tasks: deep and plain, so that bad scaling is the optimiser's problem."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["Adder", "CharTransformer", "autoencoder", "convnet", "deep_mlp"]


def autoencoder(sizes: Sequence[int] = (196, 200, 100, 50, 12)) -> nn.Sequential:
    """[N, 196] -> logits [N, 196] through a code of 12: tanh layers, linear code and output (Martens, 2010)."""
    sizes = [*sizes, *reversed(sizes[:-1])]
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(sizes)):
        layers.append(_xavier(nn.Linear(before, after)))
        if i not in (len(sizes) // 2 - 1, len(sizes) - 2):
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def deep_mlp(activation: type[nn.Module], depth: int = 30, width: int = 64, inputs: int = 196) -> nn.Sequential:
    """[N, inputs] -> logits [N, 10] through ``depth`` linear layers; Glorot's start for tanh, He's for ReLU."""
    sizes = [inputs, *[width] * (depth - 1), 10]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layer = _xavier(nn.Linear(before, after))
        if activation is nn.ReLU and after != 10:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Sequential:
    """[N, 1, 28, 28] -> logits [N, 10]: four 3x3 convolutions, three of them of stride 2, and one linear layer."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 8, 2), (8, 16, 2), (16, 16, 1), (16, 32, 2)):
        layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


class Adder(nn.Module):
    """[N, T, 2] -> [N, 1]: a plain tanh recurrent layer and a linear layer on its last state."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.rnn = nn.RNN(2, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        return self.head(states[:, -1])


class CharTransformer(nn.Module):
    """Characters [N, T] -> logits [N, characters, T], each from those up to it."""

    mask: Tensor

    def __init__(self, characters: int, length: int = 64, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)
        for p in (self.characters.weight, self.places.weight):
            nn.init.normal_(p, std=0.1)
        # The encoder copies one layer: without this both layers would start equal.
        for name, p in self.encoder.named_parameters():
            if p.dim() == 2:
                nn.init.xavier_uniform_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        h = self.characters(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.encoder(h, mask=self.mask, is_causal=True)).transpose(1, 2)


def _xavier(layer: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
