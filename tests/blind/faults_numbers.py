"""Formulas that overflow in half precision, or whose backward is not a number.

Written by someone who had not seen the code under test.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from blind.case import collector
from gradient_faults.case import Fault

__all__ = ["FAULTS"]

FAULTS: list[Fault] = []
fault = collector(FAULTS, Fault)


# Overflow


@fault("overflow", "norm")
def rms_in_half(bad):
    """Half precision: the mean of squares overflows although its root would not."""

    class RMSNorm(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(d))

        def forward(self, x):
            z = x if bad else x.float()
            inv = torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6)
            return (z * inv).to(x.dtype) * self.gain

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp = nn.Linear(4, 8)
            self.norm = RMSNorm(8)
            self.out = nn.Linear(8, 1)

        def forward(self, x):
            return self.out(self.norm(self.inp(x)) + 0.1 * torch.tanh(self.inp(x) / 500)).float().mean()

    with torch.no_grad():
        net = Net()
        net.inp.weight.mul_(300)
    return net.half(), (2 * torch.randn(5, 4).half(),)


@fault("overflow non_finite", "act")
def mish_by_hand_in_half(bad):
    """x tanh(log(1 + e^x)): the forward is finite at x = 13 in float16, its gradient is inf / inf."""

    class Mish(nn.Module):
        def forward(self, x):
            if bad:
                return x * torch.tanh(torch.log(1 + torch.exp(x)))
            return F.mish(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.act, self.out = nn.Linear(3, 6), Mish(), nn.Linear(6, 1)

        def forward(self, x):
            return self.out(self.act(self.inp(x))).float().square().mean()

    net = Net()
    with torch.no_grad():
        net.inp.weight.mul_(8)
    return net.half(), (3 * torch.randn(8, 3).half(),)


# Non-finite


@fault("non_finite", "distance")
def distance_of_equal_points(bad):
    """Siamese: the root of zero for a pair of equal embeddings."""

    class Distance(nn.Module):
        def forward(self, a, b):
            d2 = (a - b).square().sum(-1)
            return torch.sqrt(d2 if bad else d2 + 1e-6)

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
            self.distance = Distance()

        def forward(self, a, b, same):
            d = self.distance(self.net(a), self.net(b))
            return (same * d.square() + (1 - same) * F.relu(1.5 - d).square()).mean()

    a, b = torch.randn(6, 3), torch.randn(6, 3)
    b[2] = a[2]
    return Siamese(), (a, b, torch.tensor([1.0, 0, 1, 0, 1, 0]))


@fault("non_finite", "attend")
def fully_masked_row(bad):
    """Attention over a padded set: one query sees nothing; nan_to_num hides it in the forward only."""

    class MaskedAttention(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

        def forward(self, x, mask):
            s = self.q(x) @ self.k(x).transpose(-1, -2) / x.shape[-1] ** 0.5
            if bad:
                bias = torch.zeros_like(s).masked_fill(~mask, float("-inf"))
                w = torch.nan_to_num((s + bias).softmax(-1))
            else:
                w = s.masked_fill(~mask, -1e9).softmax(-1) * mask
            return w @ self.v(x)

    class SetModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(2, 6)
            self.attend = MaskedAttention(6)
            self.read = nn.Linear(6, 1)

        def forward(self, x, mask):
            h = self.embed(x)
            return self.read((h + self.attend(h, mask)).mean(1)).square().mean()

    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    mask[1, 3] = False
    mask[2, :, 2] = False
    return SetModel(), (torch.randn(3, 4, 2), mask)
