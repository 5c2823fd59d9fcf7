"""What the rows of a Jacobian are made of, one row a sample of the batch: found without a backward pass for each.

The rows of :mod:`hesse.curvature.gram` are the gradients of single samples. For each parameter they are looked for in
this order:

1. in its uses by layers (:mod:`hesse.curvature.uses`), where examples are proved not to mix;
2. at copies of the parameter, one an example, in a second forward pass: gradients at the copies are the rows, however
   often the model differentiates itself on the way, as physics-informed networks do;
3. by a backward pass for each row, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hesse.curvature.examples import Examples, example_dims, powers
from hesse.curvature.gram import Formed, JacobianRows, Layered, Part, Root, sent_of
from hesse.curvature.layers import Entries, Form, Lookups, Rows, form_of, rows_of
from hesse.curvature.output import OutputCurvature
from hesse.curvature.uses import Use, coverage
from hesse.objective import Objective
from hesse.tree import Layout, Params

__all__ = ["jacobian_rows"]


def jacobian_rows(
    objective: Objective, params: Params, uses: Sequence[Use], outputs: Tensor, curvature: OutputCurvature
) -> JacobianRows:
    """What the rows of ``R' J`` are made of, after a forward pass. Called inside ``objective.at(params)``.

    Args:
        objective: of one batch.
        params: to differentiate by.
        uses: what :func:`hesse.curvature.uses.watch_uses` noted of them in the forward pass.
        outputs: of that pass, with their graph, which is kept.
        curvature: of the loss at the outputs.

    Raises:
        ValueError: the loss's Hessian has no root.

    Example:
        For one linear map and the squared error K is 2 / N times the Gram matrix of the inputs:

        >>> from hesse.curvature.output import output_curvature
        >>> from hesse.curvature.uses import watch_uses
        >>> x, y, layer = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1), torch.nn.Linear(2, 1, bias=False)
        >>> objective, params = Objective(layer, F.mse_loss, x, y), dict(layer.named_parameters())
        >>> with objective.at(params), watch_uses(params) as uses:
        ...     outputs = objective.run_model()
        ...     rows = jacobian_rows(objective, params, uses, outputs, output_curvature(F.mse_loss, outputs, y))
        >>> torch.allclose(rows.gram(), (x @ x.T).double()), torch.allclose(rows.normal(), (x.T @ x).double())
        (True, True)
    """
    root = Root.of(curvature, outputs)
    return JacobianRows(root, _parts(objective, params, outputs, uses, root), Layout.of(params))


def _parts(objective: Objective, params: Params, outputs: Tensor, uses: Sequence[Use], root: Root) -> dict[str, Part]:
    found = coverage(uses, params, outputs)
    number, batch = root.columns.shape[:2]
    columns = root.columns.view(number, *root.shape).to(outputs.dtype)
    factors = powers(batch)
    # No sum over examples vanishes by chance (as that of what batch norm sends back does) with weights like these.
    generator = torch.Generator().manual_seed(0)
    weights = (torch.rand(batch, generator=generator) + 0.5) * (torch.randint(2, (batch,), generator=generator) * 2 - 1)
    probe = _scaled(columns.sum(0) if number > 1 else columns[0], weights)
    scaled = _scaled(probe, factors)
    parts: dict[str, Part] = _by_layers(params, found.known, uses, outputs, columns, (probe, scaled), factors)
    left = {name: params[name] for name in sorted(found.known | found.loose) if name not in parts}
    if left and batch > 1:
        parts |= _by_copies(objective, params, left, outputs, columns, (probe, scaled), factors)
    left = {name: p for name, p in left.items() if name not in parts}
    return parts | _by_rows(left, outputs, columns, batch) if left else parts


def _scaled(column: Tensor, factors: Tensor) -> Tensor:
    return column.view(len(factors), -1).mul(factors.to(column)[:, None]).view(column.shape)


def _grads(outputs: Tensor, targets: Sequence[Any], r: Tensor, batched: bool = False) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(outputs, targets, r, retain_graph=True, allow_unused=True, is_grads_batched=batched)


def _by_layers(
    params: Params,
    known: frozenset[str],
    uses: Sequence[Use],
    outputs: Tensor,
    columns: Tensor,
    probes: tuple[Tensor, Tensor],
    factors: Tensor,
) -> dict[str, Part]:
    """The known parameters all of whose uses are proved to keep the examples apart."""
    uses = [use for use in uses if not known.isdisjoint(use.names)]
    if not uses:
        return {}
    edges = [use.edge for use in uses]
    if len(factors) > 1:
        plain, scaled = (_grads(outputs, edges, probe) for probe in probes)
        places = example_dims(uses, plain, scaled, factors)
    else:
        plain, places = _grads(outputs, edges, probes[0]), [None] * len(uses)
    live = [i for i, g in enumerate(plain) if g is not None]
    proved = {
        name
        for name in known
        if (of := [i for i in live if name in uses[i].names]) and (len(factors) == 1 or all(places[i] for i in of))
    }
    wanted = [i for i in live if not proved.isdisjoint(uses[i].names)]
    pieces: dict[str, list[tuple[Rows | Lookups | Entries, Form]]] = {name: [] for name in proved}
    if not wanted:
        return {}
    sent = [_grads(outputs, [edges[i] for i in wanted], column) for column in columns]
    for number, i in enumerate(wanted):
        for name, piece in _stacked(uses[i], [grads[number] for grads in sent], places[i]).items():
            if name in proved:
                pieces[name].append((piece, form_of(uses[i])))
    return {
        name: Layered([piece for piece, _ in of], [form for _, form in of], params[name].shape)
        for name, of in pieces.items()
    }


def _stacked(use: Use, grads: Sequence[Tensor | None], place: Examples | None) -> dict[str, Rows | Lookups | Entries]:
    """The pieces of one use for all columns."""
    each = [rows_of(use, g, place) for g in grads if g is not None]
    found: dict[str, Rows | Lookups | Entries] = {}
    for name, first in each[0].items():
        sent = torch.stack([sent_of(one[name]) for one in each])
        if isinstance(first, Entries):
            found[name] = Entries(sent, first.part)
        elif isinstance(first, Lookups):
            found[name] = Lookups(first.index, sent, first.padding, first.size)
        else:
            found[name] = Rows(first.a, sent, first.part)
    return found


class _Copies(TorchFunctionMode):
    """Linear maps of a batch apply to each example its own copy of their parameters, [B, *shape] by ``id``."""

    def __init__(self, copies: Mapping[int, Tensor], batch: int) -> None:
        super().__init__()
        self.copies = copies
        self.batch = batch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return self.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        w, b = self.copies.get(id(weight)), self.copies.get(id(bias))
        if (w is None and b is None) or input.ndim < 2 or input.shape[0] != self.batch or weight.ndim != 2:
            return F.linear(input, weight, bias)
        x = input.reshape(self.batch, -1, input.shape[-1])
        y = x @ (weight.mT if w is None else w.mT)
        if bias is not None:
            y = y + (bias if b is None else b[:, None])
        return y.reshape(*input.shape[:-1], weight.shape[0])


def _by_copies(
    objective: Objective,
    params: Params,
    left: Params,
    outputs: Tensor,
    columns: Tensor,
    probes: tuple[Tensor, Tensor],
    factors: Tensor,
) -> dict[str, Part]:
    """Those of the parameters ``left`` that are used by linear maps of the batch alone, with the examples apart."""
    batch = len(factors)
    copies = {name: p.detach().expand(batch, *p.shape).requires_grad_() for name, p in left.items() if p.ndim in (1, 2)}
    if not copies:
        return {}
    with torch.enable_grad(), objective.at(params), _Copies({id(left[name]): c for name, c in copies.items()}, batch):
        again = objective.run_model()
    close = torch.finfo(outputs.dtype).eps ** 0.5
    if not again.requires_grad or not torch.allclose(again, outputs, rtol=close, atol=close):
        return {}
    targets = [*copies.values(), *(left[name] for name in copies)]
    plain, scaled = (_grads(again, targets, probe) for probe in probes)
    proved = []
    for i, name in enumerate(copies):
        g, s, elsewhere = plain[i], scaled[i], plain[len(copies) + i]
        if g is not None and s is not None and elsewhere is None and _scales(g, s, factors):
            proved.append(name)
    sent = [_grads(again, [copies[name] for name in proved], column) for column in columns] if proved else []
    return {
        name: Formed(torch.stack([g.flatten(1) for grads in sent if (g := grads[i]) is not None]))
        for i, name in enumerate(proved)
    }


def _scales(g: Tensor, scaled: Tensor, factors: Tensor) -> bool:
    expected = g.flatten(1) * factors.to(g)[:, None]
    limit = 64 * torch.finfo(g.dtype).eps * expected.abs().amax(1, keepdim=True)
    return bool(((scaled.flatten(1) - expected).abs() <= limit).all())


def _by_rows(left: Params, outputs: Tensor, columns: Tensor, batch: int) -> dict[str, Part]:
    """A backward pass for each row, some of them at once."""
    number = len(columns)
    flat = columns.reshape(number * batch, -1)
    targets = list(left.values())
    step = max(1, 2**18 // max(outputs.numel(), *(p.numel() for p in targets)))
    rows: dict[str, list[Tensor]] = {name: [] for name in left}
    batched = True
    for begin in range(0, len(flat), step):
        some = flat[begin : begin + step]
        block = outputs.new_zeros(len(some), batch, some.shape[1])
        index = torch.arange(begin, begin + len(some), device=block.device)
        block[torch.arange(len(some), device=block.device), index % batch] = some
        block = block.view(len(some), *outputs.shape)
        found: Sequence[Tensor | None] = []
        if batched:
            try:
                found = _grads(outputs, targets, block, batched=True)
            except (RuntimeError, NotImplementedError):  # what cannot be batched; a real error comes up one by one
                batched = False
        if not batched:
            each = zip(*(_grads(outputs, targets, r) for r in block), strict=True)
            found = [None if any(g is None for g in of) else torch.stack(of) for of in each]
        for (name, p), g in zip(left.items(), found, strict=True):
            rows[name].append(p.new_zeros(len(some), p.numel()) if g is None else g.reshape(len(some), -1))
    return {name: Formed(torch.cat(of).detach().view(number, batch, -1)) for name, of in rows.items()}
