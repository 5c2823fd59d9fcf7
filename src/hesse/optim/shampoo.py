"""Gradients divided by roots of their two Kronecker factors, at the step length of a simpler method.

With one factor left out and the exponent 1/2 this is full-matrix Adagrad or RMSprop of rows; without a running average
and momentum, L^{-1/4} G R^{-1/4} is the nearest orthogonal matrix to G, as Muon steps. The roots are not refreshed
every so many steps: eigenvectors are followed as they turn, and eigenvalues are read off the factors in that frame
(Eschenhagen et al., 2025).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hesse.linalg import root_in_basis
from hesse.optim.blocking import shared
from hesse.optim.frames import Frame
from hesse.optim.kronecker import Batch, Kronecker
from hesse.optim.moments import adam

__all__ = ["Shampoo"]

GRAFTS = ("adam", "rmsprop", "sgd", None)


class Shampoo(Kronecker):
    """Shampoo with the step length of Adam; runs after ``loss.backward()``, in the place of AdamW.

    For a parameter [m, n] with gradient G and its average M = E[G],

        step = -lr (|S| / |D|) D,    D = L^{-e} M R^{-e},

    with S the step of the method named by ``grafting`` and |.| the Frobenius norm, block by block. By default (``kl``)
    L [m, m] and R [n, n] are such that the normal distribution of covariance R (x) L is nearest to that of the
    gradients: L = E[G R^{-1} G'] / n, R = E[G' L^{-1} G] / m, and e = 1/2. Without ``kl`` they are those of the first
    paper, averaged: L = E[G G'], R = E[G'G], and e = 1/4, or 1/2 where a parameter has a factor on one side only.

    Choose it for deep or badly scaled networks: on the deep autoencoder and the 30-layer networks of the benchmarks it
    takes the fewest steps of what runs on gradients alone. State: 2 + 3 (m / n + n / m) times the parameter, of blocks
    [m, n].

    Args:
        params: as torch takes them. Dimensions of one element do not count; a kernel [out, in, h, w] is the matrix
            [out, in h w]; vectors and scalars get Adam.
        lr: learning rate, of the grafted method.
        betas: how much of the averages of G and of its squares a step keeps; the second serves grafting alone.
        factor_beta: how much of L and R a step keeps.
        exponent: e, if not the one above.
        grafting: whose step length: "adam", M / (sqrt(V) + eps); "rmsprop", G / (sqrt(V) + eps); "sgd", M, the averages
            M and V = E[G * G] being corrected for their start at zero; None for D's own.
        damping: added to the eigenvalues of L and R, relative to their mean.
        eps: added to the root of V.
        weight_decay: taken from the parameters if decoupled, else added to the gradient.
        decoupled_weight_decay: which of the two.
        l1: weight of the sum of absolute values, by its proximal step.
        max_dim: the largest factor. Above it a dimension is cut into blocks.
        split: whether it is; if not, it has no factor, as the rows of large embeddings in any case.
        kl: which factors, see above.
        period: steps between two looks at whether eigenvectors are still right; at 1, 2, 4, 8, ... too until the first.
        statistics: steps between two gradients that are averaged into the factors; eigenvalues are read anew each time.
        tolerance: the share of Q'LQ off its diagonal up to which eigenvectors stay as they are.
        maximize: whether to climb.

    Raises:
        ValueError: a setting is out of its range.

    Source: Gupta, Koren and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", 2018; grafting: Anil et
    al., "Scalable Second Order Optimization for Deep Learning", 2020; blocks: Shi et al., "A Distributed Data-Parallel
    PyTorch Implementation of the Distributed Shampoo Optimizer", 2023; ``kl``: Lin et al., "Understanding and Improving
    Shampoo and SOAP via Kullback-Leibler Minimization", 2025; ``tolerance``: Eschenhagen et al., "Purifying Shampoo",
    2025.

    Example:
        The first step with the first paper's factors, ungrafted: the orthogonal matrix nearest to the gradient.

        >>> import torch
        >>> G = torch.tensor([[3.0, 0.0], [4.0, 5.0]])
        >>> W = torch.zeros(2, 2, requires_grad=True)
        >>> optimizer = Shampoo([W], lr=1.0, kl=False, grafting=None, damping=1e-9)
        >>> (G * W).sum().backward()
        >>> _ = optimizer.step()
        >>> U, _, V = torch.linalg.svd(G)
        >>> torch.allclose(-W, U @ V, atol=1e-4)
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 5e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        factor_beta: float = 0.95,
        exponent: float | None = None,
        grafting: str | None = "adam",
        damping: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        l1: float = 0.0,
        max_dim: int = 128,
        split: bool = True,
        kl: bool = True,
        period: int = 32,
        statistics: int = 4,
        tolerance: float = 0.01,
        maximize: bool = False,
    ) -> None:
        settings: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "factor_beta": factor_beta,
            "exponent": exponent,
            "grafting": grafting,
            "damping": damping,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "max_dim": max_dim,
            "split": split,
            "kl": kl,
            "period": period,
            "statistics": statistics,
            "tolerance": tolerance,
            "maximize": maximize,
            "rejections": 0,
        }
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with the group's settings checked.

        Raises:
            ValueError: a setting is out of its range.
        """
        given = {**self.defaults, **param_group}
        if given["grafting"] not in GRAFTS:
            raise ValueError(f"grafting must be one of {', '.join(map(repr, GRAFTS))}; got {given['grafting']!r}.")
        exponent = given["exponent"]
        if exponent is not None and not 0.0 < exponent <= 1.0:
            raise ValueError(f"Invalid exponent: {exponent}. It has to be more than 0 and at most 1.")
        super().add_param_group(param_group)

    def rule(self, group: dict[str, Any], batches: list[Batch]) -> list[Tensor]:
        """Momentum between the roots of the factors, rescaled; Adam's direction where there is no matrix."""
        averages, squares = ([b.moment(name) for b in batches] for name in ("exp_avg", "exp_avg_sq"))
        steps = [b.step for b in batches]
        found = adam([b.grad for b in batches], averages, squares, steps, group["betas"], group["eps"])
        for i, (b, average, square) in enumerate(zip(batches, averages, squares, strict=True)):
            if b.frame is None:
                continue
            average = average / (group["betas"][0] ** b.step - 1)
            if group["grafting"] == "adam":
                model = found[i]
            elif group["grafting"] == "rmsprop":
                model = b.grad / ((square / (1 - group["betas"][1] ** b.step)).sqrt() + group["eps"])
            else:
                model = average
            found[i] = self._precondition(b, b.frame, average, group)
            if group["grafting"] is not None:
                found[i] = rescale(found[i], model)
        return found

    def _precondition(self, b: Batch, frame: Frame, x: Tensor, group: dict[str, Any]) -> Tensor:
        """``L^{-e} x R^{-e}`` of blocks [b, m, n], with the roots of the latest factors."""
        learned, turns = b.learn(frame, group), b.turn(frame, group)
        sides = [side for side in range(2) if frame.bases[side] is not None]
        if learned or turns:
            exponent = group["exponent"] or (0.5 if group["kl"] or len(sides) == 1 else 0.25)
            for side in sides:
                basis, values = frame.eigen(side)
                root = root_in_basis(basis, values, 1 / exponent, group["damping"])
                # The paper's factors are sums over rows or columns, not means.
                b.store(f"root_{side}", root if group["kl"] else root * x.shape[2 - side] ** -exponent)
        for side in sides:
            root = shared(b.states, f"root_{side}")
            x = root @ x if side == 0 else x @ root
        return x


def rescale(x: Tensor, model: Tensor) -> Tensor:
    """Each block [b, m, n] at the norm of the model's."""
    norm = torch.linalg.matrix_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
    return x * (torch.linalg.matrix_norm(model) / norm)[:, None, None]
