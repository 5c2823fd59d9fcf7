"""Correct models that look suspicious: kinks, ties, noise, decades, zeros, gradients that stop by design.

Written by someone who had not seen the code under test.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.utils.checkpoint import checkpoint

from blind.case import collector
from gradient_faults.case import Healthy

__all__ = ["HEALTHY"]

HEALTHY: list[Healthy] = []
healthy = collector(HEALTHY, Healthy)


@healthy()
def relu_at_the_kink():
    """Zero biases and an all-zero row: every unit of that row sits exactly on the kink."""
    net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 1))
    for m in net:
        if isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)
    x = torch.randn(6, 4)
    x[0] = 0
    return net, (x,)


@healthy()
def max_pool_ties():
    """Images with flat regions: the maximum is taken by several pixels."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * 9, 2))
    x = torch.zeros(3, 1, 8, 8)
    x[:, :, 2:5, 3:6] = 1.0
    return net, (x,)


@healthy()
def batch_norm_training():
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=True),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 3),
    )

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, y):
            return F.cross_entropy(self.net(x), y)

    return WithLoss(), (torch.randn(5, 2, 8, 8), torch.tensor([0, 1, 2, 0, 1]))


@healthy()
def dropout_everywhere():
    return nn.Sequential(
        nn.Dropout(0.2), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 3), nn.AlphaDropout(0.1)
    ), (torch.randn(5, 8),)


@healthy()
def parameters_decades_apart():
    """A physical model in SI units: parameters of 1e-9 and 1e8 side by side."""

    class Diode(nn.Module):
        def __init__(self):
            super().__init__()
            self.i0 = nn.Parameter(torch.tensor(3e-9))
            self.r = nn.Parameter(torch.tensor(2.0e4))
            self.young = nn.Parameter(torch.tensor(2.1e8))
            self.vt = nn.Parameter(torch.tensor(0.026))

        def forward(self, v, strain):
            current = self.i0 * (torch.exp(v / self.vt) - 1) + v / self.r
            return (current * 1e3).square().mean() + (self.young * strain / 1e5).square().mean()

    return Diode(), (torch.linspace(0.1, 0.4, 7), 1e-3 * torch.randn(7))


@healthy()
def sparse_embedding():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(200, 8, sparse=True, padding_idx=0)
            self.bags = nn.EmbeddingBag(300, 8, mode="mean", sparse=True)
            self.out = nn.Linear(16, 2)

        def forward(self, idx, y):
            return F.cross_entropy(self.out(torch.cat((self.words(idx).mean(1), self.bags(idx)), -1)), y)

    return Words(), (torch.tensor([[3, 3, 0, 7], [1, 190, 0, 0]]), torch.tensor([0, 1]))


@healthy()
def top_k_routing():
    class TopK(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 5)
            self.experts = nn.ModuleList([nn.Linear(4, 3) for _ in range(5)])

        def forward(self, x, y):
            g = self.gate(x)
            val, idx = g.topk(2, -1)
            w = torch.zeros_like(g).scatter(-1, idx, val.softmax(-1))
            out = torch.stack([e(x) for e in self.experts], 1)
            balance = 0.01 * g.softmax(-1).mean(0).square().sum()
            return F.cross_entropy((w[..., None] * out).sum(1), y) + balance

    return TopK(), (torch.randn(9, 4), torch.randint(0, 3, (9,)))


@healthy()
def attention_with_key_bias():
    """The key's bias has no effect: its gradient is rounding noise around zero."""

    class T(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=True)
            self.out = nn.Linear(12, 4)

        def forward(self, x):
            return self.out(self.layer(x).mean(1))

    t = T()
    with torch.no_grad():
        t.layer.self_attn.in_proj_bias.normal_(0, 0.1)
    return t, (torch.randn(2, 5, 12),)


@healthy()
def target_network():
    """Self-distillation: the target branch is frozen and detached, as it must be."""

    class Byol(nn.Module):
        def __init__(self):
            super().__init__()
            self.online = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
            self.target = copy.deepcopy(self.online).requires_grad_(False)
            self.predict = nn.Linear(4, 4)

        def forward(self, a, b):
            p = F.normalize(self.predict(self.online(a)), dim=-1)
            with torch.no_grad():
                z = F.normalize(self.target(b), dim=-1)
            return 2 - 2 * (p * z.detach()).sum(-1).mean()

    return Byol(), (torch.randn(7, 5), torch.randn(7, 5))


@healthy()
def checkpointed_blocks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Tanh()) for _ in range(4)])
            self.out = nn.Linear(6, 1)

        def forward(self, x):
            for b in self.blocks:
                x = x + checkpoint(b, x, use_reentrant=False)
            return self.out(x).square().mean()

    return Net(), (torch.randn(6, 6),)


@healthy()
def tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(12, 6)
            self.rnn = nn.GRU(6, 6, batch_first=True)
            self.head = nn.Linear(6, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, t):
            h, _ = self.rnn(self.embed(t[:, :-1]))
            return F.cross_entropy(self.head(h).transpose(1, 2), t[:, 1:])

    return Tied(), (torch.randint(0, 12, (3, 9)),)


@healthy()
def large_constant_offset():
    """An energy of -76000 with differences of 1: little is left of float32."""

    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1))
            self.register_buffer("offset", torch.tensor(-76000.0))

        def forward(self, x):
            return self.net(x).sum() + self.offset

    return Energy(), (torch.randn(8, 3),)


