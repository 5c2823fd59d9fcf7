"""The squared multi-class margin: each class that comes within the margin of the true one adds a square.

A term is ``w_y / C * sum_c max(0, margin - o_y + o_c)^2`` over the classes c other than the label y (Crammer and
Singer, 2001, squared), so ``H_n = 2 w_y / C * sum_c (e_c - e_y)(e_c - e_y)'`` over the classes inside the margin. Each
summand is a column of a square root.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from hesse.curvature.losses.base import OutputCurvature, count, nonnegative, signs

__all__ = ["Margins", "multi_margin_loss"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Margins(OutputCurvature):
    """``H_n = sum_c scale_nc (e_c - e_y)(e_c - e_y)'``.

    Args:
        scale: of each class, 0 for the label and for classes outside the margin; shaped like the outputs.
        onehot: of the labels, shaped like the outputs.
    """

    scale: Tensor
    onehot: Tensor

    def product(self, u: Tensor) -> Tensor:
        own = (self.onehot * u).sum(-1, keepdim=True)
        return self.weight * self._toward(self.scale * (u - own))

    def draw(self, generator: Generator | None = None) -> Tensor:
        return self._toward(self._refuse_negative(self.scale).sqrt() * signs(self.scale, generator))

    def root(self) -> Iterator[Tensor]:
        return self._columns((self.weight * self._refuse_negative(self.scale)).sqrt())

    def _columns(self, root: Tensor) -> Iterator[Tensor]:
        for c in range(root.shape[-1]):
            column = torch.zeros_like(root)
            column[..., c] = root[..., c]
            yield self._toward(column)

    def _toward(self, x: Tensor) -> Tensor:
        """``sum_c x_c (e_c - e_y)``."""
        return x - self.onehot * x.sum(-1, keepdim=True)


def multi_margin_loss(
    outputs: Tensor,
    targets: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> OutputCurvature:
    if p != 2:
        raise TypeError(
            f"no Gauss-Newton factor is known for the loss 'multi_margin_loss' with p={p}: it is piecewise linear, "
            "with a second derivative of zero. Use p=2, or cross_entropy."
        )
    if targets.shape != outputs.shape[:-1]:
        raise ValueError(
            f"multi_margin_loss takes one label an example: for outputs {list(outputs.shape)} targets "
            f"{list(outputs.shape[:-1])}; got {list(targets.shape)}."
        )
    onehot = torch.zeros_like(outputs).scatter_(-1, targets.unsqueeze(-1), 1.0)
    own = (onehot * outputs).sum(-1, keepdim=True)
    inside = ((margin - own + outputs > 0) & (onehot == 0)).to(outputs.dtype)
    scale = 2 / outputs.shape[-1] * inside
    if weight is not None:
        scale = scale * weight.to(outputs.dtype)[targets].unsqueeze(-1)
    counts = count("multi_margin_loss", reduction, targets.numel())
    psd = nonnegative(weight)
    return Margins(**counts, psd=psd, axes=(outputs.ndim - 1,), scale=scale, onehot=onehot)
