"""What is asked of a loss at the model's outputs, whatever its formula: products, draws, square roots, counts.

A loss is a weighted sum of terms, ``loss = weight * sum_n l(o_n, t_n)``. Its Hessian at the outputs, H_L, is block
diagonal with one block ``weight * H_n`` a term. Gauss-Newton products multiply by it; sampled factors send back a
draw r with E[r r'] = H_n; the exact diagonal sends back the columns s_k of a square root. All are one matrix in
three forms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Generator, Tensor

__all__ = ["Counts", "OutputCurvature", "count", "nonnegative", "plain", "same_shape", "signs"]


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputCurvature(ABC):
    """H_L of one batch, as an action on tensors shaped like the outputs. Results are float32 at least.

    Args:
        name: of the loss, for messages.
        weight: of one term: 1 / ``total`` for a mean, 1 for a sum; 0 when no term counts.
        terms: how many terms count.
        total: what a mean divides by, with class weights and ``ignore_index`` counted; ``terms`` for a sum.
        reduction: "mean", "sum" or "batchmean"; None for a user's own loss that has not said.
        psd: whether H_L is known to be positive semidefinite.
        axes: the dimensions of the outputs that make up one term's vector: the class dimension of cross-entropy, all
            but the first for losses that are sums over elements.
    """

    name: str
    weight: float
    terms: float
    total: float
    reduction: str | None
    psd: bool
    axes: tuple[int, ...]

    @abstractmethod
    def product(self, u: Tensor) -> Tensor:
        """``H_L u``, the weight included, for one u shaped like the outputs. ``torch.vmap`` may run over it."""

    def products(self, many: Tensor) -> Tensor:
        """``H_L u`` for each of ``many`` [k, *outputs]: at once, or in a loop where an operation cannot be batched."""
        try:
            return torch.vmap(self.product)(many)
        except RuntimeError:  # an own loss may use what vmap has no rule for; a real error comes again in the loop
            return torch.stack([self.product(u) for u in many])

    def outer(self, r: Tensor, u: Tensor) -> Tensor:
        """``weight * r_n (r_n . u_n)`` for each term alone: the product of one sample, of :meth:`draw` or otherwise."""
        along = r * u
        if self.axes:  # the sum over no dimension is torch's sum over all
            along = along.sum(self.axes, keepdim=True)
        return self.weight * r * along

    @abstractmethod
    def draw(self, generator: Generator | None = None) -> Tensor:
        """A random r shaped like the outputs with E[r r'] = H_n for each term alone, zero for terms that do not count.

        The weight is not included. ``generator`` lives on the device of the outputs.
        """

    @abstractmethod
    def root(self) -> Iterator[Tensor]:
        """Tensors s_k shaped like the outputs with ``sum_k s_k,n s_k,n' = weight * H_n`` for every term n, exactly.

        Each touches one term of an example (dimension 0) only, so that the squares of the per-example gradients of
        all s_k add up to the exact diagonal of J' H_L J.
        """

    def label(self, generator: Generator | None = None) -> Tensor:
        """The gradient of each term at a label drawn from the loss's own probability model, weight not included.

        With class weights, ``pos_weight`` or label smoothing a term is drawn as if unweighted and then scaled by the
        root of its weight, so that the Fisher matrix is the Gauss-Newton matrix of the weighted terms.

        Raises:
            TypeError: the loss has no probability model.
        """
        raise self._no_model()

    def fisher(self, u: Tensor) -> Tensor:
        """``F_L u`` with F_L the second moment of :meth:`label`, the weight included: H_L itself for most losses.

        Raises:
            TypeError: the loss has no probability model.
        """
        raise self._no_model()

    def fisher_root(self) -> Iterator[Tensor]:
        """:meth:`root` of F_L.

        Raises:
            TypeError: the loss has no probability model.
        """
        raise self._no_model()

    def _no_model(self) -> TypeError:
        return TypeError(
            f"the loss {self.name!r} has no probability model to draw labels from, so it has no Fisher matrix. Use the "
            "Gauss-Newton matrix, which needs none, or the empirical Fisher, which takes the labels of the data."
        )

    def _refuse_negative(self, x: Tensor) -> Tensor:
        if not self.psd and bool((x < 0).any()):
            raise ValueError(
                f"the curvature of the loss {self.name!r} at these outputs has negative entries, so it has no square "
                "root, of which draws are made: are there negative weights or targets? Products are right all the same."
            )
        return x


class Counts(TypedDict):
    """The part of an :class:`OutputCurvature` that the reduction decides."""

    name: str
    weight: float
    terms: float
    total: float
    reduction: str


def count(name: str, reduction: str, terms: float, total: float | None = None) -> Counts:
    """Weight and counts of ``terms`` terms; ``total`` is what "mean" divides by where that is not their number.

    Raises:
        ValueError: the reduction leaves more than one number.
    """
    terms = float(terms)
    if reduction == "mean":
        total = terms if total is None else float(total)
        return Counts(name=name, weight=1 / total if total else 0.0, terms=terms, total=total, reduction=reduction)
    if reduction == "sum":
        return Counts(name=name, weight=1.0, terms=terms, total=terms, reduction=reduction)
    raise ValueError(
        f"the loss must be one number; got reduction={reduction!r} for {name}. Use reduction='mean' or 'sum'."
    )


def same_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    if targets.shape != outputs.shape:
        raise ValueError(
            f"{name} broadcasts outputs {list(outputs.shape)} against targets {list(targets.shape)}, which averages "
            "over pairs that do not belong together. Give both the same shape, for instance targets.view_as(outputs)."
        )


def plain(value: Any) -> Any:
    """A tensor without its graph and float32 at least; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().float() if value.dtype in (torch.bfloat16, torch.float16) else value.detach()


def nonnegative(*values: Tensor | None) -> bool:
    return all(value is None or bool((value >= 0).all()) for value in values)


def signs(like: Tensor, generator: Generator | None) -> Tensor:
    """Random signs: of all z with E[z z'] = 1 those whose squares do not vary."""
    return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
