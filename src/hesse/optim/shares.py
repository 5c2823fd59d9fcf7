"""Curvature of a batch that lies in several processes: each keeps the factors of some of the weights, and no others.

A statistic is a mean over the processes and goes to the one that owns the weight, which alone averages, inverts and
applies it; the directions come back. Work goes by cubic cost, so that it is done everywhere at about the same time,
and the memory of factors and inverses is divided by the number of processes (Osawa et al., 2019).

Three things are as if one process had the whole batch only under conditions, and right without them: a draw, which is
that of the whole batch if the parts have one shape and the loss is one of torch's; means over what is counted (rows
that an embedding looks up, tokens that are not ignored), if all count the same number; and the diagonals of parameters
that no rule knows, of which the mean of the processes' samples varies less than the one sample of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hesse import tree
from hesse.curvature.layers import Form
from hesse.curvature.output import OutputCurvature, output_curvature
from hesse.curvature.statistics import Diagonal, Kronecker, Statistics
from hesse.objective import Objective
from hesse.objective.replicas import Replicas

__all__ = ["Block", "agreed", "block_of", "draw", "hand_over", "owners", "parts_of", "sizes"]

Block = tuple[int, bool, str | None]  # number of matrices, whether they are transposed, the bias they take in

WHOLE = 2**22  # outputs of all processes that are sent for a draw of the whole batch: 16 MB


def block_of(statistic: Kronecker | Diagonal) -> Block | None:
    """How a weight is written as matrices, as plain values; None for what has no matrix."""
    return (*statistic.form, statistic.bias) if isinstance(statistic, Kronecker) else None


def parts_of(statistic: Kronecker | Diagonal) -> dict[str, Tensor]:
    """The tensors of a statistic, by their names in an optimiser's state."""
    if isinstance(statistic, Diagonal):
        return {"diagonal": statistic.values}
    found = {"factor_a": statistic.a, "factor_g": statistic.g}
    return found if statistic.values is None else {**found, "values": statistic.values}


def sizes(p: Tensor, block: Block) -> tuple[int, int, int, bool]:
    """Of a weight's matrices [G, m, n]: G, m, n, and whether A is a diagonal, as an embedding's is."""
    form, bias = Form(*block[:2]), block[2]
    m, n = p.shape[0] // form.groups, p.shape[1:].numel()
    m, n = (n, m) if form.transposed else (m, n)
    return form.groups, m, n + (bias is not None), form.transposed and p.ndim == 2


def owners(replicas: Replicas, params: tree.Params, blocks: Mapping[str, Block]) -> dict[str, int]:
    """The process that each parameter's curvature belongs to; a bias goes with its weight.

    Example:
        The cubes of the larger weight's sides are more than those of the two others together:

        >>> two = Replicas()
        >>> two.size = 2
        >>> params = {"a": torch.ones(4, 4), "b": torch.ones(9, 9), "c": torch.ones(4, 4), "d": torch.ones(4)}
        >>> owners(two, params, {"a": (1, False, "d"), "b": (1, False, None), "c": (1, False, None)})
        {'b': 0, 'a': 1, 'c': 1, 'd': 1}
    """
    costs, weights = {}, {block[2]: name for name, block in blocks.items() if name in params and block[2] in params}
    for name, p in params.items():
        if name in blocks:
            groups, m, n, diagonal = sizes(p, blocks[name])
            costs[name] = float(groups * (m**3 + (n if diagonal else n**3)))
        elif name not in weights:
            costs[name] = float(p.numel())
    found = replicas.owners(costs)
    return {**found, **{bias: found[weight] for bias, weight in weights.items() if bias is not None}}


def draw(objective: Objective, outputs: Tensor, curvature: OutputCurvature, seed: int) -> Tensor:
    """``curvature.draw()`` from a generator of its own; of several processes, this one's part of the whole batch's.

    Args:
        objective: the loss on this process's part of the batch.
        outputs: of the model there.
        curvature: of the loss there.
        seed: the same in all processes.
    """
    replicas = objective.replicas
    targets, spec = pytree.tree_flatten(objective.targets)  # one tensor, or one for each of several losses
    generator = torch.Generator(outputs.device)
    if replicas.size > 1:
        whole = (
            curvature.reduction is not None  # a loss of one's own does not say what a term weighs in the whole
            and outputs.numel() * replicas.size <= WHOLE
            and all(isinstance(target, Tensor) and outputs.shape[:1] == target.shape[:1] != () for target in targets)
        )
        shapes = (outputs.shape, [target.shape for target in targets]) if whole else f"only of {replicas.rank}"
        if not replicas.same(shapes):
            return curvature.draw(generator.manual_seed(seed * replicas.size + replicas.rank))
        every = pytree.tree_unflatten([replicas.gather(target) for target in targets], spec)
        curvature = output_curvature(objective.loss_fn, replicas.gather(outputs.detach()), every)
    return replicas.share(curvature.draw(generator.manual_seed(seed)))


def agreed(replicas: Replicas, found: Statistics) -> Statistics:
    """The statistics that are finite, of the weights that every process used, and used in the same way."""
    # An overflow averaged in would never leave.
    found = {name: statistic for name, statistic in found.items() if tree.is_finite(parts_of(statistic))}
    if replicas.size == 1:
        return found
    kinds = {name: (block_of(s), [tuple(x.shape) for x in parts_of(s).values()]) for name, s in found.items()}
    if replicas.same(kinds):
        return found
    every = replicas.objects(kinds)
    return {name: found[name] for name in sorted(found) if all(other.get(name) == kinds[name] for other in every)}


def hand_over(replicas: Replicas, found: Statistics, owner: Mapping[str, int]) -> None:
    """Replace the statistics of each parameter by their means, in the process that owns it."""
    for rank in range(replicas.size if replicas.size > 1 else 0):
        mine = [statistic for name, statistic in found.items() if owner[name] == rank]
        replicas.mean_at_(rank, [x for statistic in mine for x in parts_of(statistic).values()])
