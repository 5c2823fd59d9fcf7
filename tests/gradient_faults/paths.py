"""Faults without a wrong formula: gradients that stop, are hooked, edited, remembered or cut between steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

import hesse
from gradient_faults.case import Block, Classifier, Fault, Loss, labels, mlp

__all__ = ["FAULTS"]

# ---- detached --------------------------------------------------------------------------------------------


def detached_statistics(broken: bool) -> tuple[Any, Any]:
    class RMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            scale = x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
            scale = scale.detach() if broken else scale
            return x * scale * self.weight

    return mlp(RMSNorm(), nn.ReLU())


def data_of_a_weight(broken: bool) -> tuple[Any, Any]:
    class TiedDecoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            self.mix = nn.Linear(8, 8)

        def forward(self, words: Tensor) -> Tensor:
            h = self.mix(self.embedding(words[:, :-1])).tanh()
            weight = self.embedding.weight.data if broken else self.embedding.weight
            return F.cross_entropy((h @ weight.T).flatten(0, 1), words[:, 1:].flatten())

    return TiedDecoder(), torch.randint(0, 20, (4, 6))


def no_grad_in_residual(broken: bool) -> tuple[Any, Any]:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)
            self.gate = nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(not broken):
                gate = torch.sigmoid(self.gate(x))
            return x + gate * self.inner(x).relu()

    return mlp(Residual(), nn.LayerNorm(16))


def item_as_scale(broken: bool) -> tuple[Any, Any]:
    class Normalised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scale = x.std().item() if broken else x.std()
            return x / scale

    return mlp(nn.Tanh(), Normalised())


def through_numpy(broken: bool) -> tuple[Any, Any]:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if broken:
                energy = torch.from_numpy(np.square(x.detach().numpy())).mean(-1, keepdim=True)
            else:
                energy = x.square().mean(-1, keepdim=True)
            return torch.cat([x, energy.log1p()], -1)

    body = nn.Sequential(nn.Linear(6, 8), nn.GELU(), Spectrum(), nn.Linear(9, 3))
    return Loss(body), torch.randn(10, 6)


def copied_tensor(broken: bool) -> tuple[Any, Any]:
    """A learned temperature that was copied into a fresh tensor."""

    class CosineHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))
            self.temperature = nn.Parameter(torch.tensor([3.0]))

        def forward(self, x: Tensor) -> Tensor:
            t = torch.tensor(self.temperature.tolist()) if broken else self.temperature
            return t * F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=-1).T

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
            self.head = CosineHead()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.features(x)), y)

    return Net(), (torch.randn(8, 6), labels(8))


def router_without_gradient(broken: bool) -> tuple[Any, Any]:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(16, 3)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            weights = self.router(x).softmax(-1)
            values, chosen = weights.topk(2, -1)
            values = values.detach() if broken else values
            gates = torch.zeros_like(weights).scatter(-1, chosen, values)
            return sum(g * expert(x) for g, expert in zip(gates.split(1, -1), self.experts, strict=True))

    return mlp(Mixture(), nn.Tanh())


def focal_loss(broken: bool) -> tuple[Any, Any]:
    def focal(scores: Tensor, labels: Tensor) -> Tensor:
        log_p = F.log_softmax(scores, -1).gather(1, labels[:, None])[:, 0]
        p = log_p.detach().exp() if broken else log_p.exp()
        return -((1 - p) ** 2 * log_p).mean()

    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    return hesse.closure(model, focal, (torch.randn(9, 6), labels(9))), None


def penalty_on_data(broken: bool) -> tuple[Any, Any]:
    class Ridge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            weights = [p.data if broken else p for p in self.net.parameters()]
            return F.mse_loss(self.net(x), y) + 0.05 * sum(w.square().sum() for w in weights)

    return Ridge(), (torch.randn(10, 6), torch.randn(10, 1))


def frozen_by_none(broken: bool) -> tuple[Any, Any]:
    """A Function that returns None for one of its inputs."""

    class Affine(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x * w + b

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
            x, w = ctx.saved_tensors
            return grad * w, None if broken else (grad * x).sum(0), grad.sum(0)

    class Affined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.rand(16) + 0.5), nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            return Affine.apply(x, self.w, self.b)

    return mlp(nn.BatchNorm1d(16, affine=False), Affined(), nn.ReLU())


# ---- hooks -----------------------------------------------------------------------------------------------


def halve(module: nn.Module, grad_input: tuple[Tensor, ...], grad_output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(0.5 * g for g in grad_input)


def module_hook(broken: bool) -> tuple[Any, Any]:
    act = nn.Tanh()
    if broken:
        act.register_full_backward_hook(halve)
    return mlp(nn.Linear(16, 16), act)


def clip(grad: Tensor) -> Tensor:
    return grad.clamp(-1e-3, 1e-3)


def parameter_hook(broken: bool) -> tuple[Any, Any]:
    model, x = mlp(nn.Linear(16, 16), nn.ReLU())
    if broken:
        model.body[1].weight.register_hook(clip)
    return model, x


def watch_gradient(grad: Tensor) -> Tensor:
    return 10 * grad


def tensor_hook_in_forward(broken: bool) -> tuple[Any, Any]:
    class Feature(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.relu()
            if broken and y.requires_grad:
                y.register_hook(watch_gradient)
            return y

    features = nn.Sequential(nn.Conv1d(1, 3, 3), Feature(), nn.Conv1d(3, 3, 3), nn.Tanh(), nn.Flatten())
    return Classifier(features, 18), (torch.randn(5, 1, 10), labels(5))


def zero_first(module: nn.Module, grad_output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    g = grad_output[0].clone()
    g[:, 0] = 0
    return (g,)


def backward_pre_hook(broken: bool) -> tuple[Any, Any]:
    block = Block(nn.Linear(16, 16))
    if broken:
        block.mlp.register_full_backward_pre_hook(zero_first)
    return Loss(block), torch.randn(3, 4, 16)


# ---- in place, stale, stateful ---------------------------------------------------------------------------


def edited_gradient(broken: bool) -> tuple[Any, Any]:
    """The gradient that arrives is also that of the skip beside the layer."""

    class Sine(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad.mul_(x.cos()) if broken else grad * x.cos()

    class Residual(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Sine.apply(x) + x

    return mlp(Residual(), nn.Linear(16, 16), nn.Tanh())


def stale_input(broken: bool) -> tuple[Any, Any]:
    class Square(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
            ctx.save_for_backward(x if module.cache is None or not broken else module.cache)
            module.cache = x.detach().clone()
            return x * x.abs()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return 2 * grad * ctx.saved_tensors[0].abs(), None

    class Cached(nn.Module):
        cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            return Square.apply(x, self)

    return mlp(Cached(), nn.LayerNorm(16))


def stale_weight(broken: bool) -> tuple[Any, Any]:
    """A transposed copy of the weight is kept for the backward, and never renewed."""

    class Product(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, copy: Tensor) -> Tensor:
            ctx.save_for_backward(x, copy if broken else w.T)
            return x @ w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
            x, wt = ctx.saved_tensors
            return grad @ wt, x.T @ grad, None

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16) / 4)
            self.copy: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.copy is None:
                self.copy = self.w.detach().T.clone()
            return Product.apply(x, self.w, self.copy)

    return mlp(nn.ReLU(), Dense())


# ---- recurrence ------------------------------------------------------------------------------------------


class Unrolled(nn.Module):
    """A cell run over time; ``between(state, t)`` is applied to the state before each step."""

    def __init__(self, cell: nn.Module, between: Callable[[Any, int], Any]) -> None:
        super().__init__()
        self.cell, self.between = cell, between

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], self.between(state, t))
        return state[0] if isinstance(state, tuple) else state


def truncated_gru(broken: bool) -> tuple[Any, Any]:
    def between(h: Tensor | None, t: int) -> Tensor | None:
        return h.detach() if broken and h is not None and t % 3 == 0 else h

    return Classifier(Unrolled(nn.GRUCell(4, 8), between), 8), (torch.randn(6, 7, 4), labels(6))


def truncated_lstm(broken: bool) -> tuple[Any, Any]:
    def between(state: Any, t: int) -> Any:
        return tuple(s.detach() for s in state) if broken and state is not None else state

    return Classifier(Unrolled(nn.LSTMCell(4, 8), between), 8), (torch.randn(6, 5, 4), labels(6))


def gru_reset_gate(broken: bool) -> tuple[Any, Any]:
    """A hand-written cell whose backward forgets the path through the reset gate."""

    class Step(Function):
        @staticmethod
        def forward(ctx: Any, r: Tensor, u: Tensor, n: Tensor, m: Tensor, h: Tensor) -> Tensor:
            r, u = r.sigmoid(), u.sigmoid()
            new = (n + r * m).tanh()
            ctx.save_for_backward(r, u, new, m, h)
            return (1 - u) * new + u * h

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            r, u, new, m, h = ctx.saved_tensors
            to_n = grad * (1 - u) * (1 - new * new)
            to_r = torch.zeros_like(r) if broken else to_n * m * r * (1 - r)
            return to_r, grad * (h - new) * u * (1 - u), to_n, to_n * r, grad * u

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.h = nn.Linear(4, 24), nn.Linear(8, 24)

        def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
            h = x.new_zeros(len(x), 8) if h is None else h
            a, b = self.x(x).chunk(3, -1), self.h(h).chunk(3, -1)
            return Step.apply(a[0] + b[0], a[1] + b[1], a[2], b[2], h)

    return Classifier(Unrolled(Cell(), lambda h, t: h), 8), (torch.randn(5, 4, 4), labels(5))


FAULTS = [
    Fault(detached_statistics, "detached missing_sum", "body.1"),
    Fault(data_of_a_weight, "detached", "TiedDecoder"),
    Fault(no_grad_in_residual, "detached", "body.1"),
    Fault(item_as_scale, "detached", "body.2"),
    Fault(through_numpy, "detached", "body.2"),
    Fault(copied_tensor, "detached", "head"),
    Fault(router_without_gradient, "detached", "body.1"),
    Fault(focal_loss, "detached", "loss_fn()"),
    Fault(penalty_on_data, "detached", "Ridge"),
    Fault(frozen_by_none, "detached", "body.2", "Affine"),
    Fault(module_hook, "hook", "body.2", "halve"),
    Fault(parameter_hook, "hook", "body.1", "clip"),
    Fault(tensor_hook_in_forward, "hook", "body.1", "watch_gradient"),
    Fault(backward_pre_hook, "hook", "body.mlp", "zero_first"),
    Fault(edited_gradient, "inplace_grad", "body.1", "Sine"),
    Fault(stale_input, "stale_value", "body.1", "Square"),
    Fault(stale_weight, "stale_value", "body.2", "Product"),
    Fault(truncated_gru, "truncated_recurrence", "body"),
    Fault(truncated_lstm, "truncated_recurrence", "body"),
    Fault(gru_reset_gate, "detached", "body.cell", "Step"),
]
