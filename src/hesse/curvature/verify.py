"""Which way of forming a product to trust: tried, compared with differences of gradients, remembered.

torch refuses some second derivatives and gets others wrong without a word, so a mode is used for a model only after one
of its products has been held against differences of plain gradients. These are taken in float64 with a step so short
(1e-7 of the parameters) that a kink of a ReLU is hardly ever crossed; a mismatch counts when it shows again in another
direction, from a point beside this one, with a hundredth of the step. The verdict holds for the model as long as its
modules, their mode and the loss are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hesse import tree
from hesse.curvature.culprit import DerivativeError, culprit, operation
from hesse.curvature.evaluate import evaluate, refuse_parameters
from hesse.curvature.product import Builder, differentiable, gradients, hold_padding, points, working
from hesse.objective import Objective
from hesse.tree import Params

__all__ = ["choose_hessian", "choose_jacobian"]

# Of a parameter's size: a float64 difference then carries nine digits and seldom meets a kink; the second try, with a
# step that carries seven, starts from beside the point.
STEPS = (1e-7, 1e-9)
TOLERANCE = 1e-4  # of a product in float64, relative to a parameter's part or, a tenth of it, to the whole
LOW_TOLERANCE = 2e-2  # of one in float32, whose sums cancel
WAY_OUT = "Use mode='differences' (finite differences of gradients), or replace the operation"

Map = tuple[Callable[[Params], Params], Callable[[Params], Params]]  # v -> A v, and u -> A' u

_verdicts: WeakKeyDictionary[nn.Module, dict[Any, str]] = WeakKeyDictionary()


def choose_hessian(objective: Objective, modes: Mapping[str, Builder], mode: str, verify: bool) -> str:
    """The name of the mode for ``H v``: ``mode``, or for "auto" the first that works and is right.

    Raises:
        DerivativeError: none does.
        ValueError: the loss is not the same twice, or cannot be differentiated for a reason of the caller's.
    """

    def both_ways(name: str, objective: Objective, params: Params) -> Map:
        product = modes[name](objective, params, 0)
        return product.apply, product.apply

    return _choose("Hessian", objective, list(modes), mode, verify, both_ways, _slopes)


def choose_jacobian(objective: Objective, modes: Mapping[str, Any], mode: str, verify: bool) -> str:
    """The same for ``J v``, held against differences of the outputs."""

    def both_ways(name: str, objective: Objective, params: Params) -> Map:
        with torch.enable_grad(), objective.at(params):
            outputs, _ = evaluate(objective, params)
        leaves = differentiable(outputs)
        jacobian = modes[name](objective, params, outputs)

        def back(u: Params) -> Params:
            with objective.at(params):
                rows = gradients(leaves, params, list(u.values()))
            return _without_gaps(rows, params)

        return lambda v: _numbered(jacobian.apply(v)), back

    return _choose("Jacobian", objective, list(modes), mode, verify, both_ways, _outputs)


def _choose(
    what: str,
    objective: Objective,
    modes: list[str],
    mode: str,
    verify: bool,
    both_ways: Callable[[str, Objective, Params], Map],
    values: Callable[[Objective, Params], Params],
) -> str:
    """The first of the modes whose product is the derivative of ``values``, and whose transpose is its transpose."""
    known = _verdicts.setdefault(objective.model, {})
    key = (what, mode, _kind_of(objective))
    if key in known:
        return known[key]
    objective = working(objective)
    refuse_parameters(objective.model, objective.params)
    _refuse_random(objective)
    if mode == "differences":
        return mode
    candidates = [name for name in modes if name != "differences"] if mode == "auto" else [mode]
    if not verify:
        return candidates[0]
    refusals: list[str] = []
    for name in candidates:
        try:
            wrong = _wrong(objective, functools.partial(both_ways, name), values)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            refusals.append(f"{name} is refused by {operation(error)}")
        else:
            if not wrong:
                known[key] = name
                return name
            refusals.append(f"{name} is {wrong}")
    raise DerivativeError(
        f"no {what} product is to be trusted here: {'; '.join(refusals)}; first to fail: "
        f"{culprit(objective, _second_derivative)}. {WAY_OUT}."
    )


def _refuse_random(objective: Objective) -> None:
    params = objective.params
    with torch.no_grad():
        first, second = objective(params), objective(params)
    if not torch.equal(first, second) and bool(first.isfinite()) and not torch.allclose(first, second, rtol=1e-5):
        raise ValueError(
            f"the loss is not the same twice ({float(first):.9g}, then {float(second):.9g}), so it has no curvature. "
            "Random layers of torch draw the same numbers here; something else is random or keeps state: NumPy's "
            "generator, a generator of its own, a counter. Use eval mode or seed it inside forward."
        )


def _wrong(
    objective: Objective,
    both_ways: Callable[[Objective, Params], Map],
    values: Callable[[Objective, Params], Params],
) -> str:
    """What is wrong with a map, as words; nothing if empty."""
    exact = _in_float64(objective)
    for attempt, step in enumerate(STEPS):
        params = points(objective) if attempt == 0 else _nearby(objective)
        product, transposed = both_ways(objective, params)
        v = hold_padding(objective.model, _direction(params, attempt), tied=True)
        found = product(v)
        wrong = _disagreement(found, _difference(exact, params, v, values, step))
        if not wrong or not tree.is_finite(found):  # a kink makes differences jump, never a product NaN
            break
    if wrong:
        return f"wrong for {wrong}"
    # A hook that bends gradients bends their differences too; but u = A v then tells A' from the transpose of A.
    there = float(tree.dot(found, found))
    back = float(tree.dot(transposed(found), v))
    if not abs(there - back) <= _tolerance(found) * there:
        return (
            f"not symmetric: (A v)'(A v) = {there:.6g}, but v'A'(A v) = {back:.6g}. A hook or Function gives a "
            "gradient that is not that of the loss"
        )
    return ""


def _in_float64(objective: Objective) -> Objective:
    """The objective in float64 if it means the same there: a model may insist on a dtype, or draw other numbers."""
    if all(p.dtype == torch.float64 for p in objective.params.values()):
        return objective
    exact = objective.cast(torch.float64)
    try:
        with torch.no_grad():
            same = torch.allclose(exact(exact.params).double(), objective(objective.params).double(), rtol=1e-4)
    except (RuntimeError, TypeError):
        return objective
    return exact if same else objective


def _direction(params: Params, seed: int) -> Params:
    """Random, and in each parameter as long as the parameter is, so that all have a say."""
    generator = torch.Generator().manual_seed(seed)
    v = {}
    for name, p in params.items():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        size = float(p.detach().double().norm())
        v[name] = (noise * (size or 1.0) / max(float(noise.norm()), 1e-30)).to(p)
    return v


def _nearby(objective: Objective) -> Params:
    """The parameters moved by a ten-thousandth: units that stand on a kink (zero bias, silent input) leave it."""
    params = objective.params
    noise = _direction(params, seed=-1)
    return {name: (p.detach() + 1e-4 * noise[name]).requires_grad_() for name, p in params.items()}


def _difference(
    objective: Objective, point: Params, v: Params, values: Callable[[Objective, Params], Params], step: float
) -> Params:
    dtypes = {name: p.dtype for name, p in objective.params.items()}
    if any(dtype != torch.float64 for dtype in dtypes.values()):
        step = 1e-2  # no shorter one carries digits
    sides = [
        values(
            objective,
            {n: (p.detach().to(dtypes[n]) + t * v[n].to(dtypes[n])).requires_grad_() for n, p in point.items()},
        )
        for t in (step, -step)
    ]
    return tree.scale(0.5 / step, tree.add((1.0, sides[0]), (-1.0, sides[1])))


def _slopes(objective: Objective, params: Params) -> Params:
    with torch.enable_grad(), objective.at(params):
        _, loss = evaluate(objective, params)
        rows = gradients([loss], params, [None])
    return _without_gaps(rows, params)


def _without_gaps(rows: list[Tensor | None], like: Params) -> Params:
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(like.items(), rows, strict=True)}


def _outputs(objective: Objective, params: Params) -> Params:
    return {name: x.detach() for name, x in _numbered(differentiable(objective.outputs(params))).items()}


def _numbered(leaves: list[Tensor]) -> Params:
    return {f"output {i}" if i else "the output": x for i, x in enumerate(leaves)}


def _disagreement(found: Params, reference: Params) -> str:
    """The names of the parts that differ, and by how much; nothing if empty."""
    tolerance = max(_tolerance(found), 5 * _tolerance(reference) if _tolerance(reference) > TOLERANCE else 0.0)
    gap = torch.stack([(found[name].double() - reference[name].double()).norm() for name in found])
    size = torch.stack([reference[name].double().norm() for name in found])
    wrong = ~(gap <= tolerance * (size + 0.1 * size.norm()))  # NaN is wrong too
    worst = [
        f"{name} (by {float(g / s):.0%})" for name, g, s, w in zip(found, gap, size, wrong.tolist(), strict=True) if w
    ]
    return ", ".join(worst[:3]) + (f" and {len(worst) - 3} more" if len(worst) > 3 else "")


def _tolerance(x: Params) -> float:
    return TOLERANCE if all(value.dtype == torch.float64 for value in x.values()) else LOW_TOLERANCE


def _second_derivative(scalar: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]) -> str | None:
    """What is wrong with the second derivative of ``scalar`` at ``tensors``: refused, or not that of differences."""
    if not tensors:
        return None

    def gradient(at: list[Tensor], create: bool) -> list[Tensor | None]:
        value = scalar(at)
        if not value.requires_grad:
            return [None] * len(at)
        return list(torch.autograd.grad(value, at, create_graph=create, allow_unused=True))

    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in tensors]
    live = [x.clone().requires_grad_() for x in tensors]
    try:
        slopes = gradient(live, True)
    except (RuntimeError, NotImplementedError) as error:
        try:
            gradient(live, False)
        except (RuntimeError, NotImplementedError):
            return None  # not even a first derivative: a module that is not differentiated
        return f"a second derivative is refused by {operation(error)}"
    pairs = [(g, u) for g, u in zip(slopes, v, strict=True) if g is not None and g.requires_grad]
    try:
        at = {str(i): x for i, x in enumerate(live)}
        rows = gradients([g for g, _ in pairs], at, [u for _, u in pairs])
    except (RuntimeError, NotImplementedError) as error:
        return f"a second derivative is refused by {operation(error)}"
    low = any(x.dtype != torch.float64 for x in tensors)
    step = 1e-3 if low else 1e-6
    sides = []
    for t in (step, -step):
        moved = [(x + t * u).requires_grad_() for x, u in zip(tensors, v, strict=True)]
        sides.append(
            [torch.zeros_like(x) if g is None else g for x, g in zip(moved, gradient(moved, False), strict=True)]
        )
    expected = torch.cat([((a - b) / (2 * step)).flatten() for a, b in zip(*sides, strict=True)])
    got = torch.cat([(torch.zeros_like(x) if r is None else r).flatten() for x, r in zip(live, rows, strict=True)])
    if float((got - expected).norm()) > (5e-2 if low else 1e-4) * float(expected.norm()) + 1e-6:
        return f"the second derivative is wrong by {float((got - expected).norm() / expected.norm()):.0%}"
    return None


def _kind_of(objective: Objective) -> Any:
    """What a verdict depends on: the modules and their modes, which parameters move, the dtype, and the loss."""
    modules = tuple((type(m), m.training) for m in objective.model.modules())
    params = tuple((name, p.dtype) for name, p in objective.params.items())
    loss = objective.loss_fn.func if isinstance(objective.loss_fn, functools.partial) else objective.loss_fn
    return modules, params, getattr(loss, "__code__", type(loss) if isinstance(loss, nn.Module) else loss)
