"""Trainings whose steps are wrong: one corrupt batch, rates too large or too small, noise that no step removes.

Written by someone who had not seen the code under test.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from blind.data import Blobs, Images
from blind.runs import Run, pathologies

__all__ = ["SICK"]

SICK: list[Run] = []
sick = pathologies(SICK)


@sick("loss_spike", "", 125, 0.2)
def one_corrupt_batch(watch, cured):
    """A shard with targets in the wrong unit comes once, after the loss has settled; cured: repaired."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    opt = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses, g = [], torch.Generator().manual_seed(0)
    with watch(model, opt) as w:
        for step in range(160):
            x = torch.randn(64, 6, generator=g)
            y = x[:, :1] * x[:, 1:2] + x[:, 2:3]
            if step == 120 and not cured:  # cured: the shard is repaired
                y = y * 300
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("learning_rate_too_large loss_spike", "", 60, 0.5)
def sgd_far_too_fast(watch, cured):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 4),
    )
    opt = torch.optim.SGD(model.parameters(), lr=0.05 if cured else 1.5, momentum=0.9)
    data, losses = Images(), []
    with watch(model, opt) as w:
        for _ in range(200):
            x, y = data.batch(48)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("update_too_small", "", 150, 0.5)
def learning_rate_typo(watch, cured):
    """lr=1e-7 where 1e-3 was meant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 5))
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3 if cured else 1e-7)
    data, losses = Blobs(), []
    with watch(model, opt) as w:
        for _ in range(200):
            x, y = data.batch()
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("plateau", "", 10**9, 0.3)
def noisy_labels(watch, cured):
    """Half of the labels are drawn at random: the loss cannot fall below their entropy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 5))
    opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    data, losses, g = Blobs(noise=0.25), [], torch.Generator().manual_seed(3)
    with watch(model, opt) as w:
        for _ in range(600):
            x, y = data.batch(128)
            if not cured:
                flip = torch.rand(128, generator=g) < 0.6
                y = torch.where(flip, torch.randint(0, 5, (128,), generator=g), y)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("curvature learning_rate_too_large", "", 250, 0.008)
def edge_of_stability(watch, cured):
    """Full-batch gradient descent, features of very different scale, lr just under 2 / lambda_max."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(96, 5, generator=g)
    y = (z @ torch.tensor([1.0, -1.0, 0.5, 0.7, 0.3])).tanh()[:, None]
    x = z if cured else z * torch.tensor([1.5, 1.0, 0.5, 0.3, 0.2])
    model = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1))
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    with watch(model, opt) as w:
        for _ in range(400):
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses
