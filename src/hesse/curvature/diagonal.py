"""The exact diagonal of J' M J, from per-example gradients that are never formed for long.

With columns s_k of a root of M, ``diag = sum_n sum_k (J_n' s_k,n)^2`` over examples n, each square element by element.
One backward pass a column gives all examples' gradients at the outputs of the layers, without those of the weights;
:mod:`hesse.curvature.squares` makes the sums of squares from them, :mod:`hesse.curvature.passes` knows where this is
allowed. For a network of linear layers it is BackPACK's ``DiagGGNExact`` (Dangel, Kunstner and Hennig, 2020) with one
matrix product a layer in place of one a layer and class.

Cost, in backward passes of the activations: as many as a term has outputs, times the terms of an example. A parameter
in front of batch norm in training mode costs that for every example. Parameters that are read in no layer's rows
(positional embeddings, free scales, weight norm) cost it once more, and a forward pass of each example alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from hesse.curvature.collect import collect
from hesse.curvature.columns import Kind, columns_of
from hesse.curvature.passes import shares, watch
from hesse.curvature.product import points, working
from hesse.curvature.sources import Batches, Reduction
from hesse.curvature.squares import squares_of
from hesse.objective import Objective
from hesse.tree import Params, add

__all__ = ["Diagonals", "ExactDiagonal"]


@dataclass(frozen=True)
class Diagonals:
    """Diagonals of batches added up.

    Args:
        values: by name, each batch's times its weight.
        weight: of all batches.
        passes: backward passes spent.
    """

    values: Params
    weight: float
    passes: int


@dataclass(frozen=True)
class ExactDiagonal:
    """How the exact diagonal of one kind of matrix is found.

    Args:
        kind, seed, reduction: as for :func:`hesse.curvature.columns.columns_of`.

    References:
        Dangel, Kunstner and Hennig, BackPACK: packing more into backprop, ICLR 2020.
    """

    kind: Kind
    seed: int = 0
    reduction: Reduction = "mean"

    def __call__(self, batches: Batches, names: Sequence[str], limit: int | None = None) -> Diagonals | None:
        """The diagonals of this process's batches, of the parameters ``names``.

        Args:
            limit: the most backward passes for a batch, of which the first is asked.

        Returns:
            None if there is a limit and it is not enough, or the matrix has no root.

        Raises:
            TypeError, ValueError: there is no limit and no root: as :func:`hesse.curvature.columns.columns_of`.
        """
        first = working(batches.first).params
        values = {name: torch.zeros_like(first[name], requires_grad=False) for name in names}
        weight, passes, enough = 0.0, 0, True
        for i, objective in batches:
            batch = working(objective)
            found = self._of(batch, points(batch), names, i, limit)
            if found is None:
                enough = False
                break
            diagonal, outputs, spent = found
            if batches.rest is None:
                return Diagonals(diagonal, 1.0, spent)
            own = batches.weight(batch, outputs)
            values = add((1.0, values), (own, diagonal))
            weight, passes, limit = weight + own, passes + spent, None
        if batches.distributed:
            enough = _everywhere(enough, next(iter(first.values())).device)
        return Diagonals(values, weight, passes) if enough else None

    def _of(
        self, objective: Objective, params: Params, names: Sequence[str], index: int, limit: int | None
    ) -> tuple[Params, Tensor, int] | None:
        """The diagonal of one batch, the model's outputs, and the passes."""
        run = watch(objective, params, names)
        try:
            columns = columns_of(self.kind, objective, run.outputs, seed=self.seed + index, reduction=self.reduction)
        except (TypeError, ValueError):
            if limit is None:
                raise
            return None
        with objective.at(params):
            found = list(shares(run, columns))
            passes = round(columns.number * sum(share.passes for share in found))
            if limit is not None and passes > limit:
                return None
            diagonal: Params = {}
            for share in found:
                sums = squares_of(share)
                collect(share, columns.all(), sums)
                for one in sums.values():
                    for name, more in one.total().items():
                        diagonal[name] = diagonal[name] + more if name in diagonal else more
        for name in names:
            if name not in diagonal:  # it does not influence the outputs
                diagonal[name] = torch.zeros_like(params[name], requires_grad=False)
        return diagonal, run.outputs, passes


def _everywhere(enough: bool, device: torch.device) -> bool:
    """Whether it is so in all processes: either all go on, or none."""
    flag = torch.tensor(int(enough), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)
