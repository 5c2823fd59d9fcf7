"""Layers with weights: linear, convolution, norms, recurrent, attention and transformer, embeddings, parametrised."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations as new

from covered.subject import Subject, Table, fed, read, spread

__all__ = ["ATTENTION", "CONVOLUTION", "EMBEDDING", "LINEAR", "NORM", "PARAMETRISED", "RECURRENT"]

# fmt: off
LINEAR: Table = {
    "Linear": lambda: fed(nn.Linear(3, 2), spread(2, 3)),
    "LazyLinear": lambda: fed(nn.LazyLinear(2), spread(2, 3)),
    "Bilinear": lambda: fed(nn.Bilinear(2, 3, 2), spread(2, 2), spread(2, 3)),
}

CONVOLUTION: Table = {
    "Conv1d": lambda: fed(nn.Conv1d(2, 2, 2, stride=2, padding=1), spread(2, 2, 4)),
    "Conv1d, no batch": lambda: fed(nn.Conv1d(2, 2, 2), spread(2, 4)),
    "Conv2d": lambda: fed(nn.Conv2d(1, 2, 2), spread(1, 1, 3, 4)),
    "Conv2d, grouped and dilated": lambda: fed(nn.Conv2d(2, 4, 2, dilation=2, groups=2), spread(1, 2, 3, 4)),
    "Conv2d, depthwise": lambda: fed(nn.Conv2d(3, 3, 2, groups=3), spread(1, 3, 3, 2)),
    "Conv2d, same padding": lambda: fed(nn.Conv2d(1, 2, 3, padding="same"), spread(1, 1, 3, 3)),
    "Conv2d, reflected": lambda: fed(nn.Conv2d(1, 2, 2, padding=1, padding_mode="reflect"), spread(1, 1, 3, 3)),
    "Conv2d, circular": lambda: fed(nn.Conv2d(1, 2, 2, padding=1, padding_mode="circular"), spread(1, 1, 3, 3)),
    "Conv3d": lambda: fed(nn.Conv3d(1, 2, 2), spread(1, 1, 2, 3, 2)),
    "ConvTranspose1d": lambda: fed(nn.ConvTranspose1d(2, 2, 2, stride=2, output_padding=1), spread(1, 2, 3)),
    "ConvTranspose2d": lambda: fed(nn.ConvTranspose2d(1, 2, 2, padding=1), spread(1, 1, 3, 3)),
    "ConvTranspose2d, grouped": lambda: fed(nn.ConvTranspose2d(2, 2, 2, groups=2), spread(1, 2, 2, 2)),
    "ConvTranspose3d": lambda: fed(nn.ConvTranspose3d(1, 1, 2), spread(1, 1, 2, 2, 2)),
    "LazyConv1d": lambda: fed(nn.LazyConv1d(2, 2), spread(2, 2, 3)),
    "LazyConv2d": lambda: fed(nn.LazyConv2d(2, 2), spread(1, 1, 3, 3)),
    "LazyConv3d": lambda: fed(nn.LazyConv3d(2, 2), spread(1, 1, 2, 3, 2)),
    "LazyConvTranspose1d": lambda: fed(nn.LazyConvTranspose1d(2, 2), spread(1, 2, 3)),
    "LazyConvTranspose2d": lambda: fed(nn.LazyConvTranspose2d(2, 2), spread(1, 1, 2, 2)),
    "LazyConvTranspose3d": lambda: fed(nn.LazyConvTranspose3d(1, 2), spread(1, 1, 2, 2, 2)),
}

NORM: Table = {
    "BatchNorm1d": lambda: fed(nn.BatchNorm1d(3), spread(4, 3)),
    "BatchNorm1d, behind a Linear": lambda: fed(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), spread(4, 2)),
    "BatchNorm1d, evaluating": lambda: fed(nn.BatchNorm1d(3).eval(), spread(4, 3)),
    "BatchNorm1d, no running statistics": lambda: fed(nn.BatchNorm1d(3, track_running_stats=False), spread(4, 3)),
    "BatchNorm2d": lambda: fed(nn.BatchNorm2d(2), spread(2, 2, 2, 2)),
    "BatchNorm2d, behind a Conv2d":
        lambda: fed(nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2)), spread(2, 1, 3, 3)),
    "BatchNorm3d": lambda: fed(nn.BatchNorm3d(2), spread(2, 2, 1, 2, 2)),
    "GroupNorm": lambda: fed(nn.GroupNorm(2, 4), spread(2, 4, 3)),
    "InstanceNorm1d": lambda: fed(nn.InstanceNorm1d(2, affine=True), spread(2, 2, 4)),
    "InstanceNorm1d, running statistics":
        lambda: fed(nn.InstanceNorm1d(2, affine=True, track_running_stats=True), spread(2, 2, 4)),
    "InstanceNorm2d": lambda: fed(nn.InstanceNorm2d(2, affine=True), spread(1, 2, 2, 3)),
    "InstanceNorm3d": lambda: fed(nn.InstanceNorm3d(2, affine=True), spread(1, 2, 1, 2, 3)),
    "CrossMapLRN2d": lambda: fed(nn.CrossMapLRN2d(3, alpha=0.5), spread(1, 4, 2, 1)),
    "LayerNorm": lambda: fed(nn.LayerNorm(4), spread(3, 4)),
    "LayerNorm, behind a Linear": lambda: fed(nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4)), spread(3, 2)),
    "LayerNorm, no weights": lambda: fed(nn.LayerNorm((2, 3), elementwise_affine=False), spread(2, 2, 3)),
    "LazyBatchNorm1d": lambda: fed(nn.LazyBatchNorm1d(), spread(4, 3)),
    "LazyBatchNorm2d": lambda: fed(nn.LazyBatchNorm2d(), spread(2, 2, 2, 2)),
    "LazyBatchNorm3d": lambda: fed(nn.LazyBatchNorm3d(), spread(2, 2, 1, 2, 2)),
    "LazyInstanceNorm1d": lambda: fed(nn.LazyInstanceNorm1d(affine=True), spread(2, 2, 4)),
    "LazyInstanceNorm2d": lambda: fed(nn.LazyInstanceNorm2d(affine=True), spread(1, 2, 2, 3)),
    "LazyInstanceNorm3d": lambda: fed(nn.LazyInstanceNorm3d(affine=True), spread(1, 2, 1, 2, 3)),
    "LocalResponseNorm": lambda: fed(nn.LocalResponseNorm(2, alpha=0.5), spread(1, 4, 3)),
    "RMSNorm": lambda: fed(nn.RMSNorm(4), spread(3, 4)),
    "SyncBatchNorm, evaluating": lambda: fed(nn.SyncBatchNorm(3).eval(), spread(4, 3)),
}
# fmt: on


class Packed(nn.Module):
    """A recurrent layer on sequences of different lengths."""

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 1]), batch_first=True)
        return self.cell(packed)[0].data


class LastCell(nn.Module):
    def __init__(self, cell: nn.LSTM) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[1][1]


def first(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


# fmt: off
RECURRENT: Table = {
    "RNN, tanh": lambda: fed(nn.RNN(2, 2), spread(3, 1, 2), take=first),
    "RNN, relu, two layers": lambda: fed(nn.RNN(1, 2, 2, nonlinearity="relu"), spread(3, 1, 1), take=first),
    "GRU": lambda: fed(nn.GRU(2, 2), spread(3, 1, 2), take=first),
    "GRU, both directions": lambda: fed(nn.GRU(1, 1, bidirectional=True), spread(3, 2, 1), take=first),
    "GRU, packed": lambda: fed(Packed(nn.GRU(1, 2, batch_first=True)), spread(2, 3, 1)),
    "LSTM": lambda: fed(nn.LSTM(1, 2), spread(3, 1, 1), take=first),
    "LSTM, last cell state": lambda: fed(LastCell(nn.LSTM(1, 2)), spread(3, 1, 1)),
    "LSTM, two layers, dropout": lambda: fed(nn.LSTM(1, 1, 2, dropout=0.4), spread(3, 2, 1), take=first),
    "LSTM, projected": lambda: fed(nn.LSTM(1, 2, proj_size=1), spread(3, 1, 1), take=first),
    "LSTM, packed": lambda: fed(Packed(nn.LSTM(1, 2, batch_first=True)), spread(2, 3, 1)),
    "RNNCell": lambda: fed(nn.RNNCell(2, 2), spread(2, 2), spread(2, 2)),
    "GRUCell": lambda: fed(nn.GRUCell(2, 2), spread(2, 2), spread(2, 2)),
    "LSTMCell": lambda: fed(nn.LSTMCell(2, 2), spread(2, 2), take=first),
}
# fmt: on


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, with whatever is passed on to it."""

    def __init__(self, weights: bool = False, **options: object) -> None:
        super().__init__()
        heads = nn.MultiheadAttention(2, 2, batch_first=True, **options)  # type: ignore[arg-type]
        self.attention, self.weights = heads, weights

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attention(x, x, x, need_weights=self.weights, attn_mask=mask)[0]


