"""Backwards that remember the wrong value, or overwrite a gradient that others share.

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


# Stale value


@fault("stale_value", "act", "Gate")
def class_attribute_cache(bad):
    """The activation is used twice in a forward; it remembers its input on the class, not in ctx."""

    class Gate(Function):
        last = None

        @staticmethod
        def forward(ctx, x):
            if bad:
                Gate.last = x
            else:
                ctx.save_for_backward(x)
            return x * torch.sigmoid(x)

        @staticmethod
        def backward(ctx, grad):
            x = Gate.last if bad else ctx.saved_tensors[0]
            s = torch.sigmoid(x)
            return grad * s * (1 + x * (1 - s))

    class FastSwish(nn.Module):
        def forward(self, x):
            return Gate.apply(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 9)
            self.b = nn.Linear(9, 9)
            self.c = nn.Linear(9, 1)
            self.act = FastSwish()

        def forward(self, x, y):
            h = self.act(self.a(x))
            h = self.act(self.b(h))
            return (self.c(h) - y).square().mean()

    return Net(), (torch.randn(6, 4), torch.randn(6, 1))


@fault("stale_value", "act1 Siren")
def overwritten_input(bad):
    """The activation keeps its input in ctx as a plain attribute, and the next layer overwrites it in place."""

    class SavedByReference(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.x = x if bad else x.clone()
            return torch.sin(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.cos(ctx.x)

    class Sine(nn.Module):
        def forward(self, x):
            return SavedByReference.apply(x)

    class Siren(nn.Module):
        def __init__(self):
            super().__init__()
            self.l1, self.act1 = nn.Linear(2, 12), Sine()
            self.l2 = nn.Linear(12, 12)
            self.l3 = nn.Linear(12, 1)

        def forward(self, x, y):
            pre = self.l1(3 * x)
            h = self.act1(pre)
            pre.data.mul_(0.5)  # the buffer is used again for the skip path
            h = torch.sin(self.l2(h)) + 0 * pre.detach()
            return F.mse_loss(self.l3(h), y)

    return Siren(), (torch.rand(9, 2), torch.randn(9, 1))


# Inplace grad


@fault("inplace_grad", "stages.0.act stages.1.act", "LeakyInplace")
def residual_inplace_backward(bad):
    """x + act(x): the backward scales grad_output in place, and the skip path shares it."""

    class LeakyInplace(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x > 0)
            return torch.where(x > 0, x, 0.1 * x)

        @staticmethod
        def backward(ctx, grad):
            (positive,) = ctx.saved_tensors
            if not bad:
                grad = grad.clone()
            grad[~positive] *= 0.1
            return grad

    class Act(nn.Module):
        def forward(self, x):
            return LeakyInplace.apply(x)

    class Stage(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.conv = nn.Conv1d(d, d, 3, padding=1)
            self.act = Act()

        def forward(self, x):
            x = self.conv(x)
            return x + self.act(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.Sequential(Stage(4), Stage(4))

        def forward(self, x):
            return self.stages(x).square().mean()

    return Net(), (torch.randn(3, 4, 10),)


@fault("inplace_grad", "left.mask right.mask", "BlockMask")
def two_towers_inplace(bad):
    """Two towers are added; the first tower's mask zeroes the shared gradient."""

    class BlockMask(Function):
        @staticmethod
        def forward(ctx, x, mask):
            ctx.mask = mask
            return x * mask

        @staticmethod
        def backward(ctx, grad):
            return (grad.mul_(ctx.mask) if bad else grad * ctx.mask), None

    class FeatureMask(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.register_buffer("keep", keep)

        def forward(self, x):
            return BlockMask.apply(x, self.keep)

    class Tower(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.lin = nn.Linear(5, 6)
            self.mask = FeatureMask(keep)

        def forward(self, x):
            return self.mask(self.lin(x))

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = Tower(torch.tensor([1.0, 1, 1, 0, 0, 0]))
            self.right = Tower(torch.tensor([0.0, 0, 1, 1, 1, 1]))
            self.temperature = nn.Parameter(torch.tensor(1.5))

        def forward(self, a, b, y):
            return F.cross_entropy((self.left(a) + self.right(b)) * self.temperature, y)

    return Late(), (torch.randn(8, 5), torch.randn(8, 5), torch.randint(0, 6, (8,)))