@healthy()
def l1_at_zero_residual():
    """Residuals that are exactly zero under an absolute value, and targets on the clamp's bounds."""

    class Fit(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 0.0]))

        def forward(self, x, y):
            r = x @ self.w - y
            return r.abs().mean() + 0.1 * self.w.abs().sum() + (x * self.w).clamp(-1.0, 0.5).mean()

    x = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]])
    return Fit(), (x, torch.tensor([1.0, -2.0, 0.0, 3.0]))


@healthy()
def zero_initialised_head():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 10), nn.GELU())
            self.head = nn.Linear(10, 4)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

        def forward(self, x, y):
            return F.cross_entropy(self.head(self.body(x)), y)

    return Net(), (torch.randn(7, 6), torch.randint(0, 4, (7,)))


@healthy()
def tiny_loss_units():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x, y):
            return 1e-11 * F.mse_loss(self.net(x), y)

    return Tiny(), (torch.randn(8, 4), torch.randn(8, 1))


@healthy()
def reparametrised_weights():
    """weight_norm and an orthogonal parametrization, with a mask applied to a third layer."""

    class Sparse(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, w):
            return w * self.mask

    net = nn.Sequential(
        weight_norm(nn.Linear(5, 6)), nn.Tanh(), orthogonal(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 2)
    )
    parametrize.register_parametrization(net[4], "weight", Sparse((torch.rand(2, 6) > 0.5).float()))
    return net, (torch.randn(6, 5),)


@healthy()
def observing_hooks():
    """Forward, backward and parameter hooks that look and change nothing."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    log: list[Any] = []
    for m in net:
        m.register_forward_hook(lambda m, i, o: log.append(o.mean().item()))
        m.register_full_backward_hook(lambda m, gi, go: log.append(go[0].norm().item()))
    net[0].weight.register_hook(lambda g: log.append(g.abs().max().item()))
    return net, (torch.randn(5, 4),)


@healthy()
def complex_spectrogram():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 9, padding=4)
            self.phase = nn.Parameter(torch.randn(17))
            self.out = nn.Linear(2, 1)

        def forward(self, x):
            z = torch.fft.rfft(self.conv(x), n=32) * torch.exp(1j * self.phase)
            return self.out(torch.log1p(z.abs().square()).mean(-1)).square().mean()

    return Spectral(), (torch.randn(3, 1, 32),)


@healthy()
def bfloat16_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.LayerNorm(32), nn.Linear(32, 4))

        def forward(self, x, y):
            return F.cross_entropy(self.net(x).float(), y)

    return Net().bfloat16(), (torch.randn(16, 8).bfloat16(), torch.randint(0, 4, (16,)))


@healthy()
def very_deep_tanh():
    """Forty layers: the first gradient is a millionth of the last, and right."""
    parts: list[nn.Module] = []
    for _ in range(40):
        lin = nn.Linear(6, 6)
        with torch.no_grad():
            lin.weight.mul_(1.2)
        parts += [lin, nn.Tanh()]
    return nn.Sequential(*parts, nn.Linear(6, 1)), (torch.randn(4, 6),)


@healthy()
def right_functions_with_none():
    """A custom Function done well: needs_input_grad, None for an index, a fresh tensor edited in place."""

    class ScaledGather(Function):
        @staticmethod
        def forward(ctx, table, idx, gain):
            ctx.save_for_backward(table, idx, gain)
            return table[idx] * gain

        @staticmethod
        def backward(ctx, grad):
            table, idx, gain = ctx.saved_tensors
            g_table = g_gain = None
            if ctx.needs_input_grad[0]:
                scaled = grad.clone()
                scaled.mul_(gain)
                g_table = torch.zeros_like(table).index_add_(0, idx, scaled)
            if ctx.needs_input_grad[2]:
                g_gain = (grad * table[idx]).sum(0)
            return g_table, None, g_gain

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(9, 4))
            self.free = nn.Parameter(torch.randn(9, 4))
            self.gain = nn.Parameter(torch.ones(4))
            self.unused = nn.Linear(3, 3)

        def forward(self, idx):
            return (
                (ScaledGather.apply(self.table, idx, self.gain) + ScaledGather.apply(self.free, idx, self.gain))
                .square()
                .mean()
            )

    return Net(), (torch.tensor([1, 1, 8, 3]),)


@healthy()
def pinn_with_second_derivatives():
    class Pinn(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1))
            self.nu = nn.Parameter(torch.tensor(0.05))

        def forward(self, x):
            x = x.detach().clone().requires_grad_()
            u = self.net(x)
            (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (gg,) = torch.autograd.grad(g[:, 1].sum(), x, create_graph=True)
            return (g[:, 0] + u[:, 0] * g[:, 1] - self.nu * gg[:, 1]).square().mean()

    return Pinn(), (torch.rand(12, 2),)


@healthy(check="hessian")
def second_order_softplus():
    return nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.LayerNorm(8), nn.Linear(8, 1)), (torch.randn(6, 4),)


@healthy(check="hessian")
def second_order_relu_and_embedding():
    """Piecewise linear: the Hessian has whole blocks of zeros, and unused rows have nothing at all."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(30, 5)
            self.l = nn.Linear(5, 8)
            self.o = nn.Linear(8, 3)

        def forward(self, i, y):
            return F.cross_entropy(self.o(F.relu(self.l(self.e(i)))), y)

    return Net(), (torch.tensor([1, 4, 4, 9]), torch.tensor([0, 1, 2, 1]))
