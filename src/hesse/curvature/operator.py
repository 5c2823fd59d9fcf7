"""Curvature as an operator: the products of one batch or of many, for flat vectors, columns and named tensors.

What differs between Hessian, Gauss-Newton and Fisher is how one batch's product is formed (a ``Builder``). What they
share is here: the order of parameters, blocks by name, columns one by one or at once, sums over batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from hesse.curvature.evaluate import refuse_parameters
from hesse.curvature.product import Builder, Product, hold_padding, points, working
from hesse.curvature.sources import Batches
from hesse.linalg.operator import LinearOperator
from hesse.tree import Layout, Params

__all__ = ["Curvature"]

BLOCK = 32  # columns at once: memory grows with each, and the gain has flattened out
TRIAL = 8  # columns on which a block is timed against single vectors


class Curvature(LinearOperator):
    """The curvature of a loss at a model's present parameters.

    ``mode`` names how products are formed; ``error`` is the largest estimated relative error of those formed so far by
    differences, None otherwise; ``unreached`` lists the parameters that the loss does not depend on, whose rows are
    zero. When the parameters change, the operator is stale and says so at the next product.
    """

    def __init__(
        self, batches: Batches, build: Builder, *, mode: str, psd: bool, names: Sequence[str] | None = None
    ) -> None:
        self._batches = batches
        self._build = build
        self._objective = working(batches.first)
        self._params = points(self._objective)
        refuse_parameters(self._params)
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
        self._at_once: bool | None = None  # whether blocks of columns are faster: unknown until tried

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

    def _apply(self, columns: Tensor) -> Tensor:
        self._refuse_stale()
        total = torch.zeros_like(columns)
        weights = 0.0
        for weight, product in self._products():
            total += weight * self._columns(product, columns)
            weights += weight
            if product.errors:
                self.error = max([*product.errors, self.error or 0.0])
        if self._batches.rest is None:
            return total
        weights = self._sum_over_processes(total, weights)
        return total / weights if self._batches.reduction == "mean" else total

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

    # -- columns one by one, or at once -----------------------------------------------------------------------------

    def _columns(self, product: Product, columns: Tensor) -> Tensor:
        k = columns.shape[1]
        if k < TRIAL or not product.batches:
            return self._one_by_one(product, columns)
        if self._at_once is None:
            self._at_once = self._faster_at_once(product, columns[:, :TRIAL])
        if not self._at_once:
            return self._one_by_one(product, columns)
        return torch.cat([self._block(product, part) for part in columns.split(BLOCK, dim=1)], dim=1)

    def _one_by_one(self, product: Product, columns: Tensor) -> Tensor:
        results = [self._flat(product.apply(self._named(column), False)) for column in columns.unbind(1)]
        return torch.stack(results, dim=1) if results else torch.empty_like(columns)

    def _block(self, product: Product, columns: Tensor) -> Tensor:
        assert self.layout is not None
        parts = {name: part.movedim(-1, 0).to(self._params[name]) for name, part in self.layout.split(columns).items()}
        rows = product.apply(hold_padding(self._batches.first.model, parts), True)
        k = columns.shape[1]
        return torch.cat([rows[name].reshape(k, -1).to(columns) for name in self.layout.shapes], dim=1).T

    def _faster_at_once(self, product: Product, columns: Tensor) -> bool:
        """Whether a block of columns takes less time than one column after the other, and gives the same."""
        few = columns[:, :2]
        try:
            self._block(product, few)  # the first call compiles vmap's decompositions
        except (NotImplementedError, RuntimeError):  # an operation that vmap cannot batch: one by one always works
            return False
        single, together = self._timed(lambda: self._one_by_one(product, few)), None
        together = self._timed(lambda: self._block(product, columns))
        same = torch.allclose(together[1][:, :2], single[1], rtol=1e-3, atol=1e-3 * float(single[1].abs().max()))
        return same and together[0] / columns.shape[1] < single[0] / 2

    def _timed(self, run: Callable[[], Tensor]) -> tuple[float, Tensor]:
        self._wait()
        began = perf_counter()
        result = run()
        self._wait()
        return perf_counter() - began, result

    def _wait(self) -> None:
        if self.device.type in ("cuda", "xpu", "mps"):
            getattr(torch, self.device.type).synchronize()

    def _named(self, column: Tensor) -> Params:
        assert self.layout is not None
        parts = {name: part.to(self._params[name]) for name, part in self.layout.split(column).items()}
        return hold_padding(self._batches.first.model, parts)

    def _flat(self, x: Params) -> Tensor:
        assert self.layout is not None
        return torch.cat([x[name].reshape(-1).to(self.device, self.dtype) for name in self.layout.shapes])

    # -- staleness --------------------------------------------------------------------------------------------------

    def _version_numbers(self) -> list[int]:
        return [p._version for p in self._batches.first.model.parameters()]

    def _refuse_stale(self) -> None:
        if self._version_numbers() != self._versions:
            raise RuntimeError(
                "the model's parameters have changed since this operator was made, so its products would belong to no "
                "one point. Make a new operator after each step."
            )
