"""What is in no catalogue: custom Functions, checkpoints, hooks, mixed precision, shared and frozen weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from covered.layers import TOKENS, Summed
from covered.subject import Fed, Subject, Table, fed, read, spread

__all__ = ["DIFFICULT", "FUNCTIONS"]


class Cube(torch.autograd.Function):
    """Its backward pass is made of torch operations on saved inputs: right at every order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class ForwardCube(Cube):
    """The same, with forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


class OnceCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class StaleSwish(torch.autograd.Function):
    """Saves its slope, which to autograd is a constant: right once, silently wrong twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = x.sigmoid()
        ctx.save_for_backward(s + x * s * (1 - s))
        return x * s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.saved_tensors[0] * grad


class StaleLinear(torch.autograd.Function):
    """Keeps detached copies of its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.x, ctx.w = x.detach().clone(), w.detach().clone()
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad @ ctx.w.mT, ctx.x.mT @ grad


class NumpySine(torch.autograd.Function):
    """Leaves torch in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x = ctx.saved_tensors[0]
        return torch.from_numpy(grad.detach().numpy() * np.cos(x.detach().numpy()))


class WrongOnce(torch.autograd.Function):
    """Already its first derivative is that of nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos() + grad.roll(1)


class Applied(nn.Module):
    """A custom Function in a layer, behind another one."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class AppliedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(spread(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return StaleLinear.apply(x.tanh(), self.weight)


# fmt: off
FUNCTIONS: Table = {
    "custom Function": lambda: fed(Applied(Cube.apply), spread(2, 2)),
    "custom Function, with forward mode": lambda: fed(Applied(ForwardCube.apply), spread(2, 2)),
    "custom Function, once_differentiable": lambda: fed(Applied(OnceCube.apply), spread(2, 2)),
    "custom Function, saved slope": lambda: fed(Applied(StaleSwish.apply), spread(2, 2)),
    "custom Function, detached copies": lambda: fed(AppliedLinear(), spread(2, 2)),
    "custom Function, by NumPy": lambda: fed(Applied(NumpySine.apply), spread(2, 2)),
    "custom Function, wrong gradient": lambda: fed(Applied(WrongOnce.apply), spread(2, 2)),
}
# fmt: on


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Dropout(0.2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # torch's own, without gradients
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Offloaded(nn.Module):
    """What is saved for backward goes elsewhere and comes back."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return x.tanh() * x.sin()


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.linear(x)
        return y.to(x.dtype).tanh()


def autocast() -> Subject:
    subject = fed(Autocast(), spread(2, 2))
    layer = nn.Sequential(copy.deepcopy(subject.model.layer.linear), nn.Tanh())
    # bfloat16 carries eight bits: the products of two roundings, each up to 2^-8, through three layers of arithmetic.
    return subject._replace(plain=subject._replace(model=Fed(layer, *subject.model.given)), error=5e-2)


def in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(2.0).exp_()


def forward_hook() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, args, output: 2 * output.sin())
    return layer


def forward_pre_hook() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    return layer


def in_place_hook() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(in_place)
    return layer


def backward_hook_that_looks() -> nn.Module:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return layer


def backward_hook_that_scales() -> nn.Module:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: (0.5 * grad_input[0],))
    return layer


class TensorHook(nn.Module):
    """Clips the gradient that flows back to the layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        return y * x


class Compiled(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.compiler.reset()  # or what another test compiled is used again
        self.inner = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # it looks
            return self.inner(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(2, 3), nn.Linear(3, 2)
        self.decoder.weight = nn.Parameter(spread(2, 3))
        self.other = nn.Linear(3, 2)
        self.other.weight = self.decoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.encoder(self.decoder(self.encoder(x).tanh())).tanh())


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.free = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.frozen(x).tanh()).sin()


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Force(nn.Module):
    """Its output is a gradient, as the forces of an energy are: the Hessian is a third derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def settled(layer: nn.Module) -> nn.Module:
    """Power iteration run to its end, as after some training. Every call goes on, and autograd does not see it."""
    for _ in range(200):
        layer(torch.zeros(1, 3))
    return layer


def straight_through(x: Tensor) -> Tensor:
    return x.sin() + (x.round() - x.sin()).detach()


# fmt: off
DIFFICULT: Table = {
    "checkpoint, use_reentrant=False": lambda: fed(Checkpointed(False), spread(2, 2)),
    "checkpoint, use_reentrant=True": lambda: fed(Checkpointed(True), spread(2, 2)),
    "saved tensors offloaded": lambda: fed(Offloaded(), spread(4)),
    "autocast to bfloat16": autocast,
    "forward hook that changes the output": lambda: fed(forward_hook(), spread(2, 2)),
    "forward hook in place": lambda: fed(in_place_hook(), spread(2, 2)),
    "forward pre-hook that changes the input": lambda: fed(forward_pre_hook(), spread(2, 2)),
    "backward hook that looks": lambda: fed(backward_hook_that_looks(), spread(2, 2)),
    "backward hook that scales the gradient": lambda: fed(backward_hook_that_scales(), spread(2, 2)),
    "tensor hook that clips the gradient": lambda: fed(TensorHook(), spread(2, 2)),
    "torch.compile, eager backend": lambda: fed(Compiled("eager"), spread(2, 2)),
    "torch.compile, autograd traced": lambda: fed(Compiled("aot_eager"), spread(2, 2)),
    "a parameter of no dimensions": lambda: fed(lambda x, s: (s * x).sin(), spread(3), torch.tensor(0.7)),
    "tied weights": lambda: read(Tied(), spread(2, 2)),
    "frozen weights": lambda: read(Frozen(), spread(2, 2)),
    "unused weights": lambda: read(Unused(), spread(2, 2)),
    "a gradient inside the model": lambda: fed(Force(), spread(2, 2)),
    "torch.func inside the model":
        lambda: fed(lambda x: torch.func.vmap(torch.func.grad(lambda z: z.sin().prod()))(x), spread(2, 3)),
    "torch.func.jvp inside the model":
        lambda: fed(lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1], spread(4)),
    "a part behind detach": lambda: fed(lambda x: x.cos() * x.detach().roll(1), spread(4)),
    "straight-through rounding": lambda: fed(lambda x: (straight_through(x) * x.roll(1)).cumsum(0), spread(4)),
    "Embedding, scale_grad_by_freq": lambda: read(Summed(nn.Embedding(4, 2, scale_grad_by_freq=True)), TOKENS),
    "spectral_norm, training": lambda: fed(settled(parametrizations.spectral_norm(nn.Linear(3, 2))), spread(2, 3)),
    "weight_norm as a function":
        lambda: fed(lambda v, g: F.linear(v, torch._weight_norm(v, g)), spread(2, 3), spread(2, 1)),
}
# fmt: on
