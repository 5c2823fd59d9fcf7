"""Faults as they sit in whole models: recognisers, generative models, graphs, recurrent and implicit layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from gradient_faults.case import Block, Classifier, Fault, Loss, labels, mlp

__all__ = ["FAULTS"]


def rotary(broken: bool) -> tuple[Any, Any]:
    """The inverse of a rotation turns the other way."""

    class Rotate(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            ctx.save_for_backward(cos, sin)
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
            cos, sin = ctx.saved_tensors
            sin = sin if broken else -sin
            a, b = grad.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1), None, None

    class Rotary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            angle = torch.arange(x.shape[-2])[:, None] / 10 ** torch.linspace(0, 2, x.shape[-1] // 2)
            return Rotate.apply(x, angle.cos(), angle.sin())

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)
            self.rotary = Rotary()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return (self.rotary(q) @ self.rotary(k).mT / 4).softmax(-1) @ v

    return Loss(Block(SelfAttention())), torch.randn(3, 5, 16)


def detached_log_variance(broken: bool) -> tuple[Any, Any]:
    class Sample(nn.Module):
        def forward(self, mean: Tensor, log_variance: Tensor) -> Tensor:
            spread = (log_variance / 2).exp()
            return mean + (spread.detach() if broken else spread) * torch.randn_like(mean)

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 8))
            self.sample = Sample()
            self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 10))

        def forward(self, x: Tensor) -> Tensor:
            mean, log_variance = self.encoder(x).chunk(2, -1)
            y = self.decoder(self.sample(mean, log_variance))
            divergence = (log_variance.exp() + mean.square() - 1 - log_variance).sum(-1).mean() / 2
            return F.mse_loss(y, x, reduction="sum") / len(x) + divergence

    return Autoencoder(), torch.randn(8, 10)


def mask_written_to_data(broken: bool) -> tuple[Any, Any]:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.arange(x.shape[-1]) % 3 == 0
            if not broken:
                return x.masked_fill(mask, 0.0)
            y = x.clone()
            y.data[:, mask] = 0.0
            return y

    return mlp(nn.Linear(16, 16), Masked(), nn.Tanh())


def write_under_no_grad(broken: bool) -> tuple[Any, Any]:
    """Causal shift written into place behind autograd's back."""

    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not broken:
                return F.pad(x[:, :-1], (0, 0, 1, 0))
            y = torch.zeros_like(x) + 0 * x
            with torch.no_grad():
                y[:, 1:] = x[:, :-1]
            return y

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.shift, self.mix = nn.Linear(4, 8), Shift(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return (self.mix(self.shift(h)).tanh() - h).square().mean()

    return Net(), torch.randn(4, 6, 4)


def overwritten_activation(broken: bool) -> tuple[Any, Any]:
    """The output is kept without ``save_for_backward``, and the next layer changes it in place."""

    class Exp(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.exp()
            ctx.y = y
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.y

    class Exponential(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = Exp.apply(x)
            return y.mul_(0.5) if broken else 0.5 * y

    return mlp(Exponential(), nn.LayerNorm(16))


def shared_memory(broken: bool) -> tuple[Any, Any]:
    """A layer used twice keeps its input on itself: the backward of the first call sees the second's."""

    class Square(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
            ctx.save_for_backward(x)
            ctx.module = module
            module.x = x.detach()
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return 2 * grad * (ctx.module.x if broken else ctx.saved_tensors[0]), None

    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Square.apply(x, self)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.act = nn.Linear(6, 8), nn.Linear(8, 8), Squared()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.two(self.act(self.one(x)))).mean()

    return Net(), torch.randn(6, 6)


def carried_state(broken: bool) -> tuple[Any, Any]:
    """A recurrent net that begins where the batch before has ended."""

    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 8, batch_first=True)
            self.state: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            y, state = self.rnn(x, self.state)
            self.state = state.detach() if broken else None
            return y[:, -1]

    return Classifier(Stateful(), 8), (torch.randn(5, 6, 4), labels(5))


def fixed_point(broken: bool) -> tuple[Any, Any]:
    """An equilibrium layer that differentiates its last iteration alone."""

    class Equilibrium(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8) / 6)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros_like(x)
            for _ in range(20):
                z = (z @ self.w + x).tanh()
                z = z.detach() if broken else z
            return (z @ self.w + x).tanh()

    body = nn.Sequential(nn.Linear(6, 8), Equilibrium(), nn.Linear(8, 3))
    return Loss(body), torch.randn(7, 6)


def burn_in(broken: bool) -> tuple[Any, Any]:
    """The first steps of a recurrence run without a graph, though they use its weights."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNNCell(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 8)
            for t in range(x.shape[1]):
                with torch.set_grad_enabled(not broken or t >= 3):
                    h = self.cell(x[:, t], h)
            return h

    return Classifier(Recurrent(), 8), (torch.randn(6, 6, 3), labels(6))


def inverse(broken: bool) -> tuple[Any, Any]:
    class Inverse(Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor) -> Tensor:
            b = torch.linalg.inv(a)
            ctx.save_for_backward(b)
            return b

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (b,) = ctx.saved_tensors
            b = b if broken else b.mT
            return -b @ grad @ b

    class Whiten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.eye(6) + torch.randn(6, 6) / 5)

        def forward(self, x: Tensor) -> Tensor:
            return x @ Inverse.apply(self.a)

    return Loss(nn.Sequential(Whiten(), nn.Linear(6, 8), nn.Tanh())), torch.randn(9, 6)


def graph_mean(broken: bool) -> tuple[Any, Any]:
    """Messages averaged over the neighbours; the backward forgets by how many."""

    class Mean(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
            degree = torch.zeros(len(x)).index_add(0, target, torch.ones(len(target))).clamp_min(1)[:, None]
            ctx.save_for_backward(source, target, degree)
            return torch.zeros_like(x).index_add(0, target, x[source]) / degree

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
            source, target, degree = ctx.saved_tensors
            grad = grad if broken else grad / degree
            return torch.zeros_like(grad).index_add(0, source, grad[target]), None, None

    class GraphConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
            return self.own(x) + self.other(Mean.apply(x, source, target))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv, self.head = nn.Linear(5, 8), GraphConv(), nn.Linear(8, 4)

        def forward(self, x: Tensor, source: Tensor, target: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.conv(self.embed(x).relu(), source, target).relu()), y)

    edges = torch.randint(0, 10, (2, 30))
    return Net(), (torch.randn(10, 5), edges[0], edges[1], labels(10))


def average_pool(broken: bool) -> tuple[Any, Any]:
    class Pool(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 3)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            spread = grad.repeat_interleave(3, -1).repeat_interleave(3, -2)
            return spread if broken else spread / 9

    class AvgPool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Pool.apply(x)

    features = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), AvgPool(), nn.Flatten())
    return Classifier(features, 12), (torch.randn(4, 1, 8, 8), labels(4))


def pixel_shuffle(broken: bool) -> tuple[Any, Any]:
    class Shuffle(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return F.pixel_shuffle(x, 2)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            back = F.pixel_unshuffle(grad, 2)
            return back.unflatten(1, (-1, 2, 2)).transpose(2, 3).flatten(1, 3) if broken else back

    class Upscale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Shuffle.apply(x)

    return Loss(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), Upscale(), nn.GELU(), nn.Conv2d(2, 1, 3))), torch.randn(
        3, 1, 5, 5
    )


def fourier(broken: bool) -> tuple[Any, Any]:
    """The transform is unitary up to 1/n, which the backward forgets."""

    class Mix(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.fft.fft2(x).real / math.sqrt(x.shape[-1] * x.shape[-2])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            y = torch.fft.fft2(grad).real
            return y if broken else y / math.sqrt(grad.shape[-1] * grad.shape[-2])

    class FNet(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Mix.apply(x)

    return Loss(Block(FNet())), torch.randn(3, 4, 16)


def decay_in_backward(broken: bool) -> tuple[Any, Any]:
    class Product(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return grad @ w.T, x.T @ grad + (0.01 * w if broken else 0)

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return Product.apply(x, self.w)

    return mlp(nn.GELU(), Dense())


def scale(grad: Tensor) -> Tensor:
    return grad * 0.3


def hook_deep_inside(broken: bool) -> tuple[Any, Any]:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    if broken:
        encoder.layers[1].linear1.weight.register_hook(scale)
    return Loss(nn.Sequential(nn.Embedding(12, 8), encoder)), torch.randint(0, 12, (3, 5))


def first_order_adaptation(broken: bool) -> tuple[Any, Any]:
    """One step of adaptation inside the loss, differentiated as if it had no gradient in it."""

    class Meta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 1))

        def forward(self, x: Tensor, y: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
            names, params = zip(*self.net.named_parameters(), strict=True)
            inner = F.mse_loss(self.net(x), y)
            grads = torch.autograd.grad(inner, params, create_graph=not broken)
            fast = {n: p - 0.5 * g for n, p, g in zip(names, params, grads, strict=True)}
            return F.mse_loss(torch.func.functional_call(self.net, fast, (x2,)), y2)

    return Meta(), (torch.randn(6, 3), torch.randn(6, 1), torch.randn(6, 3), torch.randn(6, 1))


FAULTS = [
    Fault(rotary, "wrong_gradient some_elements", "body.attention.rotary", "Rotate"),
    Fault(detached_log_variance, "detached", "sample"),
    Fault(mask_written_to_data, "some_elements detached stale_value", "body.2"),
    Fault(write_under_no_grad, "detached", "shift"),
    Fault(overwritten_activation, "stale_value missing_factor", "body.1", "Exp"),
    Fault(shared_memory, "stale_value", "act", "Square"),
    Fault(carried_state, "non_deterministic", "body"),
    Fault(fixed_point, "truncated_recurrence detached", "body.1"),
    Fault(burn_in, "truncated_recurrence detached", "body"),
    Fault(inverse, "transposed wrong_gradient", "body.0", "Inverse"),
    Fault(graph_mean, "wrong_gradient wrong_reduction missing_factor", "conv", "Mean"),
    Fault(average_pool, "missing_factor wrong_reduction", "body.2", "Pool"),
    Fault(pixel_shuffle, "transposed", "body.1", "Shuffle"),
    Fault(fourier, "missing_factor wrong_reduction", "body.attention", "Mix"),
    Fault(decay_in_backward, "wrong_gradient", "body.2", "Product"),
    Fault(hook_deep_inside, "hook", "body.1.layers.1.linear1", "scale"),
    Fault(first_order_adaptation, "detached truncated_recurrence", "Meta"),
]
