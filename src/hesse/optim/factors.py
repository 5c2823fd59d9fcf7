"""K-FAC's running curvature: factors averaged over batches, their inverses, and the direction that they give.

All of it is kept in the state of an optimiser, a flat dictionary of tensors for each parameter: ``factor_a``,
``factor_g``, ``inverse_a``, ``inverse_g`` and ``rank`` (its effective dimension) of a weight with a Kronecker block;
``diagonal`` of any other parameter. A weight with a side above a limit has both factors in parts, [k, b, b]
(:mod:`hesse.curvature.tiles`).

Weights whose matrices have one shape are a **kind**. A kind is factorised and multiplied at once, and what is made at
once lies side by side in memory, so that no copies are made for the next product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hesse import tree
from hesse.curvature import tiles
from hesse.curvature.factored import Eigenbasis
from hesse.curvature.kronecker import apply_inverse, invert, split_damping
from hesse.curvature.layers import Form, as_matrix, from_matrix
from hesse.curvature.statistics import Statistics
from hesse.objective.replicas import Replicas
from hesse.optim.base import precise
from hesse.optim.shares import Block, agreed, block_of, hand_over, owners, parts_of, sizes

__all__ = ["CURVATURE", "Factors"]

# Keys of the state that statistics have made.
CURVATURE = ("diagonal", "factor_a", "factor_g", "inverse_a", "inverse_g", "rank", "basis_a", "basis_g", "values")


class Factors:
    """The running curvature of ``params`` in ``state``, for the length of a step.

    Args:
        state: of each parameter.
        params: the parameters by name.
        blocks: the weights that have a Kronecker block, and the form of each.
        replicas: of the model. Each keeps the curvature of some of the parameters.
    """

    ready: tuple[str, ...] = ("inverse_g",)  # the keys of the state of which a weight with a direction has one

    def __init__(
        self,
        state: Mapping[Tensor, dict[str, Any]],
        params: tree.Params,
        blocks: Mapping[str, Block],
        replicas: Replicas | None = None,
    ) -> None:
        self.states = {name: state[p] for name, p in params.items()}
        self.params = params
        self.blocks = dict(blocks)
        self.replicas = replicas or Replicas()
        self.owners: dict[str, int] = {}
        self._share()

    def _share(self) -> None:
        """Find out who keeps what, and let go of what others keep."""
        if self.replicas.size == 1:
            return
        self.owners = owners(self.replicas, self.params, self.blocks)
        for name, state in self.states.items():
            if not self._is_mine(name):
                for key in CURVATURE:
                    state.pop(key, None)

    def _is_mine(self, name: str) -> bool:
        return self.replicas.size == 1 or self.owners[name] == self.replicas.rank

    def bases(self) -> dict[str, Eigenbasis]:
        """Eigenvectors by name, in which a batch's statistics are to have corrected eigenvalues."""
        return {}

    @property
    def known(self) -> bool:
        """Whether statistics have been averaged in, for all that is kept here.

        A loaded state may hold none, or those that another number of processes left to this one.
        """
        mine = {name: state for name, state in self.states.items() if self._is_mine(name)}
        whole = all("factor_a" in mine[name] for name in self.blocks if name in mine)
        return whole and (bool(self.blocks) or any("diagonal" in state for state in mine.values()))

    def learn(self, found: Statistics, weight: float) -> None:
        """Average a batch's statistics in. What the forward pass did not reach this time keeps those it has."""
        found = agreed(self.replicas, found)
        for name, statistic in found.items():
            block, state = block_of(statistic), self.states[name]
            cut = any(key in state and state[key].shape != value.shape for key, value in parts_of(statistic).items())
            if self.blocks.get(name) != block or cut:  # new, or used or cut in another way than before
                self._forget(name, block)
        self._share()
        hand_over(self.replicas, found, self.owners)
        for name, statistic in found.items():
            if self._is_mine(name):
                state = self.states[name]
                for key, value in parts_of(statistic).items():
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

        How far off is measured on the gradient, where it matters: with v a mix of its rows (columns) and B the damped
        factor as it is now, the distance of ``B (B_old^{-1} v)`` from v, relative to v. A kind that has no inverse in
        float64 keeps its old one.

        Returns:
            Whether any was made.
        """
        kinds = self._inverted()
        off: list[Any] = [math.inf] * len(kinds)
        if limit is not None and grad is not None:
            old = [i for i, names in enumerate(kinds) if all("inverse_a" in self.states[name] for name in names)]
            if old:
                measured = torch.stack([self._off(kinds[i], damping, grad) for i in old])
                for i, distance in zip(old, measured.tolist(), strict=True):  # one synchronisation
                    off[i] = distance
        worst = self._worst(kinds, off)
        due = [names for names in kinds if limit is None or not worst[self._kind(names[0])] <= limit]
        for names in due:
            inverse = invert(
                self._joined(names, "factor_a"), self._joined(names, "factor_g"), damping, self._cut_shape(names)
            )
            if inverse is not None:
                self._keep(names, inverse_a=inverse.a, inverse_g=inverse.g)
                for name, rank in zip(names, self._by_name(names, inverse.rank.to(inverse.g.dtype)), strict=True):
                    self.states[name]["rank"] = rank
        return limit is None or not max(worst.values(), default=0.0) <= limit

    def _worst(self, kinds: list[list[str]], off: list[float]) -> dict[Any, float]:
        """By kind how far off it is, in whatever process: the weights of one kind may be kept by several."""
        found = dict.fromkeys((self._kind(name) for name in self.blocks if name in self.params), 0.0)
        for names, distance in zip(kinds, off, strict=True):
            found[self._kind(names[0])] = distance if distance < math.inf else math.inf  # a NaN has no order
        return dict(zip(found, self.replicas.largest(list(found.values())), strict=True))

    def _off(self, names: list[str], damping: float, grad: tree.Params) -> Tensor:
        matrix = self._matrices(names, grad)
        a, g = (self._joined(names, key) for key in ("factor_a", "factor_g"))
        shape = self._cut_shape(names)
        shifts = split_damping(a, g, damping, shape)
        inverses = [self._joined(names, key) for key in ("inverse_a", "inverse_g")]
        worst = []
        for side, factor, inverse, shift in zip((-2, -1), (a, g), inverses, shifts, strict=True):
            # Not their plain sum: over the classes of a softmax that is zero, and its direction rounding.
            mix = torch.arange(matrix.shape[side], dtype=matrix.dtype, device=matrix.device).cos()
            v = mix @ matrix if side == -2 else matrix @ mix
            diagonal = factor.ndim < g.ndim
            if shape is not None:
                v = v[:, None] if diagonal else tiles.cut(v[..., None], factor)[..., 0]
            shift = shift.view(-1, *[1] * (v.ndim - 1)).to(matrix.dtype)
            if diagonal:
                back = inverse * v * (factor + shift)
            else:
                u = (inverse @ v[..., None])[..., 0]
                back = (factor @ u[..., None])[..., 0] + shift * u
            length = v.flatten(1).norm(dim=-1)
            worst.append(((back - v).flatten(1).norm(dim=-1) / length).where(length > 0, 0.0).amax())
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
        self.replicas.sum_([total])
        return total

    @precise
    def direction(self, grad: tree.Params, damping: float) -> tree.Params:
        """``-B^{-1} grad`` with the inverses at hand, of the parameters whose curvature is kept here or elsewhere."""
        found: tree.Params = {}
        for names in self._kinds(*self.ready):
            self._take(names, self._natural(names, self._matrices(names, grad), damping), grad, found)
        for name, state in self.states.items():
            if name not in found and self._is_mine(name):
                curvature = state.get("diagonal", 0.0)  # none yet for what the loss does not reach
                found[name] = (-grad[name] / (curvature + damping)).to(grad[name].dtype)
        if self.replicas.size > 1:
            found = {name: found[name] if name in found else torch.zeros_like(g) for name, g in grad.items()}
            self.replicas.sum_(list(found.values()))
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

    def _kinds(self, *keys: str) -> list[list[str]]:
        """Names of weights that have one of the ``keys``, those whose matrices have one shape together."""
        kinds: dict[Any, list[str]] = {}
        for name in self.blocks:
            if any(key in self.states.get(name, {}) for key in keys):
                kinds.setdefault(self._kind(name), []).append(name)
        return list(kinds.values())

    def _inverted(self) -> list[list[str]]:
        """The kinds whose factors are inverted."""
        return self._kinds("factor_a")

    def _cut_shape(self, names: list[str]) -> tuple[int, int] | None:
        """(m, n) of the matrices of a kind if their factors are in parts, whose shapes do not tell."""
        groups, m, n, _ = sizes(self.params[names[0]], self.blocks[names[0]])
        return (m, n) if self.states[names[0]]["factor_g"].ndim > (2 if groups == 1 else 3) else None

    def _kind(self, name: str) -> Any:
        """What weights have in common that are dealt with at once."""
        p, (groups, transposed, bias) = self.params[name], self.blocks[name]
        # A weight of several matrices is many at once already.
        return name if groups > 1 else (transposed, bias is not None, *sizes(p, self.blocks[name]), p.dtype, p.device)

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
