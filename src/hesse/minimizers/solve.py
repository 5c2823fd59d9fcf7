"""The loop: model, are we done, step. Nothing is remembered between two rounds but the state.

A method (:mod:`hesse.minimizers.method`) is a descent and a search. The descent makes a quadratic model of the
function at a point (Newton, BFGS, ...); the search finds how far to go by it (a line, a trust region, a cube). Between
them stands the question whether there is anything left to gain, and it is asked of the model, in the function's own
units:

- *converged*: the model promises less than ``rtol`` of what has been gained since the start, or no element of the
  gradient is above ``atol``;
- *precision reached*: it promises less than the function's rounding.

Both ask for curvature that is not negative; where it is, the search goes along it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from hesse.minimizers.diagnosis import diagnose
from hesse.minimizers.functions.function import Function, Point
from hesse.minimizers.method import ROUNDING, Advance, Method
from hesse.minimizers.models.dense import Dense, Model
from hesse.minimizers.result import Row, Status
from hesse.minimizers.saddle import leave
from hesse.minimizers.state import State, scalar
from hesse.tree import Params

__all__ = ["solve"]

# How far, in units of where it started and its first step, x goes before a function that still falls is unbounded.
FAR = 1e10


def solve(
    function: Function,
    method: Method,
    state: State,
    *,
    rtol: float,
    atol: float,
    max_steps: int,
    callback: Callable[[State, Point], None] | None = None,
) -> tuple[Point, Status]:
    """Go on from ``state`` until there is nothing left to gain; the state is advanced in place.

    Raises:
        whatever the user's function raises, KeyboardInterrupt excepted.
    """
    memory, trace = state.memory, state.trace
    if len(trace):  # going on: evaluations are counted on
        c, last = function.counts, trace[-1]
        c.nfev, c.njev, c.nhev, c.nhvp = last.nfev, last.njev, last.nhev, last.nhvp
    point = function.at(memory["x"])
    try:
        if not point.finite():
            return point, Status.NOT_FINITE
        if not len(trace):
            memory.update(start=scalar(point.value), steepest=scalar(point.steepest()), origin=memory["x"])
            memory.update(method.descent.begin(point))
            trace.rows.append(_row(0, point, 0.0, Advance(point, {}, 0.0)))
        if not point.x.numel():
            return point, Status.CONVERGED
        while True:
            model = method.descent.model(point, memory)
            status = _done(point, model, memory, rtol, atol)
            if status is None and trace[-1].step >= max_steps:
                status = Status.MAX_STEPS
            elif status is None:
                advance = method.search.advance(point, model, memory)
                if advance.point is None and model.lowest < 0:  # a gradient of zero tells the search no way down
                    advance = leave(point, Status.SADDLE)[1]
                if advance.point is None and isinstance(model, Dense) and model.lowest < 0 and point.steepest() > 0:
                    model = model.flattened()  # the function does not fall along the curvature that seemed negative
                    advance = method.search.advance(point, model, memory)
                status = diagnose(point, model) if advance.point is None else None
            if status is not None and status.success and math.isnan(model.lowest):
                status, advance = leave(point, status)
            if status is not None:
                return point, status
            new = advance.point
            assert new is not None
            memory.update(method.descent.update(memory, point, new), **advance.memory, x=new.x)
            trace.rows.append(_row(trace[-1].step + 1, new, float((new.x - point.x).norm()), advance))
            point = new
            if callback is not None:
                callback(state, point)
    except StopIteration:
        return point, Status.STOPPED
    except KeyboardInterrupt:
        return point, Status.INTERRUPTED


def _done(point: Point, model: Model, memory: Params, rtol: float, atol: float) -> Status | None:
    if point.value < -(torch.finfo(point.x.dtype).max ** 0.5):  # below, slopes cannot be squared any more
        return Status.UNBOUNDED
    steepest, known = point.steepest(), not math.isnan(model.lowest)
    gained = float(memory["start"]) - point.value
    # Where curvature is unknown, a promise of as much again as was gained is that of a line.
    if model.lowest < 0 or math.isinf(model.predicted) or (not known and model.predicted > 0.1 * gained):
        gone, begun = float((point.x - memory["origin"]).norm()), float(memory["origin"].norm())
        # From a start at zero and flat the first step may have any length: the last unit is one.
        if "first" in memory and gone > FAR * max(float(memory["first"]), begun, 1.0):
            return Status.UNBOUNDED
    if model.lowest < 0:
        return None
    if steepest <= atol:
        return Status.CONVERGED
    # A model that has not seen curvature may promise little where there is much to gain.
    if not known and steepest > rtol ** (0.75 if math.isinf(model.predicted) else 0.5) * float(memory["steepest"]):
        return None
    if math.isinf(model.predicted):
        # A slope where nothing curves is a way down, unless it is rounding: of the gradient's own terms at the start.
        level = torch.finfo(point.x.dtype).eps * float(memory["steepest"])
        if known:
            return Status.PRECISION if steepest <= level else None
        return None if model.natural else Status.CONVERGED
    before = float(memory["promised"]) if "promised" in memory else math.inf
    memory["promised"] = scalar(model.predicted)
    # Where the least value is 0 there is no |f| to hold the promise against. Then more digits are asked for, and while
    # the promise falls fast the next step, which is worth it, is waited for: a start that is far away would otherwise
    # make any end look near.
    digits = 1.5 if model.predicted > 0.1 * before else 2.0
    if model.predicted <= max(rtol * min(gained, abs(point.value)), rtol**digits * gained):
        return Status.CONVERGED
    if model.predicted <= ROUNDING * torch.finfo(point.x.dtype).eps * abs(point.value):
        return Status.PRECISION
    return None


def _row(step: int, point: Point, length: float, advance: Advance) -> Row:
    c = point.function.counts
    return Row(
        step, point.value, point.steepest(), length, advance.size, advance.trust_ratio, c.nfev, c.njev, c.nhev, c.nhvp
    )
