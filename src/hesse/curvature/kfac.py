"""K-FAC and EKFAC: Kronecker factors of a model's curvature, and the operator that they make.

The block of a weight in the Gauss-Newton matrix is a sum of ``(a g')(a g')'`` over examples and positions, a from the
inputs and g from what is sent back. K-FAC (Martens and Grosse, 2015) puts ``A (x) G`` in its place, the product of the
second moments. What is sent back decides whose curvature it is: a draw with the loss's curvature as its second moment
("sampled", one pass), every column of a root of it ("exact"), or the data's own gradients ("empirical").

EKFAC (George et al., 2018) goes over the data once more with the eigenvectors of A and G, and takes for eigenvalues the
diagonal of the true matrix in that basis, ``E[(Q_G' grad_i Q_A)^2]``: none is nearer to it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hesse.curvature.collect import collect
from hesse.curvature.columns import Columns, Kind, columns_of, draws_of
from hesse.curvature.evaluate import refuse_parameters
from hesse.curvature.examples import Examples
from hesse.curvature.factored import Eigenbasis, KroneckerFactored
from hesse.curvature.layers import wide
from hesse.curvature.moments import Moments
from hesse.curvature.passes import Run, Share, shares, watch
from hesse.curvature.product import points, working
from hesse.curvature.sources import Batches, Reduction, batches_of
from hesse.curvature.squares import squares_of
from hesse.curvature.statistics import Block, Diagonal, Kronecker, Statistics, Variant, find_blocks
from hesse.curvature.turned import Turned
from hesse.objective.function import LossFn
from hesse.tree import Layout

__all__ = ["kfac"]

FisherType = Literal["sampled", "exact", "empirical"]
Sums = dict[tuple[str, str], Tensor]  # by what it is and of which parameter


def kfac(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Any, Any] | Iterable[tuple[Any, Any]],
    *,
    ekfac: bool = False,
    fisher_type: FisherType = "sampled",
    variant: Variant = "expand",
    samples: int = 1,
    seed: int = 0,
    reduction: Reduction = "mean",
    progress: bool = False,
) -> KroneckerFactored:
    """K-FAC's approximation of the Gauss-Newton matrix at the model's present parameters.

    Linear and embedding layers, convolutions and transposed ones of any kind, recurrent layers and attention have
    Kronecker blocks, with their biases where a bias is used with one weight only; tied weights and layers called
    several times have one block for all uses. Everything else (norms, free parameters, a weight used in two ways that
    do not fit one product) has its diagonal. The operator is a snapshot: it does not follow the parameters.

    Args:
        model, loss_fn, batch, reduction, progress: as for :func:`hesse.curvature.ggn`. Several batches give the factors
            of all their data.
        ekfac: correct the eigenvalues in a second pass over the data.
        fisher_type: ``"sampled"``: ``samples`` draws whose second moment is the loss's Hessian at the outputs (for
            cross-entropy and the squared error labels of the model's own distribution), one backward pass each;
            ``"exact"``: their expectation, in as many passes as an example has outputs; ``"empirical"``: the data's own
            gradients, one pass a term.
        variant: how the positions that share a weight are merged: ``"expand"`` as if each were an example, ``"reduce"``
            with the mean of a and the sum of g over the positions of an example (Eschenhagen et al., 2023).
        samples: how many draws.
        seed: of the draws.

    Returns:
        A symmetric, positive semidefinite operator whose inverse is known.

    Raises:
        ValueError: an option is unknown, or "reduce" where the examples of a layer cannot be told.
        TypeError: the loss has no curvature at the outputs.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015.
        George, Laurent, Bouthillier, Ballas and Vincent, Fast approximate natural gradient descent in a
        Kronecker-factored eigenbasis, NeurIPS 2018.
        Eschenhagen, Immer, Turner, Schneider and Hennig, Kronecker-factored approximate curvature for modern neural
        network architectures, NeurIPS 2023.

    Example:
        With one example and one output the block is one outer product, and K-FAC is exact:

        >>> x = torch.tensor([[1.0, 2.0]])
        >>> model, batch = nn.Linear(2, 1, bias=False), (x, torch.zeros(1, 1))
        >>> B = kfac(model, nn.functional.mse_loss, batch, fisher_type="exact")
        >>> B.dense()
        tensor([[2.0000, 4.0000],
                [4.0000, 8.0000]])
        >>> torch.allclose(B.inverse(1.0) @ (B @ x[0] + x[0]), x[0])
        True
    """
    if fisher_type not in ("sampled", "exact", "empirical"):
        raise ValueError(f"fisher_type must be 'sampled', 'exact' or 'empirical'; got {fisher_type!r}.")
    if variant not in ("expand", "reduce"):
        raise ValueError(f"variant must be 'expand' or 'reduce'; got {variant!r}.")
    if samples < 1:
        raise ValueError(f"samples must be at least 1; got {samples}.")
    batches = batches_of(model, loss_fn, batch, reduction, progress)
    params = working(batches.first).params
    refuse_parameters(model, params)
    passes = _Passes(batches, fisher_type, samples, seed)
    factors = _factors(passes, variant)
    dtype = functools.reduce(torch.promote_types, (p.dtype for p in params.values()), torch.float32)
    operator = KroneckerFactored(factors, Layout.of(params), dtype=dtype, device=passes.device)
    if not ekfac:
        return operator
    values = _corrected(passes, factors, operator.eigenbasis())
    return KroneckerFactored(factors, Layout.of(params), dtype=dtype, device=passes.device, values=values)


class _Pass(NamedTuple):
    """One batch: its forward pass, what is sent back, and what it counts."""

    run: Run
    columns: Columns
    weight: float


class _Passes:
    """Passes over all batches. The graph of a single one is kept, of several one at a time."""

    def __init__(self, batches: Batches, fisher_type: FisherType, samples: int, seed: int) -> None:
        self.batches = batches
        self.random = fisher_type == "sampled"
        self.kind: Kind = "ggn" if fisher_type == "exact" else "empirical"
        self.samples = samples
        self.seed = seed
        self.device = next(batches.first.model.parameters()).device
        self.kept = list(self._run()) if batches.rest is None else None

    def __iter__(self) -> Iterator[_Pass]:
        return self._run() if self.kept is None else iter(self.kept)

    def _run(self) -> Iterator[_Pass]:
        for i, objective in self.batches:
            batch = working(objective)
            params = points(batch)
            run = watch(batch, params, params)
            if self.random:
                columns = draws_of(batch, run.outputs, self.samples, self.seed + i)
            else:
                columns = columns_of(self.kind, batch, run.outputs, reduction=self.batches.reduction)
            yield _Pass(run, columns, self.batches.weight(batch, run.outputs))

    def shares(self, one: _Pass, *, examples: bool) -> Iterator[Share]:
        """How to send back. A draw goes to all terms together unless gradients of single examples are wanted."""
        run = one.run
        if self.random and not examples and not run.coverage.loose:
            blocks, _ = find_blocks(run.uses, run.params, run.coverage.known)
            if run.coverage.known <= {name for block in blocks for name in (block.weight, block.bias)}:
                places: dict[int, Examples | None] = {
                    i: None for i, use in enumerate(run.uses) if not run.coverage.known.isdisjoint(use.names)
                }
                return iter([Share(run, tuple(sorted(run.coverage.known)), places, (), lambda column: (column,), 1, 1)])
        return shares(run, one.columns, together=self.random)

    def mean(self, sums: Sums, blocks: dict[str, Block]) -> Sums:
        """The sums over all processes, those that count by the weight of batches divided by all weights."""
        if self.batches.distributed:
            _sum_over_processes(sums, blocks, self.device)
        if self.batches.rest is None or self.batches.reduction == "sum":
            return sums
        weighed = ("g", "values")
        return {key: value / sums["weight", ""] if key[0] in weighed else value for key, value in sums.items()}


def _factors(passes: _Passes, variant: Variant) -> Statistics:
    """The factors of all batches: those of their data in one."""
    sums: Sums = {}
    blocks: dict[str, Block] = {}
    for one in passes:
        _add(sums, "weight", "", wide(one.run.outputs).new_tensor(one.weight))
        with one.run.objective.at(one.run.params):
            for share in passes.shares(one, examples=variant == "reduce"):
                moments = {block.weight: Moments(block, share, variant) for block in _blocks(share, blocks)}
                squares = {name: sum_ for name, sum_ in squares_of(share).items() if name not in moments}
                collect(share, one.columns.all(), {**moments, **squares})
                for name, moment in moments.items():
                    if moment.a is not None and moment.g is not None and moment.rows is not None:
                        _add(sums, "a", name, moment.a)
                        _add(sums, "rows", name, moment.rows)
                        _add(sums, "g", name, one.weight * moment.g)
                for sum_ in squares.values():
                    for name, values in sum_.total().items():
                        _add(sums, "values", name, one.weight * values)
    sums = passes.mean(sums, blocks)
    for block in blocks.values():
        for member in (block.weight, block.bias):
            if member is not None and ("values", member) in sums:
                raise _changed(member)
    found: Statistics = {name: Diagonal(values) for (what, name), values in sums.items() if what == "values"}
    for name, block in blocks.items():
        if ("a", name) in sums:
            a, g, rows = sums["a", name], sums["g", name], sums["rows", name].clamp_min(1)
            a = a.div_(rows.view(-1, *[1] * (a.ndim - 1)))
            a = a[0] if a.ndim == 3 and len(a) == 1 else a
            found[name] = Kronecker(a, g[0] if len(g) == 1 else g, block.form, block.bias)
    return found


def _corrected(passes: _Passes, factors: Statistics, bases: Mapping[str, Eigenbasis]) -> dict[str, Tensor]:
    """EKFAC's eigenvalues [G, m, n]: the sums of the squares of per-example gradients in the eigenbases."""
    sums: Sums = {}
    blocks: dict[str, Block] = {}
    for one in passes:
        _add(sums, "weight", "", wide(one.run.outputs).new_tensor(one.weight))
        with one.run.objective.at(one.run.params):
            for share in passes.shares(one, examples=True):
                turned = {block.weight: Turned(block, bases[block.weight]) for block in _blocks(share, blocks)}
                if turned:
                    collect(share, one.columns.all(), turned)
                for name, squares in turned.items():
                    _add(sums, "values", name, one.weight * squares.total())
    sums = passes.mean(sums, blocks)
    return {name: sums["values", name] for name, factor in factors.items() if isinstance(factor, Kronecker)}


