"""Losses, penalties, scales and pools whose backward has the wrong sign, a wrong factor or the wrong reduction.

Written by someone who had not seen the code under test.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F

import hesse
from blind.case import collector
from gradient_faults.case import Fault

__all__ = ["FAULTS"]

FAULTS: list[Fault] = []
fault = collector(FAULTS, Fault)


# Wrong sign


@fault("wrong_sign", "flux", "Divergence")
def pde_adjoint_sign(bad):
    """Heat flux on a periodic grid; the adjoint of a forward difference is minus the backward difference."""

    class Divergence(Function):
        @staticmethod
        def forward(ctx, u, dx):
            ctx.dx = dx
            return (torch.roll(u, -1, -1) - u) / dx

        @staticmethod
        def backward(ctx, grad):
            back = (grad - torch.roll(grad, 1, -1)) / ctx.dx
            return (back if bad else -back), None

    class Flux(nn.Module):
        def forward(self, u):
            return Divergence.apply(u, 0.1)

    class HeatModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 16))
            self.flux = Flux()
            self.conductivity = nn.Parameter(torch.ones(16))

        def forward(self, x, target):
            u = self.net(x)
            q = -self.conductivity * self.flux(u)
            return F.mse_loss(q, target)

    return HeatModel(), (torch.randn(5, 6), torch.randn(5, 16))


@fault("wrong_sign", "criterion", "MarginRank")
def ranking_swapped(bad):
    """Pairwise ranking: the two scores' gradients are swapped."""

    class MarginRank(Function):
        @staticmethod
        def forward(ctx, pos, neg, margin):
            gap = margin - (pos - neg)
            ctx.save_for_backward(gap)
            return F.softplus(gap).mean()

        @staticmethod
        def backward(ctx, grad):
            (gap,) = ctx.saved_tensors
            s = torch.sigmoid(gap) / gap.numel() * grad
            return (s, -s, None) if bad else (-s, s, None)

    class RankLoss(nn.Module):
        def __init__(self, margin=0.5):
            super().__init__()
            self.margin = margin

        def forward(self, pos, neg):
            return MarginRank.apply(pos, neg, self.margin)

    class Ranker(nn.Module):
        def __init__(self):
            super().__init__()
            self.user = nn.Embedding(7, 8)
            self.item = nn.Embedding(11, 8)
            self.criterion = RankLoss()

        def forward(self, u, i, j):
            e = self.user(u)
            return self.criterion((e * self.item(i)).sum(-1), (e * self.item(j)).sum(-1))

    return Ranker(), (torch.tensor([0, 1, 4, 6]), torch.tensor([1, 2, 3, 10]), torch.tensor([7, 8, 3, 0]))


@fault("wrong_sign", "couplings.1.logdet", "LogScale")
def flow_logdet_sign(bad):
    """RealNVP-like: the log-determinant of the second coupling has its own fused sum."""

    class LogScale(Function):
        @staticmethod
        def forward(ctx, s):
            ctx.shape = s.shape
            return s.sum(-1)

        @staticmethod
        def backward(ctx, grad):
            g = grad.unsqueeze(-1).expand(ctx.shape)
            return -g if bad else g

    class PlainSum(nn.Module):
        def forward(self, s):
            return s.sum(-1)

    class FusedSum(nn.Module):
        def forward(self, s):
            return LogScale.apply(s)

    class Coupling(nn.Module):
        def __init__(self, flip, fused):
            super().__init__()
            self.flip = flip
            self.net = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 4))
            self.logdet = FusedSum() if fused else PlainSum()

        def forward(self, x):
            a, b = x.chunk(2, -1)
            if self.flip:
                a, b = b, a
            s, t = self.net(a).chunk(2, -1)
            s = torch.tanh(s)
            b = b * torch.exp(s) + t
            return torch.cat((b, a) if self.flip else (a, b), -1), self.logdet(s)

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.couplings = nn.ModuleList([Coupling(False, False), Coupling(True, True), Coupling(False, False)])

        def forward(self, x):
            total = x.new_zeros(len(x))
            for c in self.couplings:
                x, ld = c(x)
                total = total + ld
            return (0.5 * x.square().sum(-1) - total).mean()

    return Flow(), (torch.randn(9, 4),)


# Missing factor


@fault("missing_factor", "penalty", "GroupPenalty")
def penalty_without_two(bad):
    """A ridge penalty written as a Function; d(w^2) = 2 w."""

    class GroupPenalty(Function):
        @staticmethod
        def forward(ctx, weight, strength):
            ctx.save_for_backward(weight)
            ctx.strength = strength
            return strength * weight.pow(2).sum()

        @staticmethod
        def backward(ctx, grad):
            (weight,) = ctx.saved_tensors
            return grad * ctx.strength * weight * (1.0 if bad else 2.0), None

    class Ridge(nn.Module):
        def forward(self, *weights):
            return sum(GroupPenalty.apply(w, 0.05) for w in weights)

    class Regressor(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 9), nn.ELU(), nn.Linear(9, 1))
            self.penalty = Ridge()

        def forward(self, x, y):
            fit = F.huber_loss(self.body(x), y)
            return fit + self.penalty(self.body[0].weight, self.body[2].weight)

    return Regressor(), (torch.randn(12, 5), torch.randn(12, 1))


