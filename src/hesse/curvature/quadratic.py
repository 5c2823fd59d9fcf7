"""The quadratic model of a loss on a few directions, with the exact Gauss-Newton matrix and nothing formed.

For directions V = [v_1, .., v_k] the model ``m(c) = c' V'g + c' (V'GV + damping V'V) c / 2`` predicts how the loss
changes along V c. With G = J' H_L J an entry of V'GV is ``(J v_i)' H_L (J v_j)``: k forward-mode products, no matrix
(Martens and Grosse, 2015, section 7). Its minimiser sets step size and momentum at once: with V = [direction, last
update], c = (lr, momentum).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from hesse import tree
from hesse.curvature.jacobian import jvp
from hesse.linalg import solve_psd
from hesse.objective import Objective

__all__ = ["QuadraticModel", "quadratic_model"]


@dataclass(frozen=True)
class QuadraticModel:
    """``m(c) = slope' c + c' (curvature + damping * gram) c / 2`` on k directions.

    Args:
        slope: V'g, length k.
        curvature: V'GV, k x k.
        gram: V'V, k x k.
    """

    slope: list[float]
    curvature: list[list[float]]
    gram: list[list[float]]

    def minimiser(self, damping: float, fixed: Sequence[float | None] = ()) -> list[float]:
        """The coefficients c that minimise the damped model, given those that are ``fixed`` and not None."""
        matrix = self._matrix(damping)
        k = len(self.slope)
        given = [*fixed, *[None] * k][:k]
        free = [i for i, value in enumerate(given) if value is None]
        rhs = [-self.slope[i] - sum(matrix[i][j] * (c or 0.0) for j, c in enumerate(given)) for i in free]
        found = iter(solve_psd([[matrix[i][j] for j in free] for i in free], rhs) if free else [])
        return [next(found) if value is None else value for value in given]

    def value(self, c: Sequence[float], damping: float = 0.0) -> float:
        """The predicted change of the loss, negative where it falls."""
        matrix = self._matrix(damping)
        linear = sum(ci * s for ci, s in zip(c, self.slope, strict=True))
        return linear + 0.5 * sum(ci * cj * matrix[i][j] for i, ci in enumerate(c) for j, cj in enumerate(c))

    def _matrix(self, damping: float) -> list[list[float]]:
        return [
            [b + damping * v for b, v in zip(row, gram, strict=True)]
            for row, gram in zip(self.curvature, self.gram, strict=True)
        ]


def quadratic_model(
    objective: Objective,
    product: Callable[[Tensor], Tensor],
    grad: Mapping[str, Tensor],
    directions: Sequence[tree.Params],
    along: Callable[[tree.Params], Tensor] | None = None,
) -> QuadraticModel:
    """The model of ``objective`` around its live parameters on ``directions``.

    Args:
        objective: the loss of one batch.
        product: ``u -> H_L u`` at the outputs (see :func:`hesse.curvature.output_curvature`).
        grad: the gradient.
        directions: k trees of tensors shaped as the parameters.
        along: ``v -> J v``; by default :func:`hesse.curvature.jacobian.jvp`.
    """
    along = along or functools.partial(jvp, objective)
    outputs = [along(direction) for direction in directions]
    curved = [product(u) for u in outputs]
    rows = [[torch.sum(u * h, dtype=torch.float64) for h in curved] for u in outputs]
    k = len(directions)
    dots = {(i, j): tree.dot(directions[i], directions[j]) for i in range(k) for j in range(i + 1)}
    gram = [dots[max(i, j), min(i, j)] for i in range(k) for j in range(k)]
    slope = [tree.dot(v, grad) for v in directions]
    flat = torch.stack([*slope, *chain(*rows), *gram]).tolist()  # one synchronisation
    square = [flat[k + i * k : k + (i + 1) * k] for i in range(2 * k)]
    return QuadraticModel(flat[:k], square[:k], square[k:])
