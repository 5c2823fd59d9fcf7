"""Tables, gathers, gains and matrices whose backward forgets a sum, or to transpose.

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


# Missing sum


@fault("missing_sum", "features.1", "Affine2d")
def affine_last_sample(bad):
    """A per-channel gain and shift; the loop over samples assigns where it should add."""

    class Affine2d(Function):
        @staticmethod
        def forward(ctx, x, gain, shift):
            ctx.save_for_backward(x, gain)
            return x * gain[:, None, None] + shift[:, None, None]

        @staticmethod
        def backward(ctx, grad):
            x, gain = ctx.saved_tensors
            g_gain = torch.zeros_like(gain)
            g_shift = torch.zeros_like(gain)
            for b in range(len(x)):
                one, two = (grad[b] * x[b]).sum((1, 2)), grad[b].sum((1, 2))
                if bad:
                    g_gain, g_shift = one, two
                else:
                    g_gain, g_shift = g_gain + one, g_shift + two
            return grad * gain[:, None, None], g_gain, g_shift

    class ChannelAffine(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(c))
            self.shift = nn.Parameter(torch.zeros(c))

        def forward(self, x):
            return Affine2d.apply(x, self.gain, self.shift)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(2, 5, 3), ChannelAffine(5), nn.GELU(), nn.Conv2d(5, 3, 3))

        def forward(self, x):
            return self.features(x).mean((2, 3)).logsumexp(-1).sum()

    return Net(), (torch.randn(5, 2, 8, 8),)


@fault("missing_sum some_elements", "encoder.table", "Lookup")
def embedding_overwrites(bad):
    """Bag of words: a token that comes twice keeps only its last gradient."""

    class Lookup(Function):
        @staticmethod
        def forward(ctx, table, idx):
            ctx.save_for_backward(idx)
            ctx.rows = table.shape
            return table[idx]

        @staticmethod
        def backward(ctx, grad):
            (idx,) = ctx.saved_tensors
            out = grad.new_zeros(ctx.rows)
            if bad:
                out[idx.flatten()] = grad.flatten(0, -2)
            else:
                out.index_add_(0, idx.flatten(), grad.flatten(0, -2))
            return out, None

    class Table(nn.Module):
        def __init__(self, n, d):
            super().__init__()
            self.weight = nn.Parameter(0.3 * torch.randn(n, d))

        def forward(self, idx):
            return Lookup.apply(self.weight, idx)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = Table(10, 6)
            self.proj = nn.Linear(6, 6)

        def forward(self, idx):
            return torch.tanh(self.proj(self.table(idx))).mean(1)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Encoder()
            self.out = nn.Linear(6, 4)

        def forward(self, idx, y):
            return F.nll_loss(F.log_softmax(self.out(self.encoder(idx)), -1), y)

    return Classifier(), (torch.tensor([[1, 1, 2, 9], [3, 2, 2, 0]]), torch.tensor([3, 1]))


@fault("missing_sum some_elements", "layers.0.gather layers.1.gather", "Gather")
def graph_gather_overwrites(bad):
    """Message passing over edges: a node with several outgoing edges keeps one message's gradient."""

    class Gather(Function):
        @staticmethod
        def forward(ctx, h, index):
            ctx.save_for_backward(index)
            ctx.n = len(h)
            return h.index_select(0, index)

        @staticmethod
        def backward(ctx, grad):
            (index,) = ctx.saved_tensors
            out = grad.new_zeros(ctx.n, grad.shape[1])
            return out.index_put((index,), grad, accumulate=not bad), None

    class EdgeGather(nn.Module):
        def forward(self, h, index):
            return Gather.apply(h, index)

    class Layer(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.lin = nn.Linear(2 * a, b)
            self.gather = EdgeGather()

        def forward(self, h, edges):
            m = self.gather(h, edges[0])
            agg = torch.zeros_like(h).index_add(0, edges[1], m)
            return F.softplus(self.lin(torch.cat((h, agg), -1)))

    class GNN(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 6)
            self.layers = nn.ModuleList([Layer(6, 6), Layer(6, 4)])
            self.read = nn.Linear(4, 1)

        def forward(self, x, edges):
            h = self.embed(x)
            for layer in self.layers:
                h = layer(h, edges)
            return self.read(h.sum(0)).squeeze()

    edges = torch.tensor([[0, 0, 0, 1, 2, 3, 3, 4], [1, 2, 3, 0, 0, 4, 5, 5]])
    return GNN(), (torch.randn(6, 3), edges)


# Transposed


@fault("transposed", "rotate", "RotationLinear")
def square_linear_transposed(bad):
    """y = x W' with a square W: nothing but the numbers tells W from W'."""

    class RotationLinear(Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.t()

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return (grad @ weight.t() if bad else grad @ weight), grad.t() @ x

    class Rotate(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(d, d) / d**0.5)

        def forward(self, x):
            return RotationLinear.apply(x, self.weight)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp = nn.Linear(4, 7)
            self.rotate = Rotate(7)
            self.act = nn.Softsign()
            self.out = nn.Linear(7, 2)

        def forward(self, x):
            return self.out(self.act(self.rotate(self.inp(x))))

    return Net(), (torch.randn(6, 4),)


@fault("transposed", "propagate", "SpMM")
def directed_adjacency(bad):
    """Graph convolution on a directed graph, backward with A where A' belongs."""

    class SpMM(Function):
        @staticmethod
        def forward(ctx, adjacency, h):
            ctx.adjacency = adjacency
            return torch.sparse.mm(adjacency, h)

        @staticmethod
        def backward(ctx, grad):
            a = ctx.adjacency
            return None, torch.sparse.mm(a if bad else a.t(), grad)

    class Propagate(nn.Module):
        def __init__(self, a):
            super().__init__()
            self.register_buffer("a", a)

        def forward(self, h):
            return SpMM.apply(self.a, h)

    class GCN(nn.Module):
        def __init__(self, a):
            super().__init__()
            self.first = nn.Linear(5, 8, bias=False)
            self.second = nn.Linear(8, 3)
            self.propagate = Propagate(a)

        def forward(self, x, y):
            h = torch.tanh(self.first(x))
            return F.cross_entropy(self.second(self.propagate(h)), y)

    a = torch.zeros(6, 6)
    for i, j in ((0, 1), (0, 2), (1, 3), (2, 3), (3, 4), (5, 0), (4, 4)):
        a[i, j] = 0.5 + 0.1 * i
    return GCN(a.to_sparse()), (torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2]))
