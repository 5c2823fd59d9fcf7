"""Backwards that are wrong at some elements, or altogether.

Written by someone who had not seen the code under test.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F

from blind.case import collector
from gradient_faults.case import Fault

__all__ = ["FAULTS"]

FAULTS: list[Fault] = []
fault = collector(FAULTS, Fault)


# Some elements


@fault("some_elements", "box_loss", "SmoothL1")
def smooth_l1_inner_region(bad):
    """Detection: inside |d| < beta the slope is d / beta, not d."""

    class SmoothL1(Function):
        @staticmethod
        def forward(ctx, pred, target, beta):
            d = pred - target
            ctx.save_for_backward(d)
            ctx.beta = beta
            return torch.where(d.abs() < beta, 0.5 * d * d / beta, d.abs() - 0.5 * beta)

        @staticmethod
        def backward(ctx, grad):
            (d,) = ctx.saved_tensors
            inner = d if bad else d / ctx.beta
            return grad * torch.where(d.abs() < ctx.beta, inner, d.sign()), None, None

    class BoxLoss(nn.Module):
        def __init__(self, beta=0.3):
            super().__init__()
            self.beta = beta

        def forward(self, pred, target, positive):
            loss = SmoothL1.apply(pred, target, self.beta).sum(-1)
            return (loss * positive).sum() / positive.sum()

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.neck = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU())
            self.cls = nn.Conv2d(6, 2, 1)
            self.box = nn.Conv2d(6, 4, 1)
            self.box_loss = BoxLoss()

        def forward(self, x, boxes, labels):
            f = self.neck(x)
            pred = self.box(f).permute(0, 2, 3, 1)
            cls = F.cross_entropy(self.cls(f), labels)
            return cls + self.box_loss(pred, boxes, (labels > 0).float())

    return Detector(), (torch.randn(2, 3, 5, 5), torch.randn(2, 5, 5, 4), torch.randint(0, 2, (2, 5, 5)))


@fault("some_elements", "net.0 net.0.pad", "EdgePad")
def replicate_pad_border(bad):
    """Replicate padding: what fell on the pad must be folded back on the border; it was cropped."""

    class EdgePad(Function):
        @staticmethod
        def forward(ctx, x, p):
            ctx.p = p
            return F.pad(x, (p, p), mode="replicate")

        @staticmethod
        def backward(ctx, grad):
            p = ctx.p
            g = grad[..., p:-p].clone()
            if not bad:
                g[..., 0] += grad[..., :p].sum(-1)
                g[..., -1] += grad[..., -p:].sum(-1)
            return g, None

    class PadConv(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.conv = nn.Conv1d(a, b, 5)

        def forward(self, x):
            return self.conv(EdgePad.apply(x, 2))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv1d(1, 3, 1)
            self.net = nn.Sequential(PadConv(3, 4), nn.Tanh(), nn.Conv1d(4, 1, 1))

        def forward(self, x, y):
            return F.l1_loss(self.net(self.stem(x)), y)

    return Net(), (torch.randn(3, 1, 14), 3 + torch.randn(3, 1, 14))


@fault("some_elements", "pool", "SegmentMax")
def segment_max_last(bad):
    """Max over segments of a ragged batch: the last segment's winner gets nothing (off by one)."""

    class SegmentMax(Function):
        @staticmethod
        def forward(ctx, x, ends):
            out, arg, start = [], [], 0
            for end in ends.tolist():
                v, i = x[start:end].max(0)
                out.append(v)
                arg.append(i + start)
                start = end
            ctx.arg, ctx.n = torch.stack(arg), len(x)
            return torch.stack(out)

        @staticmethod
        def backward(ctx, grad):
            g = grad.new_zeros(ctx.n, grad.shape[1])
            for s in range(len(ctx.arg) - (1 if bad else 0)):
                g.scatter_add_(0, ctx.arg[s : s + 1], grad[s : s + 1])
            return g, None

    class Pool(nn.Module):
        def forward(self, x, ends):
            return SegmentMax.apply(x, ends)

    class DeepSet(nn.Module):
        def __init__(self):
            super().__init__()
            self.phi = nn.Sequential(nn.Linear(3, 7), nn.Tanh())
            self.pool = Pool()
            self.rho = nn.Linear(7, 2)

        def forward(self, points, ends, y):
            return F.cross_entropy(self.rho(self.pool(self.phi(points), ends)), y)

    return DeepSet(), (torch.randn(11, 3), torch.tensor([4, 6, 11]), torch.tensor([0, 1, 1]))


# Wrong gradient


@fault("wrong_gradient", "norm1", "FusedLayerNorm")
def layer_norm_without_mean_terms(bad):
    class FusedLayerNorm(Function):
        @staticmethod
        def forward(ctx, x, gain, shift):
            mu = x.mean(-1, keepdim=True)
            rstd = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
            xhat = (x - mu) * rstd
            ctx.save_for_backward(xhat, rstd, gain)
            return xhat * gain + shift

        @staticmethod
        def backward(ctx, grad):
            xhat, rstd, gain = ctx.saved_tensors
            g = grad * gain
            if bad:
                dx = rstd * (g - g.mean(-1, keepdim=True))
            else:
                dx = rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
            return dx, (grad * xhat).flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0)

    class Norm(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.gain, self.shift = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

        def forward(self, x):
            return FusedLayerNorm.apply(x, self.gain, self.shift)

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1 = Norm(6)
            self.tokens = nn.Linear(5, 5)
            self.norm2 = nn.LayerNorm(6)
            self.channels = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
            self.patch = nn.Linear(4, 6)

        def forward(self, x, y):
            x = self.patch(x)
            x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            x = x + self.channels(self.norm2(x))
            return F.mse_loss(x.mean(1), y)

    return Mixer(), (torch.randn(4, 5, 4), torch.randn(4, 6))


@fault("wrong_gradient some_elements", "emissions transitions", "LogPartition")
def crf_viterbi_marginals(bad):
    """A function of tensors: log Z of a chain, with the best path's counts for the marginals."""

    class LogPartition(Function):
        @staticmethod
        def forward(ctx, emissions, transitions):
            ctx.save_for_backward(emissions, transitions)
            a = emissions[0]
            for e in emissions[1:]:
                a = torch.logsumexp(a[:, None] + transitions, 0) + e
            return torch.logsumexp(a, 0)

        @staticmethod
        def backward(ctx, grad):
            emissions, transitions = ctx.saved_tensors
            with torch.enable_grad():
                em, tr = emissions.detach().requires_grad_(), transitions.detach().requires_grad_()
                a = em[0]
                for e in em[1:]:
                    s = a[:, None] + tr
                    a = (s.max(0).values if bad else torch.logsumexp(s, 0)) + e
                z = a.max() if bad else torch.logsumexp(a, 0)
                ge, gt = torch.autograd.grad(z, (em, tr))
            return grad * ge, grad * gt

    tags = torch.tensor([0, 2, 1, 1, 3])

    def crf_nll(emissions, transitions):
        gold = emissions[torch.arange(5), tags].sum() + transitions[tags[:-1], tags[1:]].sum()
        return LogPartition.apply(emissions, transitions) - gold

    return crf_nll, (torch.randn(5, 4), torch.randn(4, 4))
