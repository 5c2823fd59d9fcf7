"""Trainings lost to numbers: underflow, rounding, division by zero, the root of zero.

Written by someone who had not seen the code under test.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from blind.data import Blobs
from blind.runs import Run, pathologies

__all__ = ["SICK"]

SICK: list[Run] = []
sick = pathologies(SICK)


@sick("underflow", "body* inp* out* act* Net*", 60, 1.2e-6)
def half_without_scaling(watch, cured):
    """float16 autocast, a loss term weighted by 1e-4, no loss scaling: the deltas fall below 6e-8."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp = nn.Linear(8, 64)
            self.body = nn.Sequential(nn.GELU(), nn.Linear(64, 64), nn.GELU())
            self.out = nn.Linear(64, 8)

        def forward(self, x):
            return self.out(self.body(self.inp(x)))

    model, losses, g = Net(), [], torch.Generator().manual_seed(0)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-12)
    a = torch.randn(8, 8, generator=g) / 8**0.5
    scale = 2.0**14 if cured else 1.0
    with watch(model, opt) as w:
        for _ in range(400):
            x = torch.randn(256, 8, generator=g)
            y = torch.sin(2 * x[:, :1] + x[:, 1:2] * a[:1])
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(x)
            loss = 1e-4 * F.mse_loss(out.float(), y)
            (loss * scale).backward()
            for p in model.parameters():
                p.grad.div_(scale)
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("stagnant_update", "", 120, 0.6)
def pure_bfloat16(watch, cured):
    """bfloat16 weights and a small learning rate: most updates are rounded away. Cured: float32 weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    if not cured:
        model = model.bfloat16()
    opt = torch.optim.SGD(model.parameters(), lr=4e-3, momentum=0.0)
    data, losses = Blobs(), []
    with watch(model, opt) as w:
        for _ in range(500):
            x, y = data.batch(128)
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(x)
            loss = F.cross_entropy(out.float(), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("non_finite", "normalise*", 41, 0.2)
def empty_row_forward(watch, cured):
    """Counts are divided by their sum; one document is empty."""
    torch.manual_seed(0)

    class Frequencies(nn.Module):
        def forward(self, x):
            return x / x.sum(-1, keepdim=True).clamp_min(1.0 if cured else 0.0)

    class Doc(nn.Module):
        def __init__(self):
            super().__init__()
            self.normalise = Frequencies()
            self.body = nn.Sequential(nn.Linear(20, 32), nn.ReLU())
            self.out = nn.Linear(32, 2)

        def forward(self, x):
            return self.out(self.body(20 * self.normalise(x)))

    model, losses, g = Doc(), [], torch.Generator().manual_seed(0)
    rate = torch.stack((torch.linspace(0.2, 1.5, 20), torch.linspace(1.5, 0.2, 20)))
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    with watch(model, opt) as w:
        for step in range(80):
            y = torch.randint(0, 2, (32,), generator=g)
            x = torch.poisson(rate[y], generator=g)
            if step == 40:
                x[5] = 0
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("non_finite", "metric*", 31, 0.1)
def root_of_zero_backward(watch, cured):
    """Metric learning: a duplicate pair makes the distance exactly zero; only the backward is not finite."""
    torch.manual_seed(0)

    class Metric(nn.Module):
        def forward(self, a, b):
            return ((a - b).square().sum(-1) + (1e-8 if cured else 0.0)).sqrt()

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8))
            self.metric = Metric()

        def forward(self, a, b):
            return self.metric(self.net(a), self.net(b))

    model, losses, g = Siamese(), [], torch.Generator().manual_seed(0)
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    with watch(model, opt) as w:
        for step in range(80):
            a, b = torch.randn(32, 8, generator=g), torch.randn(32, 8, generator=g)
            same = torch.rand(32, generator=g) < 0.5
            b[same] = a[same] + 0.1 * b[same]
            if step == 30:
                same[3], b[3] = True, a[3]
            d = model(a, b)
            loss = torch.where(same, d.square(), F.relu(1 - d).square()).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses
