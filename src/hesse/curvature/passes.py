"""Backward passes that answer for many examples at once, and the proof that they may.

A column s of a root of H_L touches one term of each example. Sent back for all examples together, it gives at the
output of a layer every example's own gradient in that example's own rows, and squares and outer products of per-example
gradients cost one backward pass a column, instead of one a column and example. That holds where examples do not mix.
Batch norm in training mode mixes them, a positional embedding is added to all of them, a weight may be used in ways
that no rule knows, a model may have its examples second. So every parameter gets the :class:`Share` of fewest passes
that is proved right for it:

1. all rows of the outputs together, or groups of rows (sequences whose tokens were flattened into dimension 0);
2. examples one by one, each run through the model alone, if that gives the outputs and the gradient of the batch;
3. terms one by one, a backward pass of the whole batch for each, which is always right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hesse.curvature.columns import Columns
from hesse.curvature.culprit import DerivativeError
from hesse.curvature.evaluate import evaluate
from hesse.curvature.examples import Examples, example_dims, powers
from hesse.curvature.uses import Coverage, Use, coverage, watch_uses
from hesse.objective import Objective
from hesse.tree import Params

__all__ = ["Run", "Share", "shares", "watch"]


@dataclass(frozen=True, eq=False)
class Run:
    """One forward pass with its graph, and what it used.

    Args:
        objective: whose model ran.
        params: all parameters by name, as they were used.
        uses: of those that are asked for.
        outputs: a tensor.
        coverage: what the uses explain.
    """

    objective: Objective
    params: Params
    uses: list[Use]
    outputs: Tensor
    coverage: Coverage

    def gradients(self, targets: Sequence[Any], r: Tensor, batched: bool = False) -> tuple[Tensor | None, ...]:
        """Gradients of ``sum(r * outputs)``, or of that for each of ``r`` [k, *outputs]. The graph is kept.

        To be called inside ``objective.at(params)``.
        """
        r = r.to(self.outputs.dtype)
        return torch.autograd.grad(
            self.outputs, targets, r, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )


class Share(NamedTuple):
    """Parameters whose gradients come from the same backward passes.

    Args:
        run: the forward pass.
        names: of the parameters that are read at their uses.
        places: the number of each use, and where it keeps what is sent back together; None: all is one.
        loose: names of parameters whose gradients are taken at themselves, for want of uses.
        parts: a column, shaped like the outputs of the batch, as those parts of it that may be sent back, shaped like
            the outputs of the run.
        passes: what a column costs, in backward passes of the batch.
        rows: how many examples the run has.
        sent: what the first column gave at the uses, if the proof has sent it back already.
    """

    run: Run
    names: tuple[str, ...]
    places: dict[int, Examples | None]
    loose: tuple[str, ...]
    parts: Callable[[Tensor], Iterable[Tensor]]
    passes: float
    rows: int
    sent: list[Tensor | None] | None = None


def watch(objective: Objective, params: Params, names: Iterable[str]) -> Run:
    """Run the model at ``params`` and note the uses of those called ``names``.

    Raises:
        ValueError: as :func:`hesse.curvature.evaluate.evaluate`.
        DerivativeError: a part of the model is checkpointed by a second forward pass of its own.
    """
    return _watch(objective, params, names, lambda: evaluate(objective, params)[0])


def shares(run: Run, columns: Columns, *, together: bool = False) -> Iterator[Share]:
    """The parameters that influence the outputs, each in one share of a batch, or in one of each of its examples.

    To be called inside ``objective.at(params)``.

    Args:
        run: the forward pass of the batch.
        columns: what is to be sent back.
        together: send what cannot be proved back for all rows together nevertheless. For columns that are random, and
            independent between terms, that is right in the mean.
    """
    rows = columns.rows
    left, loose = sorted(run.coverage.known), sorted(run.coverage.loose)
    for split in _splits(run, rows) if left and rows > 1 else ():
        first = columns.first if split.times == 1 else None
        places, grads = _prove(run, left, split, _random(run.outputs) if first is None else first)
        proved = tuple(name for name in left if _all_known(run, name, places))
        if proved:
            used = [i for i in places if not set(run.uses[i].names).isdisjoint(proved)]
            sent = None if first is None else [grads[i] for i in used]
            yield Share(run, proved, {i: places[i] for i in used}, (), split.parts, split.times, rows, sent)
        left = [name for name in left if name not in proved]
        if not left:
            break
    rest = [*left, *loose]
    if not rest:
        return
    if together or rows == 1:
        yield _whole(run, rest, lambda column: (column,), 1, rows)
        return
    for split in _splits(run, rows):
        if alone := _alone(run, rest, split):
            for group, one in enumerate(alone):
                yield _whole(one, rest, partial(split.parts_of, group), split.times / split.groups, 1)
            return
    yield _whole(run, rest, _Split(rows, 1).parts, rows, rows)


class _Split(NamedTuple):
    """Rows of the outputs in groups: row ``group * k + i`` is in a group if ``major``, else ``i * groups + group``."""

    rows: int
    groups: int
    major: bool = True

    @property
    def times(self) -> int:
        """How many rows a group has."""
        return self.rows // self.groups

    def of(self, group: int) -> slice:
        """The rows of a group."""
        return slice(group * self.times, (group + 1) * self.times) if self.major else slice(group, None, self.groups)

    def parts(self, column: Tensor) -> Iterable[Tensor]:
        """Those that touch one row of each group."""
        turned = _Split(self.rows, self.times, not self.major)  # whose groups are the i-th rows of ours
        return (column,) if self.times == 1 else (_only(column, turned.of(i)) for i in range(self.times))

    def parts_of(self, group: int, column: Tensor) -> Iterable[Tensor]:
        """Those of a group that touch one of its rows, without the other groups."""
        rows = column[self.of(group)]
        return (rows,) if self.times == 1 else (_only(rows, slice(i, i + 1)) for i in range(self.times))

    def spread(self, factors: Tensor) -> Tensor:
        """A number for each row, [rows], from one for each group."""
        return factors.repeat_interleave(self.times) if self.major else factors.repeat(self.times)


def _only(column: Tensor, rows: slice) -> Tensor:
    part = torch.zeros_like(column)
    part[rows] = column[rows]
    return part


def _splits(run: Run, rows: int) -> Iterator[_Split]:
    """The splits to try, those of fewest passes first."""
    yield _Split(rows, rows)
    leaves = [x for x in pytree.tree_leaves(run.objective.inputs) if isinstance(x, Tensor)]
    sizes = {size for x in leaves for size in x.shape[:2] if 1 < size < rows and rows % size == 0}
    for size in sorted(sizes, reverse=True):
        yield _Split(rows, size)
        yield _Split(rows, size, major=False)


def _prove(
    run: Run, names: Sequence[str], split: _Split, r: Tensor
) -> tuple[dict[int, Examples | None], dict[int, Tensor | None]]:
    """Where each use of the names that influences the outputs keeps the groups of the split, None if nowhere; and what
    ``r`` gives there, which should have something of everything that will be sent back."""
    numbers = [i for i, use in enumerate(run.uses) if not set(use.names).isdisjoint(names)]
    uses = [run.uses[i] for i in numbers]
    factors = powers(split.groups)
    by_row = split.spread(factors).to(r).view(-1, *[1] * (r.ndim - 1))
    edges = [use.edge for use in uses]
    plain, scaled = run.gradients(edges, r), run.gradients(edges, by_row * r)
    found = zip(numbers, example_dims(uses, plain, scaled, factors), plain, strict=True)
    places = {i: place for i, place, g in found if g is not None}
    return places, dict(zip(numbers, plain, strict=True))


def _all_known(run: Run, name: str, places: Mapping[int, Examples | None]) -> bool:
    of_name = [place for i, place in places.items() if name in run.uses[i].names]
    return bool(of_name) and None not in of_name


def _alone(run: Run, names: Sequence[str], split: _Split) -> list[Run]:
    """A run of each group's inputs alone; [] if they cannot be told, or alone are not what they are in the batch."""
    leaves, spec = pytree.tree_flatten(run.objective.inputs)
    if not any(_holds(x, split.groups) for x in leaves):
        return []
    r = _random(run.outputs)
    close = torch.finfo(r.dtype).eps ** 0.5
    limit = close * float(run.outputs.detach().abs().max())
    targets = [run.params[name] for name in names]
    sums = [(torch.zeros_like(p), torch.zeros_like(p)) for p in targets]
    runs = []
    for group in range(split.groups):
        one = copy.copy(run.objective)  # with the same random numbers
        own = [x[group : group + 1] if _holds(x, split.groups) else x for x in leaves]
        one.inputs = pytree.tree_unflatten(own, spec)
        try:
            single = _watch(one, run.params, names, one.run_model)
        except (RuntimeError, ValueError, TypeError, IndexError):  # it may refuse a batch of one, as batch norm does
            return []
        expected = run.outputs[split.of(group)]
        if not isinstance(single.outputs, Tensor) or single.outputs.shape != expected.shape:
            return []
        if not bool(((single.outputs - expected).abs() <= limit).all()):
            return []
        for (total, size), g in zip(sums, single.gradients(targets, r[split.of(group)]), strict=True):
            if g is not None:
                total += g
                size += g.abs()
        runs.append(single)
    for (total, size), g in zip(sums, run.gradients(targets, r), strict=True):
        if g is not None and not bool(((total - g).abs() <= close * size.max()).all()):
            return []
    return runs


def _watch(objective: Objective, params: Params, names: Iterable[str], run_model: Callable[[], Any]) -> Run:
    wanted = {name: params[name] for name in names}
    with torch.enable_grad(), objective.at(params), watch_uses(wanted) as uses:
        outputs = run_model()
    _refuse_reentrant(outputs)
    return Run(objective, params, uses, outputs, coverage(uses, wanted, outputs))


def _refuse_reentrant(outputs: Any) -> None:
    """Raise if a part of the graph is built in the backward pass only: what it uses would seem to influence nothing."""
    stack = [x.grad_fn for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise DerivativeError(
                "activation checkpointing with use_reentrant=True hides a part of the model from autograd until its "
                "backward pass; checkpoint with use_reentrant=False"
            )
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def _whole(
    run: Run, names: Sequence[str], parts: Callable[[Tensor], Iterable[Tensor]], passes: float, rows: int
) -> Share:
    """A share in which all that is sent back belongs together."""
    known = tuple(name for name in names if name in run.coverage.known)
    loose = tuple(name for name in names if name in run.coverage.loose)
    used = [i for i, use in enumerate(run.uses) if not set(use.names).isdisjoint(known)]
    return Share(run, known, dict.fromkeys(used), loose, parts, passes, rows)


def _holds(x: Any, rows: int) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == rows


def _random(outputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
