"""Sophia: momentum over a moving average of diagonal curvature, and no element further than lr.

The direction is clip(-m / max(gamma h, eps), 1), element by element. Where the curvature h is large against the
momentum the step is Newton's, over gamma; where it is small, negative, or not known, the step is that of signed
momentum (Lion without its interpolation). The clip is what lets one noisy guess in ten steps do: a wrong h can cost no
more than a step of sign descent.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hesse.optim.diagonal import Diagonal, Draws, Pass, bartlett, hutchinson
from hesse.tree import Params

__all__ = ["SophiaG", "SophiaH"]


class _Sophia(Diagonal):
    """What the two share: the rule and the moving averages, without correction for their start, as in the paper."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float],
        gamma: float,
        eps: float,
        every: int,
        weight_decay: float,
        decoupled_weight_decay: bool,
        l1: float,
        maximize: bool,
        seed: int,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "gamma": gamma,
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

    def begin(self, state: dict[str, Tensor], like: Tensor) -> None:
        state["momentum"] = torch.zeros_like(like)
        state["hessian"] = torch.zeros_like(like)

    def learn(self, group: dict[str, Any], state: dict[str, Tensor], value: Tensor) -> None:
        state["hessian"].lerp_(value, 1 - group["betas"][1])

    def directions(
        self, group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Any]], params: list[Tensor]
    ) -> list[Tensor]:
        momenta = [state["momentum"] for state in states]
        torch._foreach_lerp_(momenta, grads, 1 - group["betas"][0])
        hessians = [state["hessian"] for state in states]
        return sophia(momenta, hessians, group["gamma"], group["eps"])


class SophiaH(_Sophia):
    """Clipped momentum over the diagonal of the Hessian, from a product with random signs every ten steps.

    With g the gradient and D = z * (H z) for random signs z, every ``every`` steps::

        m = beta1 m + (1 - beta1) g                 h = beta2 h + (1 - beta2) D
        x = x - lr clip(m / max(gamma h, eps), 1)

    No element moves further than ``lr``. Where the curvature is negative or was never seen (the parameter is no part of
    the closure's model, or the gradient does not depend on it), it moves by ``lr`` in the sense of the momentum.

    Curvature costs about 1.5 gradients when it is looked at. When it is due, ``step`` takes :func:`hesse.closure`;
    loss, gradient and product then share one pass forward. The others take any closure, or none after
    ``loss.backward()``.

    Args:
        params: parameters, named parameters, or groups of either, as for every optimiser of torch.
        lr: learning rate, the longest step of an element. About that of Adam.
        betas: of the moving averages of gradient and curvature.
        gamma: how soon Newton's step is clipped: small means late curvature, 1 means Newton's step itself.
        eps: the least curvature.
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
        Liu, Li, Hall, Liang and Ma, Sophia: a scalable stochastic second-order optimizer for language model
        pre-training, ICLR 2024.

    Example:
        With no averaging and gamma=1, a diagonal Hessian gives Newton's step, lr times the way to the minimum:

        >>> import hesse
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> loss_fn = lambda _, target: 0.5 * (torch.tensor([3.0, 1.0]) * (model.weight[0] - target) ** 2).sum()
        >>> optimizer = SophiaH(model.parameters(), lr=0.5, betas=(0.0, 0.0), gamma=1.0)
        >>> loss = optimizer.step(hesse.closure(model, loss_fn, (torch.zeros(1, 2), torch.tensor([0.5, 1.0]))))
        >>> model.weight[0].tolist()
        [0.25, 0.5]
    """

    twice: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        every: int = 10,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        l1: float = 0.0,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr, betas, gamma, eps, every, weight_decay, decoupled_weight_decay, l1, maximize, seed)

    def curvature(self, seen: Pass, draws: Draws) -> Params:
        return hutchinson(seen, draws)

    def learn(self, group: dict[str, Any], state: dict[str, Tensor], value: Tensor) -> None:
        super().learn(group, state, -value if group["maximize"] else value)


class SophiaG(_Sophia):
    """Clipped momentum over the diagonal of the Gauss-Newton matrix, from a draw at the outputs every ten steps.

    As :class:`SophiaH`, with D = (J'r)^2 for a draw r at the model's outputs whose covariance is the Hessian of the
    loss there; for cross-entropy, the squared gradient at labels drawn from the model. D is never negative, needs no
    second derivative of the model, and costs one more backward pass. The model returns one tensor, and the loss is any
    that :func:`hesse.curvature.output.output_curvature` takes: sums and means, class weights and ``ignore_index`` are
    counted right. With ``maximize`` the loss is concave in the outputs, as a log-likelihood is: D is of its negative.

    Args:
        params: parameters, named parameters, or groups of either, as for every optimiser of torch.
        lr: learning rate, the longest step of an element. About that of Adam.
        betas: of the moving averages of gradient and curvature.
        gamma: how soon Newton's step is clipped: small means late curvature, 1 means Newton's step itself.
        eps: the least curvature.
        every: steps from one look at the curvature to the next.
        weight_decay: L2, decoupled as in AdamW, or, with ``decoupled_weight_decay=False``, added to the gradient.
        l1: threshold of the proximal step, times ``lr``: weights become exactly zero.
        maximize: climb.
        seed: of the draws.

    Raises:
        ValueError: a setting is out of its range.
        TypeError: (at a step) curvature is due and the closure is none of :func:`hesse.closure`, or its loss has no
            Gauss-Newton factor.

    References:
        Liu, Li, Hall, Liang and Ma, Sophia: a scalable stochastic second-order optimizer for language model
        pre-training, ICLR 2024.

    Example:
        The loss (w - 3)^2 of one example has the Gauss-Newton matrix 2; its draws are random signs times the root of
        2, so that one is exact. Half of Newton's step:

        >>> import hesse
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.5)
        >>> optimizer = SophiaG(model.parameters(), lr=0.5, betas=(0.0, 0.0), gamma=1.0)
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().sum()
        >>> loss = optimizer.step(hesse.closure(model, loss_fn, (torch.ones(1, 1), torch.full((1, 1), 3.0))))
        >>> round(model.weight.item(), 3)
        2.75
    """

    twice: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.05,
        eps: float = 1e-12,
        every: int = 10,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        l1: float = 0.0,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr, betas, gamma, eps, every, weight_decay, decoupled_weight_decay, l1, maximize, seed)

    def curvature(self, seen: Pass, draws: Draws) -> Params:
        return bartlett(seen, draws, maximize=self.param_groups[0]["maximize"])


def sophia(momenta: list[Tensor], hessians: list[Tensor], gamma: float, eps: float) -> list[Tensor]:
    """``clip(-m / max(gamma h, eps), 1)`` for each pair.

    Example:
        >>> m, h = torch.tensor([1.0, 1.0, -1.0, 0.0]), torch.tensor([200.0, 50.0, -1.0, 0.0])
        >>> sophia([m], [h], 0.01, 1e-12)[0].tolist()
        [-0.5, -1.0, 1.0, -0.0]
    """
    curvatures = torch._foreach_mul(hessians, gamma)
    torch._foreach_clamp_min_(curvatures, eps)
    found = torch._foreach_div(momenta, curvatures)
    torch._foreach_clamp_max_(found, 1.0)
    torch._foreach_clamp_min_(found, -1.0)
    torch._foreach_neg_(found)
    return list(found)
