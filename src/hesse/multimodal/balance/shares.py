"""Several answers to one question become one: the sum of their outputs, each as far as it can be trusted.

For logits this is the log-linear pool ``p ~ p_0 prod_k (p_k / p_0)^{v_k}``: with all v = 1 the product of experts,
which is Bayes' rule for modalities that are independent given the class; with one of them a temperature; with
v = (1, 0, ..., 0) no pool at all. For values it is their regression on the answers. The shares v are few, the problem
is convex, and rows that nothing was trained on decide.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["best_constant", "pooled", "shares"]

Mean = Callable[[Tensor], Tensor]  # the loss of outputs [N, W] as a function of them alone

STEPS = 50
CLOSE = 1e-10  # relative decrease of the objective at which to stop


def pooled(outputs: Tensor, base: Tensor, v: Tensor) -> Tensor:
    """``base + sum_k v_k (outputs_k - base)``, ``[N, W]``.

    Args:
        outputs: ``[K, N, W]``; logits, or values.
        base: ``[W]``: the answer of one who sees nothing, counted once and not with each expert.
        v: shares ``[K, W]``, or ``[N, K, W]`` if each row has its own.
    """
    many = v if v.dim() == 2 else v.movedim(0, 1)
    many = many[:, None] if v.dim() == 2 else many
    # Selected, not multiplied: an expert without a share may say anything, infinity too.
    return base + torch.where(many > 0, many * (outputs - base), 0.0).sum(0)


def best_constant(mean: Mean, outputs: Tensor) -> Tensor:
    """The one output ``[W]`` for all rows with the least loss, drawn to zero as by one row more.

    For cross-entropy the logarithms of the class frequencies (up to a constant), for squared errors the mean.

    Args:
        mean: the loss of outputs ``[N, W]``, a mean over rows.
        outputs: any, for their shape and kind.
    """
    n, width = outputs.shape
    a = torch.zeros(width, dtype=torch.float64, device=outputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([a], max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mean(a.expand(n, width)) + 0.5 * a.square().mean() / n
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return a.detach().to(outputs.dtype)


def shares(mean: Mean, outputs: Tensor, base: Tensor, prior: Tensor, target: Tensor) -> Tensor:
    """The v >= 0 ``[K, T]`` for which the pool has the least loss, by projected Newton steps.

    The objective has ``|v - prior|^2 / 2`` of one row added to it, so that experts who are never wrong do not get
    infinite shares and those who say the same share alike. More of it, or of the size of the outputs, made pools worse.

    Args:
        mean: the loss of outputs ``[N, W]``, a mean over rows, convex in them.
        outputs: ``[K, N, W]``.
        base: ``[W]``.
        prior: ``[K, T]``.
        target: int64 ``[W]``: which of T targets an output belongs to. Each has shares of its own.

    Example:
        One expert who is right but half as sure as could be, and one who guesses:

        >>> targets = torch.arange(200) % 2
        >>> sure = torch.where(torch.arange(200) < 150, 1.0, -1.0)  # right in three of four cases
        >>> expert = torch.stack([sure, -sure], 1) * torch.where(targets == 0, 1.0, -1.0)[:, None] * 0.25 * 3**0.5
        >>> guess = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> mean = lambda o: torch.nn.functional.cross_entropy(o, targets)
        >>> one = torch.tensor([0, 0])
        >>> v = shares(mean, torch.stack([expert, guess]), torch.zeros(2), torch.ones(2, 1), one)
        >>> odds = torch.exp(2 * v[0, 0] * 0.25 * 3**0.5)  # three to one
        >>> round(odds.item(), 1), v[1, 0].item() < 0.2
        (3.0, True)
    """
    outputs, base, prior = outputs.detach().double(), base.detach().double(), prior.detach().double()
    n, apart = outputs.shape[1], outputs - base

    def value(v: Tensor) -> Tensor:
        some = v.view_as(prior)
        return mean(base + (some[:, target][:, None] * apart).sum(0)) + 0.5 * (some - prior).square().sum() / n

    v = prior.flatten()
    with torch.enable_grad():
        now = float(value(v).detach())
        for _ in range(STEPS):
            g, H = _slope_and_bend(value, v)
            held = (v <= 0) & (g > 0)
            H[held], H[:, held] = 0.0, 0.0
            H[held, held] = 1.0
            w, Q = torch.linalg.eigh(H)
            d = -Q @ ((Q.T @ torch.where(held, 0.0, g)) / w.abs().clamp_min(1e-3 / n))
            length = 1.0
            while length > 1e-6:
                there = (v + length * d).clamp_min(0.0)
                then = float(value(there).detach())
                if then < now:
                    break
                length /= 4
            else:
                break
            small = now - then < CLOSE * abs(now)
            v, now = there, then
            if small:
                break
    return v.view_as(prior)


def _slope_and_bend(value: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [K] and Hessian [K, K]."""
    x = v.detach().requires_grad_()
    (g,) = torch.autograd.grad(value(x), x, create_graph=True)
    rows = [torch.autograd.grad(part, x, retain_graph=True)[0] for part in g.unbind()]
    H = torch.stack(rows)
    return g.detach(), 0.5 * (H + H.T)
