"""Right first derivatives whose second derivative or forward mode is wrong.

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


# Second derivative


@fault("second_derivative", "act.0 act", "FastSigmoid", check="hessian")
def sigmoid_saves_slope(bad):
    """The slope is computed in the forward and saved: right once, constant when differentiated again."""

    class FastSigmoid(Function):
        @staticmethod
        def forward(ctx, x):
            y = torch.sigmoid(x)
            if bad:
                ctx.save_for_backward(y * (1 - y))
            else:
                ctx.save_for_backward(x)
            return y

        @staticmethod
        def backward(ctx, grad):
            (saved,) = ctx.saved_tensors
            if bad:
                return grad * saved
            s = torch.sigmoid(saved)
            return grad * s * (1 - s)

    class Act(nn.Module):
        def forward(self, x):
            return FastSigmoid.apply(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l1 = nn.Linear(3, 6)
            self.act = nn.Sequential(Act())
            self.l2 = nn.Linear(6, 1)

        def forward(self, x, y):
            return (self.l2(self.act(self.l1(x))) - y).square().mean()

    return Net(), (2 * torch.randn(7, 3), 4 + 3 * torch.randn(7, 1))


@fault("second_derivative", "field.act", "FusedTanh")
def pinn_second_derivative(bad):
    """Physics-informed: the loss contains u', and the activation's backward is not differentiable itself."""

    class FusedTanh(Function):
        @staticmethod
        def forward(ctx, x):
            y = torch.tanh(x)
            if bad:
                ctx.slope = 1 - y * y
            else:
                ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, grad):
            if bad:
                return grad * ctx.slope
            (y,) = ctx.saved_tensors
            return grad * (1 - y * y)

    class Act(nn.Module):
        def forward(self, x):
            return FusedTanh.apply(x)

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.l1, self.l2, self.l3 = nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 1)
            self.act = Act()

        def forward(self, t):
            return self.l3(torch.tanh(self.l2(self.act(self.l1(t)))))

    class Pinn(nn.Module):
        def __init__(self):
            super().__init__()
            self.field = Field()

        def forward(self, t):
            t = t.detach().requires_grad_()
            u = self.field(t)
            (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
            return (du + u).square().mean() + (self.field(torch.zeros_like(t[:1])) - 1).square().sum()

    return Pinn(), (torch.linspace(0, 2, 9)[:, None],)


# Forward mode


@fault("forward_mode", "act", "Mish", check="hessian")
def jvp_forgets_term(bad):
    class Mish(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)
            return x * torch.tanh(F.softplus(x))

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            t = torch.tanh(F.softplus(x))
            return grad * (t + x * (1 - t * t) * torch.sigmoid(x))

        @staticmethod
        def jvp(ctx, dx):
            (x,) = ctx.saved_tensors
            t = torch.tanh(F.softplus(x))
            slope = t if bad else t + x * (1 - t * t) * torch.sigmoid(x)
            return dx * slope

    class Act(nn.Module):
        def forward(self, x):
            return Mish.apply(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.act, self.out = nn.Linear(3, 6), Act(), nn.Linear(6, 2)

        def forward(self, x, y):
            return F.cross_entropy(self.out(self.act(self.inp(x))), y)

    return Net(), (torch.randn(6, 3), torch.randint(0, 2, (6,)))


@fault("forward_mode", "scale", "Modulate", check="hessian")
def jvp_second_argument_sign(bad):
    """FiLM: x * (1 + g); the tangent of g enters with a minus."""

    class Modulate(Function):
        @staticmethod
        def forward(ctx, x, g):
            ctx.save_for_backward(x, g)
            ctx.save_for_forward(x, g)
            return x * (1 + g)

        @staticmethod
        def backward(ctx, grad):
            x, g = ctx.saved_tensors
            return grad * (1 + g), grad * x

        @staticmethod
        def jvp(ctx, dx, dg):
            x, g = ctx.saved_tensors
            dx = torch.zeros_like(x) if dx is None else dx
            dg = torch.zeros_like(g) if dg is None else dg
            return dx * (1 + g) + (-1 if bad else 1) * x * dg

    class Film(nn.Module):
        def __init__(self, c, d):
            super().__init__()
            self.to_gain = nn.Linear(c, d)

        def forward(self, x, cond):
            return Modulate.apply(x, self.to_gain(cond))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp = nn.Linear(4, 6)
            self.scale = Film(3, 6)
            self.out = nn.Linear(6, 1)

        def forward(self, x, cond, y):
            h = torch.tanh(self.scale(self.inp(x), cond))
            return (self.out(h) - y).square().mean()

    return Net(), (torch.randn(6, 4), torch.randn(6, 3), torch.randn(6, 1))
