"""K-FAC's running curvature: factors averaged over batches, their inverses, and the direction that they give.

All of it is kept in the state of an optimiser, a flat dictionary of tensors for each parameter: ``factor_a``,
``factor_g``, ``inverse_a``, ``inverse_g`` and ``rank`` (its effective dimension) of a weight with a Kronecker block;
``diagonal`` of any other parameter.

Weights whose matrices have one shape are a **kind**. A kind is factorised and multiplied at once, and what is made at
once lies side by side in memory, so that no copies are made for the next product.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from hesse import tree
from hesse.curvature.factored import Eigenbasis
from hesse.curvature.kronecker import apply_inverse, invert, split_damping
from hesse.curvature.layers import Form, as_matrix, from_matrix
from hesse.curvature.statistics import Kronecker, Statistics
from hesse.optim.base import precise

__all__ = ["CURVATURE", "Factors"]

# Keys of the state that statistics have made.
CURVATURE = ("diagonal", "factor_a", "factor_g", "inverse_a", "inverse_g", "rank", "basis_a", "basis_g", "values")
Block = tuple[int, bool, str | None]  # number of matrices, whether they are transposed, the bias they take in


class Factors:
    """The running curvature of ``params`` in ``state``, for the length of a step.

    Args:
        state: of each parameter.
        params: the parameters by name.
        blocks: the weights that have a Kronecker block, and the form of each.
        mine: the names whose curvature is kept in this process; None for all.
    """

    ready = "inverse_g"  # the key of the state that a weight with a direction has

    def __init__(
        self,
        state: Mapping[Tensor, dict[str, Any]],
        params: tree.Params,
        blocks: Mapping[str, Block],
        mine: Collection[str] | None = None,
    ) -> None:
        self.states = {name: state[p] for name, p in params.items()}
        self.params = params
        self.blocks = dict(blocks)
        self.mine = mine

    def bases(self) -> dict[str, Eigenbasis]:
        """Eigenvectors by name, in which a batch's statistics are to have corrected eigenvalues."""
        return {}

    @property
    def known(self) -> bool:
        """Whether statistics have been averaged in."""
        return any("factor_a" in state or "diagonal" in state for state in self.states.values())

    def learn(self, found: Statistics, weight: float) -> None:
        """Average a batch's statistics in. What the forward pass did not reach this time keeps those it has."""
        for name, statistic in found.items():
            state = self.states[name]
            if isinstance(statistic, Kronecker):
                parts = {"factor_a": statistic.a, "factor_g": statistic.g}
                if statistic.values is not None:
                    parts["values"] = statistic.values
                block: Block | None = (*statistic.form, statistic.bias)
            else:
                parts, block = {"diagonal": statistic.values}, None
            if not tree.is_finite(parts):
                continue  # an overflow averaged in would never leave
            if self.blocks.get(name) != block:  # new, or used in another way than before
                self._forget(name, block)
            if self.mine is not None and name not in self.mine:
                continue
            for key, value in parts.items():
                state[key] = state[key].lerp_(value, weight) if key in state else value

    def _forget(self, name: str, block: Block | None) -> None:
        for owner in (name, *([block[2]] if block and block[2] else [])):
            for key in CURVATURE:
                self.states[owner].pop(key, None)
        self.blocks.pop(name, None)
        if block:
            self.blocks[name] = block

    # -- inverses ---------------------------------------------------------------------------------------------------

    @precise
    def refresh(self, damping: float, limit: float | None = None, grad: tree.Params | None = None) -> bool:
        """New inverses at this damping; with a ``limit`` only of kinds whose old ones are further off than that.

        How far off is measured on the gradient, where it matters: with v a row (a column) of it and B the damped factor
        as it is now, the distance of ``B (B_old^{-1} v)`` from v, relative to v. A kind that has no inverse in float64
        keeps its old one.

        Returns:
            Whether any was made.
        """
        kinds = self._kinds("factor_a")
        ready = [all("inverse_a" in self.states[name] for name in names) for names in kinds]
        off = [0.0 if limit is None else float("inf")] * len(kinds)
        if limit is not None and grad is not None:
            measured = [self._off(names, damping, grad) for names, has in zip(kinds, ready, strict=True) if has]
            if measured:
                values = iter(torch.stack(measured).tolist())  # one synchronisation
                off = [next(values) if has else float("inf") for has in ready]
        due = [names for names, distance in zip(kinds, off, strict=True) if limit is None or not distance <= limit]
        for names in due:
            inverse = invert(self._joined(names, "factor_a"), self._joined(names, "factor_g"), damping)
            if inverse is not None:
                self._keep(names, inverse_a=inverse.a, inverse_g=inverse.g)
                for name, rank in zip(names, self._by_name(names, inverse.rank.to(inverse.g.dtype)), strict=True):
                    self.states[name]["rank"] = rank
        return bool(due)

    def _off(self, names: list[str], damping: float, grad: tree.Params) -> Tensor:
        matrix = self._matrices(names, grad)
        a, g = (self._joined(names, key) for key in ("factor_a", "factor_g"))
        shifts = split_damping(a, g, damping)
        inverses = [self._joined(names, key) for key in ("inverse_a", "inverse_g")]
        worst = []
        for side, factor, inverse, shift in zip((-2, -1), (a, g), inverses, shifts, strict=True):
            v, shift = matrix.mean(side), shift[:, None].to(matrix.dtype)
            if factor.ndim < g.ndim:
                back = inverse * v * (factor + shift)
            else:
                u = (inverse @ v[..., None])[..., 0]
                back = (factor @ u[..., None])[..., 0] + shift * u
            length = v.norm(dim=-1)
            worst.append(((back - v).norm(dim=-1) / length).where(length > 0, 0.0).amax())
        return torch.stack(worst).amax()

    # -- the direction ----------------------------------------------------------------------------------------------

    def effective_dimension(self, damping: float) -> Tensor:
        """``sum_i f_i / (f_i + damping)`` over the eigenvalues f_i of the running curvature, a scalar."""
        some = next(iter(self.params.values()))
        total = torch.zeros((), dtype=torch.float64, device=some.device)
        for state in self.states.values():
            if "values" in state:
                total += (state["values"] / (state["values"] + damping)).sum()
            elif "rank" in state:
                total += state["rank"].sum()
            elif "diagonal" in state:
                total += (state["diagonal"] / (state["diagonal"] + damping)).sum()
        return total

    @precise
    def direction(self, grad: tree.Params, damping: float) -> tree.Params:
        """``-B^{-1} grad`` with the inverses at hand, of the parameters whose curvature is kept here."""
        found: tree.Params = {}
        for names in self._kinds(self.ready):
            self._take(names, self._natural(names, self._matrices(names, grad), damping), grad, found)
        for name, state in self.states.items():
            if name not in found and (self.mine is None or name in self.mine):
                curvature = state.get("diagonal", 0.0)  # none yet for what the loss does not reach
                found[name] = (-grad[name] / (curvature + damping)).to(grad[name].dtype)
        return found

    def _natural(self, names: list[str], matrix: Tensor, damping: float) -> Tensor:
        """The damped inverses of a kind applied to [K, m, n]: at the damping that they were made with."""
        return apply_inverse(self._joined(names, "inverse_a"), self._joined(names, "inverse_g"), matrix)

    def _matrices(self, names: list[str], x: tree.Params) -> Tensor:
        """The weights of a kind, or what is shaped like them, as [K, m, n], in the precision of the factors."""
        rows = []
        for name in names:
            groups, transposed, bias = self.blocks[name]
            rows.append(as_matrix(x[name], Form(groups, transposed), x[bias] if bias else None))
        matrix = torch.cat(rows) if len(rows) > 1 else rows[0]
        return matrix.to(self.states[names[0]]["factor_g"].dtype)

    def _take(self, names: list[str], natural: Tensor, grad: tree.Params, found: tree.Params) -> None:
        """Write ``-natural`` [K, m, n] to ``found`` by name."""
        for name, part in zip(names, self._by_name(names, natural), strict=True):
            groups, transposed, bias = self.blocks[name]
            form, weight = Form(groups, transposed), grad[name]
            step, shift = from_matrix(part if groups > 1 else part[None], form, weight.shape, bias is not None)
            found[name] = step.to(weight.dtype).neg()
            if bias is not None and shift is not None:
                found[bias] = shift.to(weight.dtype).neg()

    # -- kinds ------------------------------------------------------------------------------------------------------

    def _kinds(self, key: str) -> list[list[str]]:
        """Names of weights that have ``key``, those whose matrices have one shape together."""
        kinds: dict[Any, list[str]] = {}
        for name, (groups, transposed, bias) in self.blocks.items():
            state = self.states.get(name, {})
            if key not in state:
                continue
            a, g = state["factor_a"], state["factor_g"]
            # A weight of several matrices is many at once already.
            kind = name if groups > 1 else (transposed, bias is not None, a.shape, g.shape, a.dtype, a.device)
            kinds.setdefault(kind, []).append(name)
        return list(kinds.values())

    def _joined(self, names: list[str], key: str) -> Tensor:
        """The tensors of a kind as one, [K, ...]: without a copy if that is what they are parts of."""
        parts = [self.states[name][key] for name in names]
        if self.blocks[names[0]][0] > 1:
            return parts[0]
        if len(parts) == 1:
            return parts[0][None]
        base = parts[0]._base
        if base is not None and len(base) == len(parts) and base.shape[1:] == parts[0].shape:
            step = base.stride(0) * base.element_size()
            if all(p._base is base and p.data_ptr() == base.data_ptr() + i * step for i, p in enumerate(parts)):
                return base
        return torch.stack(parts)

    def _keep(self, names: list[str], **found: Tensor) -> None:
        for key, value in found.items():
            for name, part in zip(names, self._by_name(names, value), strict=True):
                self.states[name][key] = part

    def _by_name(self, names: list[str], value: Tensor) -> list[Tensor]:
        """What belongs to each name in [K, ...]; all of it if the K are the matrices of one weight."""
        return [value] if self.blocks[names[0]][0] > 1 else list(value)
