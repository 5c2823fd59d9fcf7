"""Losses whose terms curve along each output alone: H_L is a diagonal.

Sums over elements (squared error, binary cross-entropy, Poisson) are the plain case: every output is a term. So are
losses of log-probabilities, in their own space: see :mod:`hesse.curvature.losses.categorical`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from hesse.curvature.losses.base import OutputCurvature, signs

__all__ = ["Diagonal", "Model"]


@dataclass(frozen=True)
class Model:
    """A loss's probability model of the label.

    Args:
        square: E[r^2] of the gradient r of a term at a drawn label, shaped like the outputs.
        sample: a draw of r.
    """

    square: Tensor
    sample: Callable[[Generator | None], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagonal(OutputCurvature):
    """``H_L = weight * diag(h)``.

    Args:
        h: second derivatives of the terms, shaped like the outputs, with the terms' own weights.
        model: of the label, if there is one. The very tensor ``h`` as its ``square`` says that the Fisher matrix is
            the Hessian, and a label drawn is a draw.
    """

    h: Tensor
    model: Model | None = None

    def product(self, u: Tensor) -> Tensor:
        return self.weight * self.h * u

    def draw(self, generator: Generator | None = None) -> Tensor:
        if self.model is not None and self.model.square is self.h:
            return self.label(generator)
        return self._refuse_negative(self.h).sqrt() * signs(self.h, generator)

    def root(self) -> Iterator[Tensor]:
        return _columns((self.weight * self._refuse_negative(self.h)).sqrt(), self.axes)

    def label(self, generator: Generator | None = None) -> Tensor:
        model = self._model()
        self._refuse_negative(model.square)
        return model.sample(generator)

    def fisher(self, u: Tensor) -> Tensor:
        return self.weight * self._model().square * u

    def fisher_root(self) -> Iterator[Tensor]:
        return _columns((self.weight * self._refuse_negative(self._model().square)).sqrt(), self.axes)

    def _model(self) -> Model:
        if self.model is None:
            raise self._no_model()
        return self.model


def _columns(values: Tensor, axes: tuple[int, ...]) -> Iterator[Tensor]:
    """``values`` cut into tensors that keep one element of each example, dimension 0, and are zero elsewhere."""
    examples = 1 if values.ndim == 0 or 0 in axes else values.shape[0]  # a term along dimension 0: there is no batch
    rows = values.reshape(examples, -1)
    for j in range(rows.shape[1]):
        column = torch.zeros_like(rows)
        column[:, j] = rows[:, j]
        yield column.reshape(values.shape)