@fault("missing_factor wrong_reduction", "denoise.filter", "SpectralFilter")
def fft_normalisation(bad):
    """A real even filter in the frequency domain is self-adjoint; the backward forgot ifft's 1/n."""

    class SpectralFilter(Function):
        @staticmethod
        def forward(ctx, x, response):
            ctx.response = response
            return torch.fft.ifft(torch.fft.fft(x) * response).real

        @staticmethod
        def backward(ctx, grad):
            n = grad.shape[-1]
            back = torch.fft.ifft(torch.fft.fft(grad) * ctx.response).real
            return (back * n if bad else back), None

    class LowPass(nn.Module):
        def __init__(self, n):
            super().__init__()
            f = torch.fft.fftfreq(n).abs()
            self.register_buffer("response", torch.exp(-((f / 0.2) ** 2)))

        def forward(self, x):
            return SpectralFilter.apply(x, self.response)

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter = LowPass(24)
            self.mix = nn.Conv1d(1, 1, 5, padding=2, padding_mode="circular")

        def forward(self, x):
            return self.filter(self.mix(x))

    class Waveform(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(1.3))
            self.denoise = Denoiser()

        def forward(self, x, clean):
            return (self.denoise(self.gain * x) - clean).square().mean()

    return Waveform(), (torch.randn(3, 1, 24), torch.randn(3, 1, 24))


@fault("missing_factor", "blocks.1.attn.scores", "Scores")
def attention_scale_forgotten(bad):
    """Fused q k' / sqrt(d) whose backward has no 1/sqrt(d)."""

    class Scores(Function):
        @staticmethod
        def forward(ctx, q, k):
            ctx.save_for_backward(q, k)
            return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])

        @staticmethod
        def backward(ctx, grad):
            q, k = ctx.saved_tensors
            if not bad:
                grad = grad / math.sqrt(q.shape[-1])
            return grad @ k, grad.transpose(-1, -2) @ q

    class Plain(nn.Module):
        def forward(self, q, k):
            return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])

    class Fused(nn.Module):
        def forward(self, q, k):
            return Scores.apply(q, k)

    class Attention(nn.Module):
        def __init__(self, d, heads, scores):
            super().__init__()
            self.heads = heads
            self.qkv = nn.Linear(d, 3 * d)
            self.out = nn.Linear(d, d)
            self.scores = scores

        def forward(self, x):
            n, t, d = x.shape
            q, k, v = (z.view(n, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
            w = self.scores(2 * q, 2 * k).softmax(-1)
            return self.out((w @ v).transpose(1, 2).reshape(n, t, d))

    class Block(nn.Module):
        def __init__(self, d, scores):
            super().__init__()
            self.norm = nn.LayerNorm(d)
            self.attn = Attention(d, 2, scores)
            self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

        def forward(self, x):
            x = x + self.attn(self.norm(x))
            return x + self.mlp(x)

    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(13, 8)
            self.blocks = nn.ModuleList([Block(8, Plain()), Block(8, Fused())])
            self.head = nn.Linear(8, 13)

        def forward(self, tokens):
            x = self.embed(tokens[:, :-1])
            for b in self.blocks:
                x = b(x)
            return F.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())

    return LM(), (torch.randint(0, 13, (3, 7)),)


# Wrong reduction


@fault("wrong_reduction", "loss_fn()", "FocalBCE")
def bce_not_averaged(bad):
    """A closure: the user's loss function is a mean, its backward is of the sum."""

    class FocalBCE(Function):
        @staticmethod
        def forward(ctx, logits, target):
            ctx.save_for_backward(logits, target)
            return F.binary_cross_entropy_with_logits(logits, target)

        @staticmethod
        def backward(ctx, grad):
            logits, target = ctx.saved_tensors
            g = torch.sigmoid(logits) - target
            return grad * (g if bad else g / g.numel()), None

    def loss_fn(output, target):
        return FocalBCE.apply(output.squeeze(-1), target)

    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 1))
    batch = (torch.randn(8, 4), torch.randint(0, 2, (8,)).float())
    return hesse.closure(model, loss_fn, batch), None


@fault("wrong_reduction missing_factor", "pool", "AveragePool")
def global_pool_sum(bad):
    class AveragePool(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x.mean((2, 3))

        @staticmethod
        def backward(ctx, grad):
            n, c, h, w = ctx.shape
            g = grad[:, :, None, None].expand(n, c, h, w)
            return g.contiguous() if bad else g / (h * w)

    class GlobalPool(nn.Module):
        def forward(self, x):
            return AveragePool.apply(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            self.pool = GlobalPool()
            self.fc = nn.Linear(4, 3)

        def forward(self, x, y):
            return F.cross_entropy(self.fc(self.pool(self.stem(x))), y)

    return Net(), (torch.randn(4, 1, 7, 7), torch.tensor([0, 2, 1, 1]))