def _blocks(share: Share, known: dict[str, Block]) -> list[Block]:
    """The blocks of a share, noted in ``known``: they are to be alike in every share and batch.

    Raises:
        ValueError: they are not.
    """
    found, _ = find_blocks([share.run.uses[i] for i in share.places], share.run.params, frozenset(share.names))
    for block in found:
        first = known.setdefault(block.weight, block)
        if (first.form, first.bias) != (block.form, block.bias):
            raise _changed(block.weight)
    return found


def _changed(name: str) -> ValueError:
    return ValueError(
        f"the model uses {name!r} in one way in some batches and in another in others, and one block cannot hold both. "
        "Make K-FAC of batches that take the same way through the model."
    )


def _add(sums: Sums, what: str, name: str, value: Tensor) -> None:
    sums[what, name] = sums[what, name] + value if (what, name) in sums else value


def _sum_over_processes(sums: Sums, blocks: dict[str, Block], device: torch.device) -> None:
    """Add up the sums of all processes, in place; a process may have seen fewer parameters than others, or no batch."""
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, ({key: (value.shape, value.dtype) for key, value in sums.items()}, blocks))
    kinds = {key: kind for found, _ in seen for key, kind in found.items()}
    for _, found in seen:
        blocks |= found
    for key in sorted(kinds):
        shape, dtype = kinds[key]
        value = sums[key] if key in sums else torch.zeros(shape, dtype=dtype, device=device)
        dist.all_reduce(value)
        sums[key] = value