class Causal(nn.Module):
    """A layer that takes a mask, under the causal one."""

    def __init__(self, layer: nn.Module, name: str = "mask") -> None:
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, *x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x[0].shape[1], dtype=x[0].dtype)
        return self.layer(*x, **{self.name: mask})


def encoder_layer(**options: object) -> nn.TransformerEncoderLayer:
    settings = {"dropout": 0.0, "batch_first": True, **options}
    return nn.TransformerEncoderLayer(3, 1, 2, **settings)  # type: ignore[arg-type]


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 2, dropout=0.0, batch_first=True), 1)


class Padded(nn.Module):
    """The layer may skip the last position of the second sequence, by nested tensors."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, src_key_padding_mask=torch.tensor([[False, False], [False, True]]))[:, :1]


def decoder_layer() -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(3, 1, 2, dropout=0.0, batch_first=True, activation="gelu")


def transformer() -> nn.Transformer:
    return nn.Transformer(4, 2, 1, 1, 2, dropout=0.0, batch_first=True, activation="gelu")


# fmt: off
ATTENTION: Table = {
    "MultiheadAttention, fused": lambda: fed(SelfAttention(), spread(1, 3, 2)),
    "MultiheadAttention, with weights": lambda: fed(SelfAttention(weights=True), spread(1, 3, 2)),
    "MultiheadAttention, causal": lambda: fed(Causal(SelfAttention()), spread(1, 3, 2)),
    "MultiheadAttention, dropout": lambda: fed(SelfAttention(dropout=0.3), spread(1, 3, 2)),
    "MultiheadAttention, key bias": lambda: fed(SelfAttention(add_bias_kv=True, add_zero_attn=True), spread(1, 2, 2)),
    "MultiheadAttention, other widths": lambda: fed(
        nn.MultiheadAttention(2, 1, kdim=1, vdim=1), spread(2, 1, 2), spread(3, 1, 1), spread(3, 1, 1), take=first
    ),
    "TransformerEncoderLayer": lambda: fed(encoder_layer(), spread(1, 3, 3)),
    "TransformerEncoderLayer, norm first, gelu":
        lambda: fed(encoder_layer(norm_first=True, activation="gelu"), spread(1, 3, 3)),
    "TransformerEncoderLayer, dropout": lambda: fed(encoder_layer(dropout=0.2), spread(1, 3, 3)),
    "TransformerEncoderLayer, evaluating": lambda: fed(encoder_layer().eval(), spread(1, 3, 3)),
    "TransformerEncoderLayer, causal": lambda: fed(Causal(encoder_layer(), "src_mask"), spread(1, 3, 3)),
    "TransformerEncoder":
        lambda: fed(nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False), spread(1, 2, 3)),
    "TransformerEncoder, evaluating, padded": lambda: fed(Padded(encoder().eval()), spread(2, 2, 4)),
    "TransformerDecoderLayer": lambda: fed(decoder_layer(), spread(1, 2, 3), spread(1, 2, 3)),
    "TransformerDecoder": lambda: fed(nn.TransformerDecoder(decoder_layer(), 1), spread(1, 2, 3), spread(1, 2, 3)),
    "Transformer": lambda: fed(transformer(), spread(1, 2, 4), spread(1, 2, 4)),
}
# fmt: on

TOKENS = torch.tensor([[1, 2, 0], [3, 1, 1]])


class WithoutPadding(nn.Module):
    """An embedding whose row 0 does not move, which is what ``padding_idx=0`` means."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.register_buffer("row", embedding.weight.detach()[:1].clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, torch.cat([self.row, self.weight[1:]]))


