"""Curvature as an operator: the products of one batch or of many, for flat vectors, columns and named tensors.

What differs between Hessian, Gauss-Newton and Fisher is how one batch's product is formed (a ``Builder``). What they
share is here: the order of parameters, blocks by name, columns one by one or at once, sums over batches and processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from hesse.curvature.blocks import ONE_BY_ONE, TRIAL, fastest, through
from hesse.curvature.diagonal import ExactDiagonal
from hesse.curvature.evaluate import refuse_parameters
from hesse.curvature.product import Builder, Product, hold_padding, points, working
from hesse.curvature.sources import Batches
from hesse.linalg.estimate import MAX_PRODUCTS, Estimate
from hesse.linalg.operator import LinearOperator
from hesse.tree import Layout

__all__ = ["Curvature"]


class Curvature(LinearOperator):
    """The curvature of a loss at a model's present parameters.

    ``mode`` names how products are formed; ``error`` is the largest estimated relative error of those formed so far by
    differences, None otherwise; ``unreached`` lists the parameters that the loss does not depend on, whose rows are
    zero. When the parameters change, the operator is stale and says so at the next product.
    """

    def __init__(
        self,
        batches: Batches,
        build: Builder,
        *,
        mode: str,
        psd: bool,
        names: Sequence[str] | None = None,
        exact_diagonal: ExactDiagonal | None = None,
    ) -> None:
        self._batches = batches
        self._build = build
        self._exact_diagonal = exact_diagonal
        self._objective = working(batches.first)
        self._params = points(self._objective)
        refuse_parameters(self._objective.model, self._params)
        wanted = {name: self._params[name] for name in names or self._params}
        first = next(iter(wanted.values()))
        dtype = torch.promote_types(torch.float32, first.dtype)
        for p in wanted.values():
            dtype = torch.promote_types(dtype, p.dtype)
        super().__init__(self._apply, Layout.of(wanted), dtype=dtype, device=first.device, symmetric=True, psd=psd)
        self.mode = mode
        self.error: float | None = None
        self._versions = self._version_numbers()
        self._kept = build(self._objective, self._params, 0) if batches.rest is None else None
        self._way: str | None = None  # how many columns are dealt with: unknown until tried

    @property
    def unreached(self) -> list[str]:
        """Names of the parameters that the loss does not depend on: their rows are zero."""
        assert self.layout is not None
        reached_by_none = set.intersection(*(product.unreached() for _, product in self._products()))
        return [name for name in self.layout.shapes if name in reached_by_none]

    def block(self, pattern: str | Sequence[str]) -> LinearOperator:
        """The diagonal block of the parameters whose names match: only they are differentiated by.

        Raises:
            ValueError: nothing matches; the message lists the names.
        """
        assert self.layout is not None
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        layout = self.layout.restrict(self.layout.match(pattern))
        LinearOperator.__init__(
            part, part._apply, layout, dtype=self.dtype, device=self.device, symmetric=True, psd=self.psd
        )
        return part

    def diagonal(self, *, method: str = "auto", max_products: int = MAX_PRODUCTS, **options: Any) -> Estimate:
        """The diagonal [n] with its standard error.

        Args:
            method: "exact" for that of a Gauss-Newton or Fisher matrix from its root, with error 0, in as many backward
                passes as a term of the loss has outputs, times the terms of an example; times the examples too
                where layers mix them (batch norm in training mode). A method of :func:`hesse.linalg.diagonal` for an
                estimate. "auto" is exact if ``max_products`` backward passes are enough, otherwise an estimate.
            max_products, options: as for :func:`hesse.linalg.diagonal`.

        Raises:
            TypeError, ValueError: "exact", and the matrix has no root, with the reason.
        """
        if self._exact_diagonal is not None and method in ("auto", "exact"):
            self._refuse_stale()
            rows = self._named_rows()
            found = self._exact_diagonal(self._batches, list(rows.shapes), max_products if method == "auto" else None)
            if found is not None:
                value = rows.flatten(found.values).to(self.device, torch.float64)
                if self._batches.rest is not None:
                    weights = self._sum_over_processes(value, found.weight)
                    value = value / weights if self._batches.reduction == "mean" else value
                return Estimate(value, value.new_zeros(()).expand_as(value), found.passes, True, "exact")
        return super().diagonal(method=method, max_products=max_products, **options)

    def _apply(self, columns: Tensor) -> Tensor:
        self._refuse_stale()
        if self._kept is not None:
            result = self._columns(self._kept, columns)
            self._note_errors(self._kept)
            return result
        total = torch.zeros_like(columns)
        weights = 0.0
        for weight, product in self._products():
            total += weight * self._columns(product, columns)
            weights += weight
            self._note_errors(product)
        weights = self._sum_over_processes(total, weights)
        return total / weights if self._batches.reduction == "mean" else total

    def _note_errors(self, product: Product) -> None:
        if product.errors:
            self.error = max([*product.errors, self.error or 0.0])

    def _products(self) -> Any:
        """The weight and the product of each batch. Of a data set, one graph is alive at a time."""
        if self._kept is not None:
            yield 1.0, self._kept
            return
        for i, objective in self._batches:
            batch = working(objective)
            product = self._build(batch, points(batch), i)
            yield self._batches.weight(batch, product.outputs), product

    def _sum_over_processes(self, total: Tensor, weights: float) -> float:
        if not self._batches.distributed:
            return weights
        summed = torch.tensor(weights, dtype=torch.float64, device=total.device)
        dist.all_reduce(total)
        dist.all_reduce(summed)
        return float(summed)

    def _columns(self, product: Product, columns: Tensor) -> Tensor:
        assert self.layout is not None
        rows = columns.T.contiguous()  # a vector in one piece: kernels read strided ones several times slower
        result = torch.empty_like(rows)
        if len(rows) == 0:
            return result.T
        vectors = {
            name: rows[:, where].view(len(rows), *self.layout.shapes[name]).to(self._params[name])
            for name, where in self.layout.slices.items()
        }
        vectors = hold_padding(self._batches.first.model, vectors)
        if self._way is None and len(rows) >= TRIAL:
            self._way = fastest(product, {name: x[:TRIAL] for name, x in vectors.items()})
        begin = 0
        for found in through(product, self._way or ONE_BY_ONE, vectors):
            end = begin + len(next(iter(found.values())))
            for name, where in self.layout.slices.items():
                result[begin:end, where] = found[name].reshape(end - begin, -1)
            begin = end
        return result.T

    # -- staleness --------------------------------------------------------------------------------------------------

    def _version_numbers(self) -> list[int]:
        return [p._version for p in self._batches.first.model.parameters()]

    def _refuse_stale(self) -> None:
        if self._version_numbers() != self._versions:
            raise RuntimeError(
                "the model's parameters have changed since this operator was made, so its products would belong to no "
                "one point. Make a new operator after each step."
            )
