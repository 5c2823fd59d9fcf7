"""Moving frames: the eigenbases of a gradient's two Kronecker factors, followed as they turn.

A matrix of gradients G [m, n] has the factors A = E[G G'] and B = E[G'G]. In their eigenbases, G~ = Q_A' G Q_B, its
elements are as good as uncorrelated, and what one does with an element may depend on it alone: Adam there is SOAP, a
division by the roots of eigenvalues is Shampoo.

Factors are kept in their frames, ``Q'A Q``: they are diagonal but for what has changed since the frame last turned. So
their diagonals are the eigenvalues, current at every step; how far the frame is off can be read; and a turn is a
small rotation R, which takes along whatever else lives in the frame: a first moment as R'm, second moments as
(R o R)'v, which is exact for uncorrelated elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hesse.linalg import eigenbasis, off_diagonal
from hesse.linalg.roots import SHIFT
from hesse.optim.blocking import Blocks, shared

__all__ = ["Frame", "Turn"]

# The share of a factor off its diagonal above which a frame is found anew instead of followed.
LOST = 0.3

# In the KL variant eigenvalues below this share of their mean count as this: a direction not seen yet says little.
FLOOR = 1e-3


class Turn(NamedTuple):
    """A rotation R [k, d, d] of some of a batch's frames, on one side; ``which`` of them, or all."""

    side: int
    which: Tensor | slice
    rotation: Tensor

    def average(self, x: Tensor) -> None:
        """Take first moments [b, m, n] along, in place."""
        self._apply(x, self.rotation)

    def squares(self, x: Tensor) -> None:
        """Take second moments [b, m, n] along, in place."""
        self._apply(x, self.rotation.square())

    def _apply(self, x: Tensor, rotation: Tensor) -> None:
        rows = x[self.which]
        x[self.which] = rotation.mT @ rows if self.side == 0 else rows @ rotation


class Frame(NamedTuple):
    """The frames of a batch of b equal blocks; a side is None where it has no factor.

    Args:
        bases: orthonormal columns [b, m, m] and [b, n, n].
        factors: in these bases, of the same shapes.
    """

    bases: tuple[Tensor | None, Tensor | None]
    factors: tuple[Tensor | None, Tensor | None]

    @classmethod
    def start(cls, state: dict[str, Any], cut: Blocks, like: Tensor) -> None:
        """Put a parameter's frame into its state: the identity, with factors of zero."""
        for side in range(2):
            if cut.sides[side]:
                d = cut.shape[side]
                eye = torch.eye(d, dtype=like.dtype, device=like.device)
                state[f"basis_{side}"] = eye.repeat(cut.count, 1, 1)
                state[f"factor_{side}"] = like.new_zeros(cut.count, d, d)

    @classmethod
    def of(cls, states: list[dict[str, Any]], cut: Blocks) -> Frame:
        """The frames of several parameters that are cut alike."""
        left, right = (
            (shared(states, f"basis_{side}"), shared(states, f"factor_{side}")) if cut.sides[side] else (None, None)
            for side in range(2)
        )
        return cls((left[0], right[0]), (left[1], right[1]))

    def enter(self, x: Tensor) -> Tensor:
        """``Q_A' x Q_B`` of each block [b, m, n]."""
        left, right = self.bases
        x = x if left is None else left.mT @ x
        return x if right is None else x @ right

    def leave(self, x: Tensor) -> Tensor:
        """``Q_A x Q_B'``, the inverse of :meth:`enter`."""
        left, right = self.bases
        x = x if left is None else left @ x
        return x if right is None else x @ right.mT

    def eigen(self, side: int) -> tuple[Tensor, Tensor]:
        """Eigenvectors [b, d, d] and eigenvalues [b, d] of the factor on a side that has one.

        The values are the factor's diagonal: right as long as the frame is not far off.
        """
        basis, factor = self.bases[side], self.factors[side]
        assert basis is not None and factor is not None
        return basis, factor.diagonal(dim1=-2, dim2=-1).clamp_min(0)

    def learn(self, grad: Tensor, weight: float, kl: bool = False) -> None:
        """Average a gradient in: ``A <- (1 - weight) A + weight G~ G~' / n``, B likewise.

        With ``kl``, the other side's correlation is taken out first, ``G~ B^{-1} G~' / n``: the factors then minimise
        the Kullback-Leibler divergence between the normal distributions of covariance E[g g'] and A (x) B (Lin et al.,
        "Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization", 2025).

        Args:
            grad: [b, m, n], in the frame.
            weight: of this gradient; 1 forgets all others.
            kl: whether to use the other side's inverse.
        """
        m, n = grad.shape[-2:]
        white = [self._whitened(grad, side, weight) if kl else grad for side in range(2)]
        left, right = self.factors
        if left is not None:
            _average(left, white[1], white[1].mT, weight, n)
        if right is not None:
            _average(right, white[0].mT, white[0], weight, m)

    def _whitened(self, grad: Tensor, side: int, weight: float) -> Tensor:
        """The gradient times the inverse root of one side's eigenvalues, as they were before it."""
        if self.bases[side] is None:
            return grad
        if weight >= 1:
            # Nothing is known yet. One of the two carries the scale of the gradient, the other is about one.
            mean = grad.square().mean((-2, -1), keepdim=True) if side == 1 else grad.new_ones(())
            return grad / mean.sqrt().clamp_min(torch.finfo(grad.dtype).tiny)
        values = self.eigen(side)[1]
        mean = values.mean(-1, keepdim=True)
        root = (values.maximum(FLOOR * mean) + torch.finfo(values.dtype).tiny).rsqrt()
        return grad * (root[..., None] if side == 0 else root[..., None, :])

    def turn(self, tolerance: float) -> list[Turn]:
        """Turn each frame whose factor has more than this share off its diagonal, and say by what rotation.

        The basis is found anew by ``eigh`` if it is far off, and else followed by a step of subspace iteration.
        """
        turns = []
        for side, (basis, factor) in enumerate(zip(self.bases, self.factors, strict=True)):
            if basis is None or factor is None:
                continue
            off = off_diagonal(factor)
            for low, high in ((tolerance, LOST), (LOST, 2.0)):
                due = ((off > low) & (off <= high)).nonzero()[:, 0]
                if len(due) == 0:
                    continue
                which = due if len(due) < len(off) else slice(None)  # of all, a view
                found = factor[which]
                guess = torch.eye(found.shape[-1], dtype=found.dtype, device=found.device).expand_as(found)
                rotation = eigenbasis(found, guess) if high == LOST else eigenbasis(found + _ramp(found))
                basis[which] = basis[which] @ rotation
                factor[which] = rotation.mT @ found @ rotation
                turns.append(Turn(side, which, rotation))
        return turns


def _ramp(factor: Tensor) -> Tensor:
    """A diagonal too small to matter, which decides what a null space's basis is.

    Few gradients span few directions, and for the others ``eigh`` returns whatever rounding makes of them.
    """
    d = factor.shape[-1]
    steps = torch.linspace(1, 0, d, dtype=factor.dtype, device=factor.device).diag()
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(-1)
    return SHIFT * mean[:, None, None] * steps


def _average(factor: Tensor, left: Tensor, right: Tensor, weight: float, count: int) -> None:
    factor.baddbmm_(left, right, beta=1 - weight, alpha=weight / count)