class Summed(nn.Module):
    """Every token meets those before it."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x).cumsum(1).sin()


def padded() -> Subject:
    embedding = nn.Embedding(4, 2, padding_idx=0)
    subject = read(Summed(embedding), TOKENS)
    return subject._replace(plain=subject._replace(model=Summed(WithoutPadding(embedding))))


# fmt: off
EMBEDDING: Table = {
    "Embedding": lambda: read(Summed(nn.Embedding(4, 2)), TOKENS),
    "Embedding, padding_idx": padded,
    "Embedding, max_norm": lambda: read(Summed(nn.Embedding(4, 2, max_norm=9.0)), TOKENS),
    "Embedding, sparse": lambda: read(Summed(nn.Embedding(4, 2, sparse=True)), TOKENS),
    "EmbeddingBag, mean": lambda: read(nn.EmbeddingBag(4, 2), TOKENS),
    "EmbeddingBag, sum": lambda: read(nn.EmbeddingBag(4, 2, mode="sum"), TOKENS),
    "EmbeddingBag, max": lambda: read(nn.EmbeddingBag(4, 2, mode="max"), TOKENS),
}
# fmt: on


def hooked(norm: Callable[..., nn.Module], layer: nn.Module, **options: object) -> nn.Module:
    """The older norms, by forward pre-hooks, which torch calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return norm(layer, **options)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def parametrized() -> nn.Module:
    layer = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


