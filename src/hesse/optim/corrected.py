"""EKFAC's running curvature: eigenbases of the factors, and eigenvalues averaged in them.

State of a weight, beside its factors: ``basis_a``, ``basis_g`` and ``values``, the running mean of the squares of
per-example gradients in that basis. The damping is added to the eigenvalues at every step, so that nothing has to be
inverted anew when it moves.

A weight with a side above the limit, whose factors are in parts, keeps the products of their eigenvalues and its
inverses, as without correction.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hesse import tree
from hesse.curvature.factored import Eigenbasis
from hesse.linalg.roots import eigenbasis, off_diagonal
from hesse.optim.base import precise
from hesse.optim.factors import Factors

__all__ = ["Corrected"]

TURNED = 0.1  # of a factor in its old basis may lie off the diagonal before the basis is turned


class Corrected(Factors):
    """:class:`hesse.optim.factors.Factors` in the eigenbases of the factors, with corrected eigenvalues."""

    ready = ("basis_g", "inverse_g")

    def bases(self) -> dict[str, Eigenbasis]:
        found = {}
        for name, block in self.blocks.items():
            state = self.states.get(name, {})
            if "basis_g" in state:
                a, g = state.get("basis_a"), state["basis_g"]
                groups, m, n = block[0], g.shape[-1], state["factor_a"].shape[-1]
                found[name] = Eigenbasis(a, g, g.new_empty(()).expand(groups, m, n))
        return found

    @precise
    def refresh(self, damping: float, limit: float | None = None, grad: tree.Params | None = None) -> bool:
        """New bases where a factor has turned away from the old one; damping and limit are for weights in parts."""
        super().refresh(damping, limit, grad)
        for names, fresh in self._turned():
            for side in ("g", "a"):
                factor = self._joined(names, f"factor_{side}")
                if side == "a" and factor.ndim < 3:
                    continue  # an embedding's is diagonal as it is
                if fresh:
                    self._keep(names, **{f"basis_{side}": eigenbasis(factor)})
                    continue
                old = self._joined(names, f"basis_{side}")
                if bool((off_diagonal(old.mT @ factor @ old) > TURNED).any()):
                    new = eigenbasis(factor, old)
                    self._turn(names, side, (new.mT @ old).square())
                    self._keep(names, **{f"basis_{side}": new})
            for name in names:
                if "values" not in self.states[name]:
                    self.states[name]["values"] = self._products(name)
        return True

    def _turned(self) -> Iterator[tuple[list[str], bool]]:
        """The kinds with whole factors, and whether they have no basis yet. Eigenvalues are of the basis there is."""
        for names in self._kinds("factor_a"):
            for fresh in (True, False):
                some = [name for name in names if ("basis_g" not in self.states[name]) == fresh]
                if some and self._cut_shape(some) is None:
                    yield some, fresh

    def _inverted(self) -> list[list[str]]:
        return [names for names in self._kinds("factor_a") if self._cut_shape(names) is not None]

    def _turn(self, names: list[str], side: str, squares: Tensor) -> None:
        """The diagonal, in the new basis, of what is diagonal in the old one."""
        for name, part in zip(names, self._by_name(names, squares), strict=True):
            values = self.states[name].get("values")
            if values is not None:
                self.states[name]["values"] = part @ values if side == "g" else values @ part.mT

    def _products(self, name: str) -> Tensor:
        """K-FAC's eigenvalues [G, m, n], to begin with."""
        state = self.states[name]
        g = _in_basis(state["factor_g"], state["basis_g"])
        a = _in_basis(state["factor_a"], state["basis_a"]) if "basis_a" in state else state["factor_a"]
        values = g[..., :, None] * a[..., None, :]
        return values if values.ndim == 3 else values[None]

    def _natural(self, names: list[str], matrix: Tensor, damping: float) -> Tensor:
        if "basis_g" not in self.states[names[0]]:
            return super()._natural(names, matrix, damping)
        g = self._joined(names, "basis_g")
        a = self._joined(names, "basis_a") if "basis_a" in self.states[names[0]] else None
        values = torch.cat([self.states[name]["values"] for name in names])
        basis = Eigenbasis(a, g, values)
        return basis.out_of(basis.into(matrix) / (values + damping))


def _in_basis(factor: Tensor, basis: Tensor) -> Tensor:
    """The Rayleigh quotients [.., n]."""
    return (basis * (factor @ basis)).sum(-2)
