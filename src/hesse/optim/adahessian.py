"""AdaHessian: Adam with the diagonal of the Hessian in place of the gradient's squares.

The direction is -m / (sqrt(v) + eps) with m the moving average of gradients and v that of squared guesses of diag H;
within a convolution's kernel the guesses are averaged first, since neighbouring weights curve alike and one guess is
noise. With gradients in place of the guesses it is Adam; with beta2 = 0 and a diagonal Hessian, Newton's method.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.optimizer import ParamsT

from hesse.optim.diagonal import Diagonal, Draws, Pass, hutchinson
from hesse.tree import Params

__all__ = ["AdaHessian"]


class AdaHessian(Diagonal):
    """Adam with the diagonal of the Hessian, from one Hessian-vector product with random signs.

    With g the gradient, D = z * (H z) for random signs z, averaged over the kernel of each convolution layer::

        m = beta1 m + (1 - beta1) g                 v = beta2 v + (1 - beta2) D^2
        x = x - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^s)) + eps)

    t counts the parameter's steps and s the guesses of its curvature. A parameter whose curvature was never seen (it is
    no part of the closure's model, or the gradient does not depend on it) moves along the momentum, as in SGD: without
    curvature ``eps`` would set the step.

    A step with curvature costs about 2.5 gradients. When it is due, ``step`` takes :func:`hesse.closure`; loss,
    gradient and product then share one pass forward. The others take any closure, or none after ``loss.backward()``.

    Args:
        params: parameters, named parameters, or groups of either, as for every optimiser of torch.
        lr: learning rate. Newton's is 1; noise wants less.
        betas: of the moving averages of gradient and squared curvature.
        eps: added to the root.
        every: steps from one look at the curvature to the next.
        weight_decay: L2, decoupled as in AdamW, or, with ``decoupled_weight_decay=False``, added to the gradient.
        l1: threshold of the proximal step, times ``lr``: weights become exactly zero.
        maximize: climb.
        seed: of the random signs.

    Raises:
        ValueError: a setting is out of its range.
        TypeError: (at a step) curvature is due and the closure is none of :func:`hesse.closure`.
        hesse.curvature.DerivativeError: (at a step) no way of differentiating the model twice is right.

    References:
        Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney, ADAHESSIAN: an adaptive second order optimizer for machine
        learning, AAAI 2021.

    Example:
        Where the Hessian is diagonal, the first step with lr=1 is Newton's. Minimise (3 (x - 1)^2 + (y - 2)^2) / 2:

        >>> import hesse
        >>> model = nn.Linear(2, 1, bias=False)
        >>> loss_fn = lambda _, target: 0.5 * (torch.tensor([3.0, 1.0]) * (model.weight[0] - target) ** 2).sum()
        >>> optimizer = AdaHessian(model.parameters(), lr=1.0, eps=0.0)
        >>> loss = optimizer.step(hesse.closure(model, loss_fn, (torch.zeros(1, 2), torch.tensor([1.0, 2.0]))))
        >>> [round(w, 5) for w in model.weight[0].tolist()]
        [1.0, 2.0]
    """

    twice: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.15,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        every: int = 1,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        l1: float = 0.0,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "every": every,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "maximize": maximize,
            "seed": seed,
            "steps": 0,
            "rejections": 0,
        }
        super().__init__(params, defaults)

    def curvature(self, seen: Pass, draws: Draws) -> Params:
        return smooth(seen.objective.model, hutchinson(seen, draws))

    def begin(self, state: dict[str, Tensor], like: Tensor) -> None:
        state["momentum"] = torch.zeros_like(like)
        state["hessian_sq"] = torch.zeros_like(like)
        state["momentum_weight"] = like.new_zeros(())  # 1 - beta1^t
        state["hessian_weight"] = like.new_zeros(())  # 1 - beta2^s

    def learn(self, group: dict[str, Any], state: dict[str, Tensor], value: Tensor) -> None:
        beta2 = group["betas"][1]
        state["hessian_sq"].lerp_(value.square(), 1 - beta2)
        state["hessian_weight"].mul_(beta2).add_(1 - beta2)

    def directions(
        self, group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Any]], params: list[Tensor]
    ) -> list[Tensor]:
        beta1 = group["betas"][0]
        torch._foreach_lerp_([state["momentum"] for state in states], grads, 1 - beta1)
        found = []
        for state in states:
            weight = state["momentum_weight"].mul_(beta1).add_(1 - beta1)
            momentum = state["momentum"] / weight
            found.append(adahessian(momentum, state["hessian_sq"], state["hessian_weight"], group["eps"]))
        return found


def adahessian(momentum: Tensor, hessian_sq: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``-momentum / (sqrt(hessian_sq / weight) + eps)``, and ``-momentum`` where the weight is zero.

    Args:
        momentum, hessian_sq: of one parameter, alike in shape.
        weight: how much of ``hessian_sq`` is guesses, the rest being its start at zero; a scalar.
    """
    seen = weight > 0
    root = (hessian_sq / torch.where(seen, weight, 1.0)).sqrt()
    return -momentum / torch.where(seen, root + eps, 1.0)


def smooth(model: nn.Module, guess: Params) -> Params:
    """The guesses, those of convolution kernels [out, in, *kernel] averaged over the kernel."""
    kernels = {id(module.weight) for module in model.modules() if isinstance(module, _ConvNd)}
    names = {name for name, p in model.named_parameters() if id(p) in kernels}
    return {
        name: value.mean(tuple(range(2, value.ndim)), keepdim=True).expand_as(value) if name in names else value
        for name, value in guess.items()
    }
