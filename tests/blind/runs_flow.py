"""Trainings that lose the signal, the gradient or both: depth, time, first weights, dead, like or saturated units.

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


@sick("vanishing", "1 2 3 4 5 6 7 8 9 10 11", 60, 0.5)
def deep_sigmoid_net(watch, cured):
    torch.manual_seed(0)
    parts = [nn.Flatten()]
    for i in range(10):
        parts += [
            nn.Linear(16 if i == 0 else 32, 32),
            nn.Sequential(nn.BatchNorm1d(32), nn.ReLU()) if cured else nn.Sigmoid(),
        ]
    model = nn.Sequential(*parts, nn.Linear(32, 5))
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data, losses = Blobs(), []
    with watch(model, opt) as w:
        for _ in range(220):
            x, y = data.batch()
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("vanishing bad_init", "features*", 60, 0.5)
def plain_conv_default_init(watch, cured):
    """Sixteen convolutions, ReLU, no normalisation, torch's default initial weights."""
    torch.manual_seed(0)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            convs = []
            for i in range(16):
                convs += [nn.Conv2d(1 if i == 0 else 8, 8, 3, padding=1)]
                if cured:
                    convs += [nn.BatchNorm2d(8)]
                convs += [nn.ReLU()]
            self.features = nn.Sequential(*convs)
            self.classifier = nn.Linear(8, 4)
            if cured:
                for m in self.modules():
                    if isinstance(m, nn.Conv2d):
                        nn.init.kaiming_normal_(m.weight)

        def forward(self, x):
            return self.classifier(self.features(x).amax((2, 3)))

    model, data, losses = Plain(), Images(), []
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with watch(model, opt) as w:
        for _ in range(160):
            x, y = data.batch()
            loss = F.cross_entropy(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("vanishing_through_time", "rnn*", 150, 0.3)
def remember_the_first(watch, cured):
    """The class is the first of 40 symbols, the rest is noise."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 24, batch_first=True) if cured else nn.RNN(4, 24, batch_first=True)
            self.out = nn.Linear(24, 4)
            if cured:  # chrono initialisation: gates that remember for as long as the task needs
                with torch.no_grad():
                    u = torch.log(torch.empty(24).uniform_(2, 40))
                    self.rnn.bias_ih_l0[24:48] = u
                    self.rnn.bias_ih_l0[:24] = -u
                    self.rnn.bias_hh_l0[:48] = 0

        def forward(self, x):
            return self.out(self.rnn(x)[0][:, -1])

    model, losses, g = Net(), [], torch.Generator().manual_seed(1)
    opt = torch.optim.Adam(model.parameters(), lr=1e-2 if cured else 2e-3)
    with watch(model, opt) as w:
        for _ in range(300):
            y = torch.randint(0, 4, (48,), generator=g)
            x = 0.2 * torch.randn(48, 40, 4, generator=g)
            x[:, 0] += 2 * F.one_hot(y, 4)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("exploding", "cell*", 40, 0.25)
def chaotic_recurrence(watch, cured):
    """A hand-written recurrence with recurrent weights far above one."""
    torch.manual_seed(0)

    class Cell(nn.Module):
        def __init__(self, h):
            super().__init__()
            self.inp = nn.Linear(3, h)
            self.rec = nn.Linear(h, h, bias=False)
            if cured:
                nn.init.orthogonal_(self.rec.weight)
            else:
                nn.init.normal_(self.rec.weight, std=3.0 / h**0.5)

        def forward(self, x, h):
            return torch.tanh(self.inp(x) + self.rec(h))

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = Cell(32)
            self.read = nn.Linear(32, 1)

        def forward(self, x):
            h = x.new_zeros(len(x), 32)
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            return self.read(h).squeeze(-1)

    model, losses, g = Counter(), [], torch.Generator().manual_seed(2)
    opt = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    with watch(model, opt) as w:
        for _ in range(160):
            x = torch.randn(32, 45, 3, generator=g)
            y = x[:, -6:, 0].mean(1) * 2
            loss = F.mse_loss(model(x), y)
            opt.zero_grad()
            loss.backward()
            if cured:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("bad_init exploding", "layers*", 10, 0.7)
def weights_of_std_one(watch, cured):
    torch.manual_seed(0)

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(16 if i == 0 else 64, 64) for i in range(5)])
            self.out = nn.Linear(64, 5)
            for lin in self.layers:
                if cured:
                    nn.init.kaiming_normal_(lin.weight)
                else:
                    nn.init.normal_(lin.weight, std=1.0)

        def forward(self, x):
            for lin in self.layers:
                x = F.relu(lin(x))
            return self.out(x)

    model, data, losses = MLP(), Blobs(), []
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    with watch(model, opt) as w:
        for _ in range(120):
            x, y = data.batch()
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("dead_units", "fc1* fc2* relu* Net* act*", 40, 0.5)
def raw_pixels_kill_relu(watch, cured):
    """Pixels from 0 to 255, plain SGD: the first big step drives units below zero for good."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(100, 48), nn.Linear(48, 32), nn.Linear(32, 4)

        def forward(self, x):
            x = F.relu(self.fc1(x.flatten(1)))
            x = F.relu(self.fc2(x))
            return self.fc3(x)

    model, data, losses = Net(), Images(noise=0.15), []
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with watch(model, opt) as w:
        for _ in range(300):
            x, y = data.batch()
            x = (x - 0.1) / 0.35 if cured else 255 * x.clamp(0, 1)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("symmetry", "hidden* body*", 30, 0.2)
def constant_weights(watch, cured):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Linear(16, 24)
            self.body = nn.Sequential(nn.ELU(), nn.Linear(24, 24), nn.ELU())
            self.out = nn.Linear(24, 5)
            if not cured:
                for m in (self.hidden, self.body[1]):
                    nn.init.constant_(m.weight, 0.05)
                    nn.init.zeros_(m.bias)

        def forward(self, x):
            return self.out(self.body(self.hidden(x)))

    model, data, losses = Net(), Blobs(), []
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with watch(model, opt) as w:
        for _ in range(200):
            x, y = data.batch()
            opt.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("saturation", "encoder*", 40, 0.08)
def unscaled_sensor_inputs(watch, cured):
    """Columns in pascal and kelvin straight into tanh."""
    torch.manual_seed(0)
    scale = torch.tensor([1.0e4, 2.0e3, 50.0, 3.0e2])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
            self.head = nn.Linear(32, 1)

        def forward(self, x):
            return self.head(self.encoder(x)).squeeze(-1)

    model, losses, g = Model(), [], torch.Generator().manual_seed(0)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    with watch(model, opt) as w:
        for _ in range(300):
            z = torch.randn(64, 4, generator=g)
            y = torch.sin(z[:, 0]) + 0.5 * z[:, 1] * z[:, 2]
            x = z if cured else z * scale + 2 * scale
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses


@sick("saturation", "attn*", 60, 0.35)
def attention_without_scale(watch, cured):
    """Hand-written attention, no 1/sqrt(d), large query and key weights: every row looks at one token."""
    torch.manual_seed(0)

    class Attn(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
            if not cured:
                nn.init.normal_(self.q.weight, std=1.0)
                nn.init.normal_(self.k.weight, std=1.0)

        def forward(self, x):
            s = self.q(x) @ self.k(x).transpose(1, 2)
            return F.softmax(s / x.shape[-1] ** 0.5 if cured else s, -1) @ self.v(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(6, 24)
            self.norm = nn.LayerNorm(24)
            self.attn = Attn(24)
            self.out = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 3))

        def forward(self, x):
            return self.out(self.attn(self.norm(self.embed(x))).mean(1))

    model, losses, g = Net(), [], torch.Generator().manual_seed(0)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with watch(model, opt) as w:
        for _ in range(250):
            x = torch.randn(32, 12, 6, generator=g)
            y = (2 + x[..., 0].mean(1) * 6).round().clamp(1, 3).long() - 1
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            w.step(loss=loss)
            losses.append(loss.item())
    return losses
