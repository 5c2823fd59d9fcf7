"""What is wrong before any difference is taken: no number, no function, or no gradient at all.

A loss that is not finite, one that changes though nothing was changed, a backward that autograd refuses, a hook
that runs when all is done. Each is found by comparing what should be the same: two evaluations, the same numbers in
float32, the gradient before and after.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hesse.check.parts.boundaries import Judge, taken_apart
from hesse.check.parts.causes import Upcast
from hesse.check.passes.calls import BROKEN, Call, finite, first_difference, first_non_finite, tensors_of
from hesse.check.passes.functions import FunctionCall, defined
from hesse.check.passes.hooks import rewritten, title
from hesse.check.passes.operations import user_frame
from hesse.check.subject import Subject
from hesse.finding import Finding

__all__ = ["accumulated", "drifts", "non_finite", "not_deterministic", "overflow", "overwritten", "refused"]

CAST = "Scale before the cast, use bfloat16, or keep this part in float32."


def non_finite(subject: Subject, message: str) -> Finding:
    """The first call that turns numbers into NaN or infinity."""
    judge = taken_apart(subject)
    calls: list[Call] = [*judge.recorder.functions.calls, *judge.recorder.calls]
    call = first_non_finite(sorted(calls, key=lambda c: c.end))
    kind, function = "non_finite", None
    file, line = subject.source(call.path if call else "")
    remedy = "Look for log or division at zero, overflow of exp, a square root at zero, or NaN in the inputs."
    if call is not None:
        label = call.path or subject.name
        if isinstance(call, FunctionCall):
            function, (file, line) = call.name, call.source
            label = f"{call.name} in {label}"
        message += f" NaN or infinity first arises in {label}."
    upcast = Upcast()
    other = larger(subject, upcast)
    if other is not None and upcast.casts and finite(list(other.grads.values())):
        kind = "overflow"
        message += " In float32 the same numbers are finite."
        remedy = CAST
    where = call.path if call and call.path else subject.name
    return Finding(kind, where, message, remedy, severity="error", function=function, file=file, line=line)


TRIES = 5  # passes that are held against the first


def not_deterministic(subject: Subject, one: float, two: float) -> Finding:
    """The first call, and the first operation in it, that gives something else the second time."""
    first, call = subject.record()[0].calls, None
    for attempt in range(TRIES):  # what is random may fall alike
        if attempt == 1:
            subject.stir()
        call = call or first_difference(first, subject.record()[0].calls)
    subject.settle()
    where = call.path if call and call.path else subject.name
    file, line = subject.source(call.path if call else "")
    function = None
    origin = _origin(subject)
    if origin is not None:
        function, file, line = origin
    message = f"Two evaluations at the same point give {one:.6g} and {two:.6g}: the gradient cannot be checked."
    remedy = "Draw random numbers from torch's generators only, and keep no state but buffers between calls."
    return Finding(
        "non_deterministic", where, message, remedy, severity="error", value=abs(one - two),
        function=function, file=file, line=line,
    )  # fmt: skip


def refused(subject: Subject, error: RuntimeError) -> Finding | None:
    """A backward that returned what autograd cannot take; None if the error is about something else."""
    match = re.search(r"[Ff]unction (\w+)Backward\w* returned an (.*)", str(error))
    if match is None:
        return None
    recorder, _ = subject.record()
    subject.settle()
    for call in recorder.functions.calls:
        if call.cls.__name__ == match[1]:
            file, line = call.source
            message = f"The backward of {call.name} returned an {match[2]}."
            remedy = "Return one gradient for each argument, of the argument's shape."
            return Finding(
                "wrong_gradient", call.path or subject.name, message, remedy, severity="error", value=1.0,
                function=call.name, file=file, line=line,
            )  # fmt: skip
    return None


def drifts(subject: Subject) -> Finding:
    """The forward edits its own parameters, each time."""
    names = [name for name in subject.edits if name not in subject.excused]
    where = names[0].rpartition(".")[0]
    message = f"Each forward pass edits {' and '.join(names)} in place: no two evaluations are at the same point."
    file, line = subject.source(where)
    return Finding(
        "non_deterministic", where or subject.name, message, "Edit parameters between steps only.",
        severity="error", file=file, line=line,
    )  # fmt: skip


def accumulated(subject: Subject, grads: Sequence[Tensor]) -> list[Finding]:
    """Hooks that change gradients after they were accumulated, which no other look can see."""
    if subject.model is None:
        return []
    found = []
    for name, hook, before, after in rewritten(subject.model, dict(zip(subject.tensors, grads, strict=True))):
        error = float((after - before).norm() / torch.maximum(before.norm(), after.norm()))
        message = f"A hook changes the gradient of {name} after it was accumulated, by {error:.0%}."
        remedy = "Change the hook, or take it off before training."
        file, line = defined(hook)
        found.append(
            Finding(
                "hook", name.rpartition(".")[0] or subject.name, message, remedy, severity="error", value=error,
                function=title(hook), file=file, line=line,
            )
        )  # fmt: skip
    return found


def larger(subject: Subject, upcast: Upcast) -> Judge | None:
    """The pass with its casts to half precision undone; None if it cannot be run so, being in half itself."""
    try:
        return taken_apart(subject, upcast)
    except BROKEN:
        return None


def overflow(subject: Subject, judge: Judge) -> list[Finding]:
    """An operation that overflowed in float16, if it matters: the gradient is another one in float32."""
    overflowed = judge.recorder.operations.overflowed
    if overflowed is None:
        return []
    upcast = Upcast()
    other = larger(subject, upcast)
    pairs = [(judge.grads[name], g) for name, g in other.grads.items()] if other is not None else []
    if other is None or any(bool((a - b).norm() > 0.1 * b.norm()) for a, b in pairs):
        path, operation, file, line = overflowed
        message = f"{operation} overflows float16: the gradient differs from that of the same numbers in float32."
        return [
            Finding(
                "overflow", path or subject.name, message, CAST, severity="error", value=1.0,
                function=operation, file=file, line=line,
            )
        ]  # fmt: skip
    return []


def overwritten(subject: Subject, judge: Judge, grads: Sequence[Tensor]) -> list[Finding]:
    """Writes past the graph that changed what a backward needs: where calls are given copies, the gradient is
    another.
    """
    sites = dict.fromkeys(judge.recorder.operations.writes)
    pairs = list(zip(judge.grads.values(), grads, strict=True))
    if not sites or all(bool((a - b).norm() <= 1000 * subject.eps * b.norm()) for a, b in pairs):
        return []
    message = "is written to past the graph, after something else has kept it for its backward."
    remedy = "Write x = x + 1 or use a clone; .data hides the edit from autograd, which would have refused."
    return [
        Finding(
            "stale_value", path or subject.name, f"A tensor {message}", remedy, severity="error", value=1.0,
            function=operation, file=file, line=line,
        )
        for path, operation, file, line in sites
    ]  # fmt: skip


def _origin(subject: Subject) -> tuple[str, str | None, int | None] | None:
    """The first operation whose result differs between two passes, and the user's line."""
    traces = []
    for _ in range(2):
        with Trace() as trace, subject.unedited(), torch.enable_grad(), subject.random.again():
            subject.evaluate()
        traces.append(trace.steps)
        subject.stir()
    for one, two in zip(*traces, strict=False):
        if one != two:
            return one[0] if one[0] == two[0] else None
    return None


class Trace(TorchFunctionMode):
    """Notes each operation and a sum of what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[tuple[str, str | None, int | None], tuple[float, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sums = tuple(float(torch.nan_to_num(t.detach().abs().double()).sum()) for t in tensors_of(result))
        if sums:
            self.steps.append(((func.__name__, *user_frame()[:2]), sums))
        return result
