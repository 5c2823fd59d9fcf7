"""Why a call is wrong: what to change so that it is right.

A module that is wrong by itself is wrong because of something in it. Each suspicion is tried, and only what
makes the difference is blamed: a hook, if the module is right without it; a place where the gradient stops, if
holding its value makes the rest agree; a value kept from another call, if the call is right by itself; a number
format that is too small, if it is right in a larger one. What is left is named by its elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hesse.check.differences import BLUNT, Probe, own_scales
from hesse.check.naming.kinds import name as kind_of
from hesse.check.parts.boundaries import Culprit, Judge, taken_apart
from hesse.check.passes.calls import BROKEN, Call, Key, real
from hesse.check.passes.functions import FunctionCall, defined
from hesse.check.passes.hooks import hooks_of, off, title
from hesse.check.passes.operations import Operations, Stop
from hesse.check.passes.replay import Drift, Replay
from hesse.check.subject import Subject

__all__ = ["Cause", "Upcast", "cause_of", "leaping"]


@dataclass(frozen=True)
class Cause:
    """What is wrong with a culprit, and where that is written."""

    kind: str
    message: str
    remedy: str
    where: str | None = None
    function: str | None = None
    file: str | None = None
    line: int | None = None
    evidence: dict[str, Any] = field(default_factory=dict)


def cause_of(culprit: Culprit, judge: Judge, subject: Subject) -> list[Cause]:
    """The causes of one culprit; several if several stops or hooks matter.

    Args:
        judge: who found it.
        subject: what is checked.
    """
    is_function = isinstance(culprit.calls[0], FunctionCall)
    causes: list[Cause] = []
    if not is_function:
        causes = _hooks(culprit, judge, subject)
        written = None if causes else _tried(_overwritten, culprit, judge, subject)
        causes = causes or ([written] if written else _stops(culprit, judge))
    if not causes:
        one = None
        for suspicion in (_edited, _low_precision, _stale):
            one = one or _tried(suspicion, culprit, judge, subject)
        causes = [one or _named(culprit, judge, subject.batch)]
    return causes


def _tried(
    suspicion: Callable[[Culprit, Judge, Subject], Cause | None], culprit: Culprit, judge: Judge, subject: Subject
) -> Cause | None:
    """What a suspicion finds; nothing where the calls cannot be run by themselves, or not in another number format."""
    try:
        return suspicion(culprit, judge, subject)
    except BROKEN as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None


def _hooks(culprit: Culprit, judge: Judge, subject: Subject) -> list[Cause]:
    """The hooks without which the module is right."""
    hooks = hooks_of(subject.model, culprit.path) if subject.model is not None else []
    hooked = [entry for entry in judge.recorder.operations.hooked if entry[0] == culprit.path]
    if not hooks and not hooked:
        return []

    def right(context: AbstractContextManager[Any], silent: bool) -> bool:
        try:
            with context:
                other = taken_apart(subject, silent=silent)
                calls = other.modules().get(culprit.path)
                return calls is not None and other.judge(calls, Replay(other.recorder, culprit.replay.keys)) is None
        except BROKEN:  # the module cannot do without its hook
            return False

    message = "is changed by a hook: without it, it is right"
    remedy = "Change the hook, or take it off before training."
    if not right(off(hooks), True):
        return []
    found = [hook for hook in hooks if right(off([hook]), False)] if len(hooks) + bool(hooked) > 1 else hooks
    if not found and hooked and right(nullcontext(), True):
        sources = [(title(hook), *_source(hook, file, line)) for _, hook, file, line in hooked]
        return [Cause("hook", message, remedy, None, *source) for source in sources]
    return [
        Cause("hook", message, remedy, None, title(hook.function), *defined(hook.function)) for hook in found or hooks
    ]


def _source(hook: Any, file: str | None, line: int | None) -> tuple[str | None, int | None]:
    own = defined(hook)
    return own if own[0] else (file, line)


def _stops(culprit: Culprit, judge: Judge) -> list[Cause]:
    """The places where a gradient stops that should not: holding their values changes the differences."""
    stops = [s for s in judge.recorder.stops if s.key not in culprit.replay.keys]
    stops = [s for s in stops if any(call.index < s.index < call.end for call in culprit.calls)]
    held = [p for call in culprit.calls for p in culprit.replay.held(call)]
    stops = [s for s in stops if not any(p.index < s.index < p.end for p in held)]
    sites: dict[Key, list[Stop]] = {}
    for stop in stops:
        sites.setdefault(stop.key, []).append(stop)
    if not sites:
        return []
    calls = culprit.calls

    def wrong(replay: Replay) -> Culprit | None:
        try:
            return judge.judge(calls, replay, flat=True)
        except Drift:
            return culprit

    every = culprit.replay.holding(*sites)
    if culprit.flat and not any(slopes for _, slopes in culprit.wrong) and leaping(judge, calls, culprit.replay):
        return [_stopped(culprit, sites[key]) for key in list(sites)[-1:]]
    rest = wrong(every)
    guilty = []
    if rest is None:
        guilty = [key for key in sites if len(sites) == 1 or wrong(every.without(key)) is not None]
        guilty = guilty or list(sites)[-1:]  # each of them covers for the others
    else:  # something else is wrong too
        guilty = [key for key in sites if _matters(culprit, judge, key)]
    return [_stopped(culprit, sites[key]) for key in guilty]


def leaping(judge: Judge, calls: Sequence[Call], replay: Replay) -> Culprit | None:
    """A culprit that jumps too often for differences: the gradient is that of the stops held, and they matter.

    Rounding that is mixed with something smooth is such: between the jumps, its values move with what goes in.
    """
    sites = {s.key for s in judge.recorder.stops if any(call.index < s.index < call.end for call in calls)}
    every = replay.holding(*(sites - replay.keys))
    if every.keys == replay.keys:
        return None
    groups = judge.groups(calls, replay)
    free, still = judge.evaluator(calls, replay), judge.evaluator(calls, every)
    for group in groups:
        blunt = sorted(s.noise for s in judge.slopes(free, group))[1] > BLUNT
        held = judge.slopes(still, group) if blunt else []
        if not blunt or any(s.wrong for s in held) or sorted(s.noise for s in held)[1] > BLUNT:
            continue
        scales = list(own_scales(group.tensors).values())
        one, two = (Probe(f, list(group.tensors.values()), scales, judge.eps, judge.generator) for f in (free, still))
        for _ in range(3):
            direction = one.random_direction()
            length = max(1e-4, 16 * judge.eps)
            far, near = one.at(direction, length) - one.centre, one.at(direction, length / 2) - one.centre
            smooth = two.at(direction, length) - two.centre
            two.restore()
            steady = (far - 2 * near).abs() <= 0.25 * far.abs() + 4 * one.rounding
            missing = float((far - smooth)[steady].sum())
            if bool(steady.double().mean() < 0.8) or abs(missing) < 20 * one.total_rounding + 0.02 * abs(
                float(smooth.sum())
            ):
                break
        else:
            return Culprit(tuple(calls), replay, ((group, ()),), tuple(groups), free, True)
    return None


def _matters(culprit: Culprit, judge: Judge, key: Key) -> bool:
    """Whether differences change by more than their errors when the values at a stop are held."""
    other = culprit.replay.holding(key)

    try:
        for group, slopes in culprit.wrong:
            for one, two in zip(slopes, judge.slopes(judge.evaluator(culprit.calls, other), group), strict=True):
                if abs(one.numeric - two.numeric) > one.limit + two.limit and two.error < one.error:
                    return True
    except Drift:
        return False
    return False


def _stopped(culprit: Culprit, stops: Sequence[Stop]) -> Cause:
    stop = stops[0]
    place: dict[str, Any] = {"where": stop.path, "function": stop.operation, "file": stop.file, "line": stop.line}
    if culprit.flat:
        return Cause(
            "straight_through",
            "is that of another function: it goes straight through values that are constant almost everywhere",
            "If that is meant, declare it with hesse.check.straight_through.",
            **place,
        )
    if any(s.recurrent for s in stops):
        return Cause(
            "truncated_recurrence",
            f"lacks what comes by way of earlier steps: {stop.operation} cuts the recurrence {len(stops)} times",
            "Keep the graph between the steps; detach the state only between batches.",
            evidence={"times": len(stops)},
            **place,
        )
    return Cause(
        "detached",
        f"lacks a part: the gradient stops at {stop.operation} though the value matters",
        "Do without it there. If the gradient stops on purpose, declare it with hesse.check.straight_through, "
        "or freeze what it comes from with requires_grad_(False).",
        **place,
    )


def _stale(culprit: Culprit, judge: Judge, subject: Subject) -> Cause | None:
    """Whether the calls are right by themselves, right after a call that was the same; or at the given point only,
    where the first call was made that could leave something behind.
    """
    if any(culprit.replay.held(call) for call in culprit.calls) or culprit.flat:
        return None
    if not _right_alone(culprit, judge, nullcontext):
        with subject.back():
            other = taken_apart(subject)
            groups: dict[Any, list[Call]] = {**other.functions(), **other.modules()}
            calls = groups.get(_group(culprit.calls[0]))
            if calls is None or other.judge(calls, Replay(other.recorder, culprit.replay.keys)) is not None:
                return None
    return Cause(
        "stale_value",
        "depends on another call than its own: it is right when the call before was the same",
        "Keep what the backward needs with ctx.save_for_backward, not in a module, a class or a global.",
    )


def _edited(culprit: Culprit, judge: Judge, subject: Subject) -> Cause | None:
    """Whether the forward of the module, or what hangs on it, edits its own parameters."""
    names = [name for name in subject.edits if name.rpartition(".")[0] == culprit.path]
    if not names:
        return None
    sites = list(dict.fromkeys(judge.recorder.operations.writes))
    _, function, file, line = sites[0] if len(sites) == 1 else (None, None, None, None)
    return Cause(
        "stale_value",
        f"is that at another point: the forward pass edits {' and '.join(names)}, and the backward sees the new values",
        "Edit parameters between steps only, not inside the forward pass.",
        None,
        function,
        file,
        line,
        {"edited": names},
    )


def _overwritten(culprit: Culprit, judge: Judge, subject: Subject) -> Cause | None:
    """Whether the calls are right when what they write to past the graph is a copy."""
    sites = [site for site in dict.fromkeys(judge.recorder.operations.writes) if site[0] == culprit.path]

    def copying() -> Operations:
        operations = Operations(str, lambda stop, result: result)
        operations.copying = True
        return operations

    if culprit.flat or not sites or not _right_alone(culprit, judge, copying):
        return None
    path, function, file, line = sites[0]
    return Cause(
        "stale_value",
        "is that of other values: something is written to past the graph after it was kept for the backward",
        "Write x = x + 1 or use a clone; .data hides the edit from autograd, which would have refused.",
        path,
        function,
        file,
        line,
    )


def _group(call: Call) -> Any:
    return (call.cls, call.path) if isinstance(call, FunctionCall) else call.path


def _low_precision(culprit: Culprit, judge: Judge, subject: Subject) -> Cause | None:
    """Whether the calls are right when nothing in them is cast to half precision."""
    if judge.eps > 1e-4 and not any(p.dtype.itemsize > 2 for call in culprit.calls for p in call.inputs):
        return None
    upcast = Upcast()
    with upcast:
        culprit.calls[0]()
    if not upcast.casts:
        return None
    if not _right_alone(culprit, judge, Upcast):
        return None
    return Cause(
        "overflow",
        "is lost in half precision: it is right when the same numbers are kept in float32",
        "Scale before the cast, use bfloat16, or keep this part in float32.",
        evidence={"casts": sorted(upcast.casts)},
    )


def _right_alone(culprit: Culprit, judge: Judge, context: Callable[[], Any]) -> bool:
    """Whether each call is right when it is run and differentiated by itself inside ``context``, twice in a row."""
    for group, _ in culprit.wrong:
        sums = {name: torch.zeros_like(t) for name, t in group.tensors.items()}
        for k, call in enumerate(culprit.calls):
            for _ in range(2):
                with judge.unedited(), context():
                    grads = _alone(call, [judge.params[n] for n in group.tensors if n in judge.params])
            for name in sums:
                if name in judge.params:
                    sums[name] += real(grads[1].pop(0))
            for i, g in enumerate(grads[0]):
                name = f"{k}.{i}" if f"{k}.{i}" in sums else "input"
                if name in sums and (name != "input" or len(call.inputs) == 1):
                    sums[name] = real(g)

        def evaluate() -> Tensor:
            with context():
                return culprit.evaluate()

        if not all(bool(g.isfinite().all()) for g in sums.values()):
            return False
        slopes = judge.slopes(evaluate, type(group)(group.words, group.tensors, sums))
        if any(s.wrong for s in slopes) or min(s.noise for s in slopes) > 0.5:
            return False
    return bool(culprit.wrong)


def _alone(call: Call, params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of one call by its inputs and by parameters, from a backward pass of its own."""
    inputs, outputs = call.live()
    pairs = [(y, w) for y, w in zip(outputs, call.out_grads, strict=True) if w is not None and y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in pairs], [*inputs, *params], [w.to(y.dtype).clone() for y, w in pairs], allow_unused=True
    )
    every = [torch.zeros_like(t) if g is None else g.detach() for g, t in zip(grads, [*inputs, *params], strict=True)]
    return every[: len(inputs)], every[len(inputs) :]


def _named(culprit: Culprit, judge: Judge, batch: int | None) -> Cause:
    """What the elements of the gradient show."""
    kind = kind_of(culprit.case(judge.eps, batch), culprit.slopes, judge.generator)
    if culprit.flat and kind.name != "straight_through":
        return Cause(
            "straight_through",
            "is not zero though the function is constant almost everywhere",
            "If that is meant, declare it with hesse.check.straight_through.",
        )
    return Cause(kind.name, kind.message, kind.remedy, evidence=kind.evidence)


class Upcast(TorchFunctionMode):
    """Casts to half precision become casts to float32."""

    LOW = (torch.float16, torch.bfloat16)

    def __init__(self) -> None:
        super().__init__()
        self.casts: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("half", "bfloat16"):
            self.casts.add(name)
            return args[0].float()
        if any(x in self.LOW for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)):
            self.casts.add(name)
            args = tuple(torch.float32 if isinstance(x, torch.dtype) and x in self.LOW else x for x in args)
            kwargs = {
                k: torch.float32 if isinstance(x, torch.dtype) and x in self.LOW else x for k, x in kwargs.items()
            }
        return func(*args, **kwargs)
