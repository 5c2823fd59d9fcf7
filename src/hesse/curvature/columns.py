"""Columns: the matrix between J' and J as a sum of squares, in pieces that a backward pass can take.

Between the Jacobians of a Gauss-Newton or Fisher matrix stands a block for each term of the loss. Written as
``sum_k s_k s_k'``, with columns s_k that touch one term of each example, it says what to send back for exact diagonals
and exact factors. The loss's Hessian has such a root in closed form; the empirical and the sampled Fisher matrix have
one column a term. Draws r with E[r r'] the whole matrix do it on average, in one pass for all terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hesse.curvature.output import OutputCurvature, output_curvature, term_gradients
from hesse.curvature.sources import Reduction
from hesse.objective import Objective

__all__ = ["Columns", "Kind", "columns_of", "draws_of"]

MIXED = 32  # columns up to which they are held all at once

Kind = Literal["ggn", "exact", "sampled", "empirical"]


class Columns(NamedTuple):
    """What to send back.

    Args:
        rows: how many examples dimension 0 of the outputs counts; 1 if it counts none.
        number: the most columns that there may be.
        all: the columns anew at each call, shaped like the outputs.
        first: the first of them, if it is a mixture in which every other shows.
    """

    rows: int
    number: int
    all: Callable[[], Iterator[Tensor]]
    first: Tensor | None = None


def columns_of(
    kind: Kind, objective: Objective, outputs: Tensor, *, seed: int = 0, reduction: Reduction = "mean"
) -> Columns:
    """The columns of one batch, each touching one term of an example.

    Args:
        kind: "ggn" for the loss's Hessian, or the Fisher matrix that is "exact", "sampled" (one label a term, drawn
            with ``seed``) or "empirical".
        objective: the loss and the targets.
        outputs: the model's.
        seed: of the draws.
        reduction: whether a loss of the user's own averages over examples or adds them up, for "empirical".

    Raises:
        TypeError: the outputs are not one tensor, or the loss has no curvature or no probability model.
        ValueError: the loss's Hessian has negative eigenvalues, so that it has no root.
    """
    curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
    rows = _rows(outputs, curvature)
    width = outputs.numel() // rows
    if kind == "ggn":
        _refuse_indefinite(curvature, outputs)
        return _mixed(rows, width, curvature.root)
    if kind == "exact":
        curvature.fisher_root()  # raises if there is none
        return _mixed(rows, width, curvature.fisher_root)
    if kind == "sampled":
        r = curvature.label(torch.Generator(outputs.device).manual_seed(seed))
    else:
        if curvature.reduction is None:  # a loss of one's own does not say what a term weighs
            curvature = output_curvature(objective.loss_fn, outputs, objective.targets, reduction)
        r = term_gradients(objective.loss_fn, outputs, objective.targets, curvature)
    terms = width // max(1, prod(outputs.shape[axis] for axis in curvature.axes))
    return _mixed(rows, terms, lambda: _terms(curvature.weight**0.5 * r, curvature.axes))


def draws_of(objective: Objective, outputs: Tensor, samples: int, seed: int) -> Columns:
    """So many draws whose outer products have the loss's Hessian as their mean; each touches all terms.

    Raises:
        TypeError, ValueError: as :func:`columns_of`.
    """
    curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
    scale = (curvature.weight / samples) ** 0.5

    def draws() -> Iterator[Tensor]:
        generator = torch.Generator(outputs.device).manual_seed(seed)
        return (scale * curvature.draw(generator) for _ in range(samples))

    return Columns(_rows(outputs, curvature), samples, draws, next(draws()) if samples == 1 else None)


def _rows(outputs: Tensor, curvature: OutputCurvature) -> int:
    return len(outputs) if outputs.ndim and 0 not in curvature.axes else 1


def _mixed(rows: int, number: int, columns: Callable[[], Iterator[Tensor]]) -> Columns:
    """A few columns turned so that the first is a sum of all with random signs; the sum of squares stays the same."""
    if number > MIXED or not (held := list(columns())):
        return Columns(rows, number, columns)
    block = torch.stack(held)
    signs = torch.randint(2, (len(block),), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    w = -signs / len(block) ** 0.5  # I - 2 w w' / w'w, with w = e_0 - signs / sqrt(K), takes e_0 there
    w[0] += 1
    if w.any():
        w = w.to(block)
        block = block - torch.tensordot(w * (2 / (w @ w)), torch.tensordot(w, block, 1), 0)
    return Columns(rows, number, lambda: iter(block), block[0])


def _terms(r: Tensor, axes: tuple[int, ...]) -> Iterator[Tensor]:
    """``r`` cut into tensors that keep one term of each example; ``axes`` make up a term's vector."""
    places: list[Iterable[Any]]
    places = [range(size) if d and d not in axes else [slice(None)] for d, size in enumerate(r.shape)]
    for place in product(*places):
        column = torch.zeros_like(r)
        column[place] = r[place]
        yield column


def _refuse_indefinite(curvature: OutputCurvature, outputs: Tensor) -> None:
    """Raise if the root is one of another matrix, the nearest that has any."""
    columns = curvature.root()  # raises if there is none
    if curvature.psd:
        return
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(curvature.product(outputs.detach()))
    axes = tuple(range(1 if _rows(outputs, curvature) > 1 else 0, u.ndim))
    expected = curvature.product(u)
    found = sum((s * ((s * u).sum(axes, keepdim=True) if axes else s * u) for s in columns), torch.zeros_like(u))
    if float((found - expected).abs().max()) > 1e-3 * float(expected.abs().max()):
        raise ValueError(
            f"the Hessian of the loss {curvature.name!r} at these outputs has negative eigenvalues: the loss is not "
            "convex there. So it has no square root, of which exact diagonals are made. Products are right all the "
            "same, and so are estimates: diagonal(method='bekas')."
        )
