"""Gradients that stop where they should not: detached paths, cut recurrences, undeclared straight-through estimators.

Written by someone who had not seen the code under test.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.utils import parametrize

import hesse
from blind.case import collector
from gradient_faults.case import Fault

__all__ = ["FAULTS"]

FAULTS: list[Fault] = []
fault = collector(FAULTS, Fault)


# Detached


@fault("detached", "moe.router moe", "detach")
def moe_gate_detached(bad):
    """Mixture of experts: the combine weights were detached 'for stability', the router never learns."""

    class Router(nn.Module):
        def __init__(self, d, n):
            super().__init__()
            self.gate = nn.Linear(d, n)

        def forward(self, x):
            probs = self.gate(x).softmax(-1)
            return probs.detach() if bad else probs

    class MoE(nn.Module):
        def __init__(self, d, n):
            super().__init__()
            self.router = Router(d, n)
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(d, 6), nn.SiLU(), nn.Linear(6, d)) for _ in range(n)])

        def forward(self, x):
            w = self.router(x)
            return sum(w[:, i : i + 1] * e(x) for i, e in enumerate(self.experts))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp = nn.Linear(3, 5)
            self.moe = MoE(5, 3)
            self.out = nn.Linear(5, 1)

        def forward(self, x, y):
            return F.mse_loss(self.out(self.moe(self.inp(x))), y)

    return Net(), (torch.randn(7, 3), torch.randn(7, 1))


@fault("detached", "BetaVAE")
def vae_kl_in_numpy(bad):
    """The KL term was computed in numpy and put back: it shows in the loss, not in the gradient."""

    class BetaVAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.Sequential(nn.Linear(6, 10), nn.Tanh())
            self.mu = nn.Linear(10, 3)
            self.logvar = nn.Linear(10, 3)
            self.dec = nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 6))

        def forward(self, x, noise):
            h = self.enc(x)
            mu, logvar = self.mu(h), self.logvar(h)
            z = mu + noise * torch.exp(0.5 * logvar)
            rec = (self.dec(z) - x).square().sum(-1).mean()
            if bad:
                m, lv = mu.detach().cpu().numpy(), logvar.detach().cpu().numpy()
                kl = torch.as_tensor(-0.5 * np.sum(1 + lv - m**2 - np.exp(lv), axis=-1).mean())
            else:
                kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(-1).mean()
            return rec + 0.5 * kl

    return BetaVAE(), (torch.randn(8, 6), torch.randn(8, 3))


@fault("detached", "net.0.parametrizations.weight.0 net.0.parametrizations.weight net.0", "data")
def weight_norm_by_data(bad):
    """A hand-made weight standardisation as a parametrization; the norm was taken from .data."""

    class UnitRows(nn.Module):
        def forward(self, w):
            n = (w.data if bad else w).norm(dim=1, keepdim=True)
            return w / (n + 1e-6)

    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    parametrize.register_parametrization(net[0], "weight", UnitRows())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, y):
            return F.cross_entropy(self.net(x), y)

    return Net(), (torch.randn(10, 5), torch.randint(0, 2, (10,)))


# Truncated recurrence


@fault("truncated_recurrence", "reader")
def rnn_detached_inside(bad):
    """Truncated back-propagation left in a model that is meant to be exact."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(3, 7)

        def forward(self, x):
            h = x.new_zeros(len(x), 7)
            for t in range(x.shape[1]):
                if bad and t % 4 == 0:
                    h = h.detach()
                h = self.cell(x[:, t], h)
            return h

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.Linear(3, 3)
            self.reader = Reader()
            self.out = nn.Linear(7, 1)

        def forward(self, x, y):
            return F.mse_loss(self.out(self.reader(self.norm(x))), y)

    return Net(), (torch.randn(5, 10, 3), torch.randn(5, 1))


@fault("truncated_recurrence detached", "solve")
def unrolled_solver_one_step(bad):
    """An unrolled image reconstruction: all but the last iterations run without a graph."""

    class Unrolled(nn.Module):
        def __init__(self, n, steps=6):
            super().__init__()
            self.steps = steps
            self.step_size = nn.Parameter(torch.tensor(0.15))
            self.prior = nn.Linear(n, n)

        def forward(self, y, a):
            x = y.new_zeros(len(y), a.shape[1])
            for k in range(self.steps):
                if bad and k == self.steps - 1:
                    x = x.detach()
                x = x - self.step_size * ((x @ a.t() - y) @ a + 0.1 * torch.tanh(self.prior(x)))
            return x

    class Recon(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.9))
            self.solve = Unrolled(6)

        def forward(self, y, a, truth):
            return (self.solve(self.scale * y, a) - truth).square().sum(-1).mean()

    a = torch.randn(4, 6) / 2
    truth = torch.randn(5, 6)
    return Recon(), (truth @ a.t(), a, truth)


# Straight through


@fault("straight_through", "quantise")
def rounding_undeclared(bad):
    """Quantisation-aware training: x + (round(x) - x).detach(), declared nowhere."""

    class FakeQuant(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.25))

        def forward(self, x):
            q = torch.round(x / self.scale) * self.scale
            return x + (q - x).detach() if bad else torch.tanh(x)

    class QatNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp = nn.Linear(4, 8)
            self.quantise = FakeQuant()
            self.out = nn.Linear(8, 3)

        def forward(self, x, y):
            return F.cross_entropy(self.out(self.quantise(self.inp(x))), y)

    return QatNet(), (torch.randn(9, 4), torch.randint(0, 3, (9,)))


@fault("straight_through", "hidden.1", "Sign")
def binary_net_undeclared(bad):
    """A binarised layer; the twin declares it."""

    class Sign(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * (x.abs() <= 1)

    if not bad:
        declared = hesse.check.straight_through(Sign)
        Sign = declared if declared is not None else Sign

    class Binarize(nn.Module):
        def forward(self, x):
            return Sign.apply(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Sequential(nn.Linear(5, 10), Binarize())
            self.out = nn.Linear(10, 1)

        def forward(self, x, y):
            return F.binary_cross_entropy_with_logits(self.out(self.hidden(x)), y)

    return Net(), (torch.randn(9, 5), torch.randint(0, 2, (9, 1)).float())
