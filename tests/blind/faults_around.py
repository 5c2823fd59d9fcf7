"""Faults around the layers: hooks that change a gradient, forwards that change from call to call.

Written by someone who had not seen the code under test.
"""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn import functional as F

from blind.case import collector
from gradient_faults.case import Fault

__all__ = ["FAULTS"]

FAULTS: list[Fault] = []
fault = collector(FAULTS, Fault)


# Hook


def guided_relu_hook(module, grad_input, grad_output):
    """Left behind by a saliency script."""
    return tuple(None if g is None else g.clamp(min=0) for g in grad_input)


def recording_hook(module, grad_input, grad_output):
    module.seen = [None if g is None else float(g.norm()) for g in grad_input]


@fault("hook", "backbone.1", "guided_relu_hook")
def saliency_hook_left(bad):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU())
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.backbone(x).mean((2, 3)))

    net = Net()
    net.backbone[1].register_full_backward_hook(guided_relu_hook if bad else recording_hook)
    return net, (torch.randn(3, 1, 8, 8),)


@fault("hook", "lstm lstm.weight_hh_l0", "clip")
def parameter_clip_hook(bad):
    """Elementwise clipping by a parameter hook, forgotten."""

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 6, batch_first=True)
            self.out = nn.Linear(6, 1)

        def forward(self, x, y):
            h, _ = self.lstm(x)
            return 20 * F.mse_loss(self.out(h[:, -1]), y)

    def clip(g):
        return g.clamp(-0.02, 0.02) if bad else g

    model = Sequence()
    model.lstm.weight_hh_l0.register_hook(clip)
    return model, (torch.randn(5, 8, 3), 2 + torch.randn(5, 1))


@fault("hook", "project Contrastive", "unit")
def tensor_hook_normalises(bad):
    """Contrastive: a tensor hook in a forward makes the gradient of the embedding a unit vector."""

    def unit(g):
        return g / (g.norm() + 1e-12) if bad else None

    class Project(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(7, 5)

        def forward(self, x):
            z = self.lin(x)
            if z.requires_grad:
                z.register_hook(unit)
            return F.normalize(z, dim=-1)

    class Contrastive(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 7), nn.GELU())
            self.project = Project()

        def forward(self, a, b):
            za, zb = self.project(self.body(a)), self.project(self.body(b))
            return F.cross_entropy(za @ zb.t() / 0.2, torch.arange(len(a)))

    return Contrastive(), (torch.randn(6, 4), torch.randn(6, 4))


# Non-deterministic


@fault("non_deterministic", "layers.1 layers.2 layers.3")
def drop_path_python_random(bad):
    """Stochastic depth that draws from Python's random, which no torch seed holds."""

    class Residual(nn.Module):
        def __init__(self, d, p):
            super().__init__()
            self.p = p
            self.f = nn.Sequential(nn.Linear(d, d), nn.Tanh())

        def forward(self, x):
            if not bad:
                return x + (1 - self.p) * self.f(x)
            if self.training and random.random() < self.p:
                return x
            return x + self.f(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Residual(5, p) for p in (0.0, 0.5, 0.5, 0.5)])
            self.out = nn.Linear(5, 1)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.out(x).square().mean()

    return Net(), (torch.randn(6, 5),)


@fault("non_deterministic", "sampler")
def annealed_every_call(bad):
    """A soft selection whose temperature anneals by itself on every forward."""

    class SoftSelect(nn.Module):
        def __init__(self):
            super().__init__()
            self.tau = 2.0

        def forward(self, logits):
            if bad and self.training:
                self.tau = max(0.3, self.tau * 0.97)
            return (logits / self.tau).softmax(-1)

    class Selector(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Linear(6, 6)
            self.sampler = SoftSelect()
            self.head = nn.Linear(6, 2)

        def forward(self, x, y):
            return F.cross_entropy(self.head(x * self.sampler(self.scores(x))), y)

    return Selector(), (torch.randn(8, 6), torch.randint(0, 2, (8,)))
