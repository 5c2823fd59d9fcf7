"""Layers without weights: activations, dropout, pooling, padding, reshaping, resizing, distances.

Inputs are far from the kinks, and on both sides of each.
"""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from covered.subject import Table, apart, fed, near, spread

__all__ = ["ACTIVATIONS", "DISTANCES", "DROPOUT", "PADDING", "POOLING", "SHAPES"]

# fmt: off
ACTIVATIONS: Table = {
    "CELU": lambda: fed(nn.CELU(1.3), spread(6)),
    "ELU": lambda: fed(nn.ELU(0.7), spread(6)),
    "GELU": lambda: fed(nn.GELU(), spread(6)),
    "GELU, tanh": lambda: fed(nn.GELU(approximate="tanh"), spread(6)),
    "GLU": lambda: fed(nn.GLU(0), spread(6, 2)),
    "Hardshrink": lambda: fed(nn.Hardshrink(), spread(6)),
    "Hardsigmoid": lambda: fed(nn.Hardsigmoid(), spread(6, width=4.5)),
    "Hardswish": lambda: fed(nn.Hardswish(), spread(6, width=4.5)),
    "Hardtanh": lambda: fed(nn.Hardtanh(), spread(6)),
    "LeakyReLU": lambda: fed(nn.LeakyReLU(0.2), spread(6)),
    "LogSigmoid": lambda: fed(nn.LogSigmoid(), spread(6)),
    "LogSoftmax": lambda: fed(nn.LogSoftmax(1), spread(2, 4)),
    "Mish": lambda: fed(nn.Mish(), spread(6)),
    "PReLU": lambda: fed(nn.PReLU(3), spread(2, 3, 2)),
    "RReLU, training": lambda: fed(nn.RReLU(), spread(6)),
    "RReLU, evaluating": lambda: fed(nn.RReLU().eval(), spread(6)),
    "ReLU": lambda: fed(nn.ReLU(), spread(6)),
    "ReLU, in place": lambda: fed(nn.ReLU(inplace=True), spread(6)),
    "ReLU6": lambda: fed(nn.ReLU6(), spread(6, width=8)),
    "SELU": lambda: fed(nn.SELU(), spread(6)),
    "SiLU": lambda: fed(nn.SiLU(), spread(6)),
    "SiLU, in place": lambda: fed(nn.SiLU(inplace=True), spread(6)),
    "Sigmoid": lambda: fed(nn.Sigmoid(), spread(6)),
    "Softmax": lambda: fed(nn.Softmax(1), spread(2, 4)),
    "Softmax2d": lambda: fed(nn.Softmax2d(), spread(1, 3, 2, 2)),
    "Softmin": lambda: fed(nn.Softmin(1), spread(2, 4)),
    "Softplus": lambda: fed(nn.Softplus(beta=2, threshold=2), spread(6)),
    "Softshrink": lambda: fed(nn.Softshrink(), spread(6)),
    "Softsign": lambda: fed(nn.Softsign(), spread(6)),
    "Tanh": lambda: fed(nn.Tanh(), spread(6)),
    "Tanhshrink": lambda: fed(nn.Tanhshrink(), spread(6)),
    "Threshold": lambda: fed(nn.Threshold(0.4, -1.0), spread(6)),
}

DROPOUT: Table = {
    "AlphaDropout": lambda: fed(nn.AlphaDropout(0.4), spread(8)),
    "Dropout": lambda: fed(nn.Dropout(0.4), spread(8)),
    "Dropout, in place": lambda: fed(nn.Dropout(0.4, inplace=True), spread(8)),
    "Dropout, evaluating": lambda: fed(nn.Dropout(0.4).eval(), spread(8)),
    "Dropout1d": lambda: fed(nn.Dropout1d(0.4), spread(2, 4, 2)),
    "Dropout2d": lambda: fed(nn.Dropout2d(0.4), spread(1, 6, 1, 2)),
    "Dropout3d": lambda: fed(nn.Dropout3d(0.4), spread(1, 6, 1, 1, 2)),
    "FeatureAlphaDropout": lambda: fed(nn.FeatureAlphaDropout(0.4), spread(1, 6, 1, 2)),
}

POOLING: Table = {
    "AdaptiveAvgPool1d": lambda: fed(nn.AdaptiveAvgPool1d(2), spread(2, 5)),
    "AdaptiveAvgPool2d": lambda: fed(nn.AdaptiveAvgPool2d(2), spread(1, 3, 4)),
    "AdaptiveAvgPool3d": lambda: fed(nn.AdaptiveAvgPool3d(2), spread(1, 3, 2, 3)),
    "AdaptiveMaxPool1d": lambda: fed(nn.AdaptiveMaxPool1d(2), spread(2, 5)),
    "AdaptiveMaxPool2d": lambda: fed(nn.AdaptiveMaxPool2d(2), spread(1, 3, 4)),
    "AdaptiveMaxPool3d": lambda: fed(nn.AdaptiveMaxPool3d(2), spread(1, 3, 2, 3)),
    "AvgPool1d": lambda: fed(nn.AvgPool1d(2, padding=1), spread(2, 5)),
    "AvgPool2d": lambda: fed(nn.AvgPool2d(2, 1), spread(1, 3, 4)),
    "AvgPool3d": lambda: fed(nn.AvgPool3d(2, 1), spread(1, 3, 2, 3)),
    "FractionalMaxPool2d": lambda: fed(nn.FractionalMaxPool2d(2, 2), spread(1, 4, 4)),
    "FractionalMaxPool3d": lambda: fed(nn.FractionalMaxPool3d((1, 2, 2), 2), spread(1, 3, 4, 4)),
    "LPPool1d": lambda: fed(nn.LPPool1d(3, 2), near(1, 2, 4)),
    "LPPool2d": lambda: fed(nn.LPPool2d(2, 2, 1), near(1, 1, 3, 3)),
    "LPPool3d": lambda: fed(nn.LPPool3d(2, 2, 1), near(1, 1, 3, 2, 3)),
    "MaxPool1d": lambda: fed(nn.MaxPool1d(2), spread(2, 6)),
    "MaxPool2d": lambda: fed(nn.MaxPool2d(2, 1), spread(1, 3, 4)),
    "MaxPool2d, dilated": lambda: fed(nn.MaxPool2d(2, 1, 1, dilation=2), spread(1, 3, 4)),
    "MaxPool3d": lambda: fed(nn.MaxPool3d(2, 1), spread(1, 3, 2, 3)),
    "MaxUnpool1d": lambda: fed(lambda x: nn.MaxUnpool1d(2)(*F.max_pool1d(x, 2, return_indices=True)), spread(2, 6)),
    "MaxUnpool2d": lambda: fed(lambda x: nn.MaxUnpool2d(2)(*F.max_pool2d(x, 2, return_indices=True)), spread(1, 4, 4)),
    "MaxUnpool3d":
        lambda: fed(lambda x: nn.MaxUnpool3d(2)(*F.max_pool3d(x, 2, return_indices=True)), spread(1, 2, 4, 2)),
}

