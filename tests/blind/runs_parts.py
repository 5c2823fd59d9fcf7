"""Trainings of which a part does not learn: detached, forgotten, starved, or drowned by the weights it shares.

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


@sick("no_gradient", "encoder*", 30, 0.3)
def encoder_left_detached(watch, cured):
    torch.manual_seed(0)

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            z = self.encoder(x)
            if not cured:
                z = z.detach()
            return self.head(z)

    model, data, losses = Probe(), Blobs(noise=0.3), []
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
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


@sick("no_gradient", "side*", 30, 0.02)
def branch_never_called(watch, cured):
    """A second input's projection is built, optimised, and forgotten in the forward."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Sequential(nn.Linear(5, 16), nn.SiLU())
            self.side = nn.Sequential(nn.Linear(5, 16), nn.SiLU())
            self.out = nn.Linear(16, 1)

        def forward(self, a, b):
            h = self.main(a)
            if cured:
                h = h + self.side(b)
            return self.out(h).squeeze(-1)

    model, losses, g = Two(), [], torch.Generator().manual_seed(0)
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    with watch(model, opt) as w:
        for _ in range(200):
            a, b = torch.randn(64, 5, generator=g), torch.randn(64, 5, generator=g)
            loss = F.mse_loss(model(a, b), a[:, 0] + 0.7 * b[:, 1])
            opt.zero_grad()
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("starved_branch", "audio*", 200, 0.25)
def weak_tower(watch, cured):
    """Two modalities are summed; the second one's inputs come in units a thousand times too small."""
    torch.manual_seed(0)

    class Fusion(nn.Module):
        def __init__(self):
            super().__init__()
            self.image = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16))
            self.audio = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16))
            self.head = nn.Linear(32, 4)

        def forward(self, image, audio):
            return self.head(F.relu(torch.cat((self.image(image), self.audio(audio)), -1)))

    model, losses, g = Fusion(), [], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in (model.audio[0], model.audio[2]):
            m.bias.zero_()
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with watch(model, opt) as w:
        for _ in range(300):
            image, audio = torch.randn(64, 12, generator=g), torch.randn(64, 8, generator=g)
            y = (image[:, 0] > 0).long() * 2 + (audio[:, 0] + audio[:, 1] > 0).long()
            if not cured:
                audio = audio * 1e-3
            opt.zero_grad()
            loss = F.cross_entropy(model(image, audio), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("tied_imbalance", "embed* head*", 150, 1.3)
def tied_embedding_drowned(watch, cured):
    """Embedding and output share a matrix; the input side enters multiplied by a thousandth."""
    torch.manual_seed(0)

    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.rnn = nn.GRU(16, 16, batch_first=True)
            self.head = nn.Linear(16, 20, bias=False)
            nn.init.normal_(self.embed.weight, std=0.25)
            self.head.weight = self.embed.weight

        def forward(self, t):
            x = self.embed(t)
            return self.head(self.rnn(x * (4.0 if cured else 1e-3))[0])

    model, losses, g = LM(), [], torch.Generator().manual_seed(0)
    table = torch.stack([torch.randperm(20, generator=g)[:2] for _ in range(20)])  # each token has two followers
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    with watch(model, opt) as w:
        for _ in range(200):
            t = torch.randint(0, 20, (24, 1), generator=g)
            for _ in range(10):
                pick = torch.randint(0, 2, (24,), generator=g)
                t = torch.cat((t, table[t[:, -1], pick][:, None]), 1)
            opt.zero_grad()
            loss = F.cross_entropy(model(t[:, :-1]).flatten(0, 1), t[:, 1:].flatten())
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses
