"""The curvature of a sum of losses, each of some columns of the outputs and perhaps of some examples only.

With o_k the columns (and rows) of summand k the loss is ``sum_k factor_k * loss_k(o_k, t_k)``, and H_L the sum of
``factor_k H_k``, each in its place: block diagonal if no two summands look at the same outputs. Products, draws and
roots are therefore those of the summands, put where they belong. (The parts of a draw are independent and of mean zero,
so they do not correlate.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hesse.curvature.losses.base import OutputCurvature, count

__all__ = ["Summand", "Summed", "summed"]


class Summand(NamedTuple):
    """One of the losses.

    Args:
        factor: what it counts in the sum, 0 or more.
        curvature: of the loss at its own outputs.
        columns: its outputs, of dimension 1.
        rows: the examples it is taken over, int64; None for all.
    """

    factor: float
    curvature: OutputCurvature
    columns: slice
    rows: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Summed(OutputCurvature):
    """H_L of a sum of losses. A term is an example, the outputs' dimension 0, with all its columns.

    Args:
        summands: the losses.
        shape: of the outputs.
    """

    summands: tuple[Summand, ...]
    shape: torch.Size

    def product(self, u: Tensor) -> Tensor:
        return self._applied(u, lambda curvature: curvature.product)

    def fisher(self, u: Tensor) -> Tensor:
        return self._applied(u, lambda curvature: curvature.fisher)

    def draw(self, generator: Generator | None = None) -> Tensor:
        return self._drawn(lambda curvature: curvature.draw(generator))

    def label(self, generator: Generator | None = None) -> Tensor:
        return self._drawn(lambda curvature: curvature.label(generator))

    def root(self) -> Iterator[Tensor]:
        return self._columns(lambda curvature: curvature.root())

    def fisher_root(self) -> Iterator[Tensor]:
        return self._columns(lambda curvature: curvature.fisher_root())

    def _applied(self, u: Tensor, how: Callable[[OutputCurvature], Callable[[Tensor], Tensor]]) -> Tensor:
        found = torch.zeros_like(u)
        for s in self.summands:
            own = u[:, s.columns] if s.rows is None else u[:, s.columns].index_select(0, s.rows)
            found = found + self._placed(s.factor * how(s.curvature)(own), s)
        return found

    def _drawn(self, how: Callable[[OutputCurvature], Tensor]) -> Tensor:
        """A term of summand k has ``factor_k * weight_k * H_n``, and the sum says what a term weighs for all."""
        scales = [(s.factor * s.curvature.weight / self.weight) ** 0.5 for s in self.summands]
        parts = [self._placed(scale * how(s.curvature), s) for scale, s in zip(scales, self.summands, strict=True)]
        return torch.stack(parts).sum(0)

    def _columns(self, how: Callable[[OutputCurvature], Iterator[Tensor]]) -> Iterator[Tensor]:
        for s in self.summands:
            for column in how(s.curvature):
                yield self._placed(s.factor**0.5 * column, s)

    def _placed(self, own: Tensor, s: Summand) -> Tensor:
        """What a summand has, shaped like the outputs, with zeros elsewhere."""
        if s.rows is not None:
            own = own.new_zeros(self.shape[0], own.shape[1]).index_add(0, s.rows, own)
        start, stop, _ = s.columns.indices(self.shape[1])
        return F.pad(own, (start, self.shape[1] - stop))


def summed(name: str, outputs: Tensor, summands: Iterable[Summand]) -> OutputCurvature:
    """The curvature at ``outputs`` [n, width] of a loss that is the sum of these."""
    found = tuple(summands)
    counts = count(name, "mean", outputs.shape[0])
    psd = all(s.curvature.psd for s in found)
    return Summed(**counts, psd=psd, axes=(1,), summands=found, shape=outputs.shape)