# fmt: off
PARAMETRISED: Table = {
    "weight_norm": lambda: fed(new.weight_norm(nn.Linear(3, 2)), spread(2, 3)),
    "weight_norm, dim=None": lambda: fed(new.weight_norm(nn.Linear(3, 2), dim=None), spread(2, 3)),
    "weight_norm, Conv2d": lambda: fed(new.weight_norm(nn.Conv2d(1, 2, 2)), spread(1, 1, 3, 3)),
    "weight_norm, by hook": lambda: fed(hooked(nn.utils.weight_norm, nn.Linear(3, 2)), spread(2, 3)),
    "spectral_norm, evaluating": lambda: fed(new.spectral_norm(nn.Linear(3, 2)).eval(), spread(2, 3)),
    "spectral_norm, by hook, evaluating":
        lambda: fed(hooked(nn.utils.spectral_norm, nn.Linear(3, 2)).eval(), spread(2, 3)),
    "orthogonal, matrix_exp": lambda: fed(new.orthogonal(nn.Linear(3, 3), orthogonal_map="matrix_exp"), spread(2, 3)),
    "orthogonal, cayley": lambda: fed(new.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"), spread(2, 3)),
    "orthogonal, householder": lambda: fed(new.orthogonal(nn.Linear(2, 3), orthogonal_map="householder"), spread(2, 2)),
    "a parametrization of one's own": lambda: fed(parametrized(), spread(2, 3)),
}
# fmt: on
