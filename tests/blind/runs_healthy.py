"""Trainings that go well and look suspicious: noise, warm-up, zeros, tiny units, convergence, frozen and sparse parts.

Written by someone who had not seen the code under test.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from blind.data import Blobs, Images
from blind.runs import Run, healthy

__all__ = ["HEALTHY"]

HEALTHY: list[Run] = []
well = healthy(HEALTHY)


@well(0.3)
def small_convnet_adam(watch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 4),
    )
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    data, losses = Images(), []
    with watch(model, opt) as w:
        for _ in range(150):
            x, y = data.batch()
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@well(1.2)
def lstm_language_model(watch):
    torch.manual_seed(0)

    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.rnn, self.o = nn.Embedding(20, 16), nn.LSTM(16, 48, batch_first=True), nn.Linear(48, 20)

        def forward(self, t):
            return self.o(self.rnn(self.e(t))[0])

    model, losses, g = LM(), [], torch.Generator().manual_seed(0)
    table = torch.stack([torch.randperm(20, generator=g)[:2] for _ in range(20)])
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with watch(model, opt) as w:
        for _ in range(200):
            t = torch.randint(0, 20, (24, 1), generator=g)
            for _ in range(14):
                t = torch.cat((t, table[t[:, -1], torch.randint(0, 2, (24,), generator=g)][:, None]), 1)
            opt.zero_grad()
            loss = F.cross_entropy(model(t[:, :-1]).flatten(0, 1), t[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@well(0.3)
def pre_norm_transformer_warmup(watch):
    """Zero-initialised head, linear warm-up, cosine decay, key biases."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 24)
            layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True, norm_first=True)
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(24, 10)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

        def forward(self, t):
            return self.head(self.body(self.embed(t)).mean(1))

    model, losses, g = Net(), [], torch.Generator().manual_seed(0)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    n = 250
    sched = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min((s + 1) / 30, 0.5 * (1 + math.cos(math.pi * min(s / n, 1.0))))
    )
    with watch(model, opt) as w:
        for _ in range(n):
            t = torch.randint(0, 10, (48, 8), generator=g)
            y = torch.randint(0, 10, (48,), generator=g)
            t[torch.arange(48)[:, None], torch.stack([torch.randperm(8, generator=g)[:4] for _ in range(48)])] = y[
                :, None
            ]
            opt.zero_grad()
            loss = F.cross_entropy(model(t), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            sched.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@well(0.4)
def frozen_backbone(watch):
    torch.manual_seed(0)

    class Tune(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
            self.head = nn.Linear(64, 5)

        def forward(self, x):
            with torch.no_grad():
                h = self.backbone(x)
            return self.head(h)

    model = Tune()
    model.backbone.requires_grad_(False)
    opt = torch.optim.Adam(model.head.parameters(), lr=1e-2)
    data, losses = Blobs(), []
    with watch(model, opt) as w:
        for _ in range(250):
            x, y = data.batch()
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@well(0.45)
def sparse_vocabulary(watch):
    """A vocabulary of thousands of which a batch sees a handful; two optimisers."""
    torch.manual_seed(0)

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.EmbeddingBag(3000, 16, sparse=True)
            self.out = nn.Linear(16, 2)

        def forward(self, t):
            return self.out(self.words(t))

    model, losses, g = Bag(), [], torch.Generator().manual_seed(0)
    one = torch.optim.SparseAdam(model.words.parameters(), lr=0.03)
    two = torch.optim.Adam(model.out.parameters(), lr=0.01)
    with watch(model) as w:
        for _ in range(200):
            y = torch.randint(0, 2, (32,), generator=g)
            t = torch.randint(0, 40, (32, 12), generator=g) ** 2 + 700 * y[:, None] * (
                torch.rand(32, 12, generator=g) < 0.4
            )
            one.zero_grad()
            two.zero_grad()
            loss = F.cross_entropy(model(t), y)
            loss.backward()
            one.step()
            two.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@well(2e-3)
def trained_to_convergence(watch):
    """A fixed small data set fitted until nothing is left to learn: gradients shrink by orders, as they should."""
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    y = torch.tanh(x @ torch.randn(4, 1))
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 500)
    losses = []
    with watch(model, opt) as w:
        for _ in range(500):
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            opt.step()
            sched.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@well(5e-11)
def loss_in_tiny_units(watch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
    opt = torch.optim.Adam(model.parameters(), lr=5e-3, eps=1e-20)
    data, losses = Blobs(), []
    with watch(model, opt) as w:
        for _ in range(200):
            x, y = data.batch()
            opt.zero_grad()
            loss = 1e-10 * F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@well(0.35)
def resnet_zero_gamma(watch):
    """Residual branches that start at zero, SGD with momentum and Nesterov, step schedule."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.c1, self.b1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
            self.c2, self.b2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
            nn.init.zeros_(self.b2.weight)

        def forward(self, x):
            return F.relu(x + self.b2(self.c2(F.relu(self.b1(self.c1(x))))))

    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8),
        Block(8),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    sched = torch.optim.lr_scheduler.StepLR(opt, 80, 0.2)
    data, losses = Images(), []
    with watch(model, opt) as w:
        for _ in range(150):
            x, y = data.batch()
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            sched.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@well(0.75)
def dropout_and_tiny_batches(watch):
    """Batches of four, half of the units dropped: a noisy loss that falls on average."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 5)
    )
    opt = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    data, losses = Blobs(), []
    with watch(model, opt) as w:
        for _ in range(500):
            x, y = data.batch(4)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses[:-40] + [sum(losses[-40:]) / 40] * 15


@well(6.6)
def vae_with_kl(watch):
    torch.manual_seed(0)

    class Vae(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 8))
            self.dec = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 16))

        def forward(self, x):
            mu, lv = self.enc(x).chunk(2, -1)
            z = mu + torch.randn_like(mu) * (0.5 * lv).exp()
            return self.dec(z), mu, lv

    model, data, losses = Vae(), Blobs(), []
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    with watch(model, opt) as w:
        for step in range(300):
            x, _ = data.batch()
            rec, mu, lv = model(x)
            kl = -0.5 * (1 + lv - mu.square() - lv.exp()).sum(-1).mean()
            loss = (rec - x).square().sum(-1).mean() + min(1.0, step / 100) * 0.3 * kl
            opt.zero_grad()
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@well(0.03)
def lbfgs_regression(watch):
    """A closure that is evaluated many times a step."""
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 80)[:, None]
    y = torch.sin(2 * x)
    model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1))
    opt = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=10, line_search_fn="strong_wolfe")
    losses = []
    with watch(model, opt) as w:
        for _ in range(30):

            def closure():
                opt.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                return loss

            loss = opt.step(closure)
            w.step(loss=loss)
            losses.append(float(loss))
    return losses


@well(0.6)
def accumulated_bf16_autocast(watch):
    """bfloat16 autocast over float32 weights, four micro-batches a step, gated activations, sigmoid outputs."""
    torch.manual_seed(0)

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 64), nn.Linear(32, 5)

        def forward(self, x):
            a, b = self.up(x).chunk(2, -1)
            return self.down(a * torch.sigmoid(b))

    model, data, losses = Gated(), Blobs(), []
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3)
    with watch(model, opt) as w:
        for _ in range(150):
            opt.zero_grad()
            total = 0.0
            for _ in range(4):
                x, y = data.batch(16)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    out = model(x)
                loss = F.cross_entropy(out.float(), y) / 4
                loss.backward()
                total += loss.item()
            opt.step()
            w.step(loss=total)
            losses.append(total)
    return losses