PADDING: Table = {
    "CircularPad1d": lambda: fed(nn.CircularPad1d((1, 2)), spread(2, 4)),
    "CircularPad2d": lambda: fed(nn.CircularPad2d(1), spread(1, 3, 2)),
    "CircularPad3d": lambda: fed(nn.CircularPad3d(1), spread(1, 2, 3, 2)),
    "ConstantPad1d": lambda: fed(nn.ConstantPad1d((1, 2), 0.7), spread(2, 4)),
    "ConstantPad2d": lambda: fed(nn.ConstantPad2d((1, -1, 0, 1), 0.7), spread(1, 3, 3)),
    "ConstantPad3d": lambda: fed(nn.ConstantPad3d(1, 0.7), spread(1, 2, 3, 2)),
    "ReflectionPad1d": lambda: fed(nn.ReflectionPad1d((1, 2)), spread(2, 4)),
    "ReflectionPad2d": lambda: fed(nn.ReflectionPad2d(1), spread(1, 3, 3)),
    "ReflectionPad3d": lambda: fed(nn.ReflectionPad3d(1), spread(1, 2, 3, 2)),
    "ReplicationPad1d": lambda: fed(nn.ReplicationPad1d((1, 2)), spread(2, 4)),
    "ReplicationPad2d": lambda: fed(nn.ReplicationPad2d(1), spread(1, 3, 3)),
    "ReplicationPad3d": lambda: fed(nn.ReplicationPad3d(1), spread(1, 2, 3, 2)),
    "ZeroPad1d": lambda: fed(nn.ZeroPad1d((1, 2)), spread(2, 4)),
    "ZeroPad2d": lambda: fed(nn.ZeroPad2d(1), spread(1, 3, 3)),
    "ZeroPad3d": lambda: fed(nn.ZeroPad3d(1), spread(1, 2, 3, 2)),
}

SHAPES: Table = {
    "ChannelShuffle": lambda: fed(nn.ChannelShuffle(2), spread(1, 4, 2, 2)),
    "Flatten": lambda: fed(nn.Flatten(), spread(2, 3, 2)),
    "Fold": lambda: fed(nn.Fold((3, 3), 2), spread(4, 4)),
    "Identity": lambda: fed(nn.Identity(), spread(6)),
    "PixelShuffle": lambda: fed(nn.PixelShuffle(2), spread(1, 4, 2, 2)),
    "PixelUnshuffle": lambda: fed(nn.PixelUnshuffle(2), spread(1, 1, 4, 2)),
    "Unflatten": lambda: fed(nn.Unflatten(1, (3, 2)), spread(2, 6)),
    "Unfold": lambda: fed(nn.Unfold(2), spread(1, 2, 3, 3)),
    "Upsample, nearest": lambda: fed(nn.Upsample(scale_factor=2), spread(1, 2, 2, 2)),
    "Upsample, linear": lambda: fed(nn.Upsample(5, mode="linear"), spread(1, 2, 3)),
    "Upsample, bilinear": lambda: fed(nn.Upsample(scale_factor=2, mode="bilinear"), spread(1, 2, 2, 2)),
    "Upsample, bicubic": lambda: fed(nn.Upsample(5, mode="bicubic", align_corners=True), spread(1, 1, 3, 3)),
    "Upsample, trilinear": lambda: fed(nn.Upsample(3, mode="trilinear"), spread(1, 1, 2, 2, 2)),
    "UpsamplingBilinear2d": lambda: fed(nn.UpsamplingBilinear2d(3), spread(1, 2, 2, 2)),
    "UpsamplingNearest2d": lambda: fed(nn.UpsamplingNearest2d(3), spread(1, 2, 2, 2)),
}

DISTANCES: Table = {
    "CosineSimilarity": lambda: fed(nn.CosineSimilarity(), *apart((2, 3), (2, 3))),
    "PairwiseDistance": lambda: fed(nn.PairwiseDistance(), *apart((2, 3), (2, 3))),
    "PairwiseDistance, p = 1": lambda: fed(nn.PairwiseDistance(1), *apart((2, 3), (2, 3))),
    "PairwiseDistance, p = 3": lambda: fed(nn.PairwiseDistance(3.0), *apart((2, 3), (2, 3))),
}
# fmt: on
