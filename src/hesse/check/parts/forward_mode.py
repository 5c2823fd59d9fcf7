"""Is the forward derivative right? A directional derivative, held against a difference along the same direction.

Forward mode has code of its own: the ``jvp`` of a custom autograd Function, and a formula for each of torch's
operations. ``jvp`` and ``backward`` of one Function may disagree without a word, since training uses one of them only.
A Function without a ``jvp`` is no fault: forward mode then refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as fw
from torch import Tensor
from torch.autograd import Function

from hesse.check.contract.trial import sentence
from hesse.check.differences import Probe, Slope, own_scales
from hesse.check.passes.functions import FunctionCall, defined
from hesse.check.passes.pieces import Piece, piece_of
from hesse.finding import Finding

__all__ = ["forward_slopes", "function_jvps", "has_jvp", "judge_jvp"]

ALONE = 8  # tensors that are moved by themselves, too
# What a user's jvp may raise that is its own fault.
BROKEN = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


def has_jvp(cls: type[Function]) -> bool:
    """Whether a Function says how it is differentiated forwards.

    Example:
        >>> class Twice(Function): ...
        >>> has_jvp(Twice)
        False
    """
    return cls.jvp is not Function.jvp


def function_jvps(calls: Sequence[FunctionCall], eps: float, generator: torch.Generator) -> list[Finding]:
    """The custom Functions of a recorded pass whose ``jvp`` is wrong, each once for a module; most have none to check.

    Args:
        calls: as recorded; those of Functions without a ``jvp`` are passed over.
        eps: rounding unit of the coarsest number format.
        generator: where random directions come from.
    """
    found: dict[tuple[type[Function], str], Finding] = {}
    seen: set[tuple[type[Function], str]] = set()
    for call in calls:
        key = call.cls, call.path
        if has_jvp(call.cls) and key not in seen:
            seen.add(key)
            finding = judge_jvp(piece_of(call), eps, generator)
            if finding is not None:
                found[key] = finding
    return list(found.values())


def judge_jvp(piece: Piece, eps: float, generator: torch.Generator) -> Finding | None:
    """What is wrong with the ``jvp`` of a Function, if anything is."""
    assert piece.cls is not None
    if not piece.live:
        return None
    file, line = defined(piece.cls.jvp)
    remedy = (
        "jvp takes one tangent for each argument of forward and returns one for each output: the derivative of the "
        "outputs times the tangents, all terms added up. Keep what it needs with ctx.save_for_forward."
    )

    def finding(message: str, error: float | None = None) -> Finding:
        assert piece.cls is not None
        name = piece.cls.__name__
        where = piece.path or name
        return Finding("forward_mode", where, message, remedy, "error", error, None, None, name, file, line)

    weights = [torch.randn(y.shape, generator=generator).to(y) for y in piece.outputs()]

    def evaluate() -> Tensor:
        return torch.cat(
            [(y.detach().double() * w.double()).flatten() for y, w in zip(piece.outputs(), weights, strict=True)]
        )

    def along(direction: Sequence[Tensor]) -> float:
        with fw.dual_level():
            duals = {id(x): fw.make_dual(x.detach(), v) for x, v in zip(piece.live, direction, strict=True)}
            tangents = [fw.unpack_dual(y).tangent for y in piece.outputs(duals)]
        return sum(
            float((t.double() * w.double()).sum()) for t, w in zip(tangents, weights, strict=True) if t is not None
        )

    try:
        slopes = forward_slopes(evaluate, along, piece.tensors, eps, generator)
    except NotImplementedError:  # that is how a Function says that it has none
        return None
    except BROKEN as error:
        return finding(f"The jvp of {piece.cls.__name__} raises {sentence(error)}.")
    wrong = [s for s in slopes if s.wrong]
    if not wrong:
        return None
    worst = max(s.error for s in wrong)
    return finding(f"The jvp of {piece.cls.__name__} {words(slopes)}.", worst if math.isfinite(worst) else None)


def forward_slopes(
    evaluate: Callable[[], Tensor],
    along: Callable[[Sequence[Tensor]], float],
    tensors: dict[str, Tensor],
    eps: float,
    generator: torch.Generator,
) -> list[Slope]:
    """Slopes along a few directions: what forward mode says beside differences.

    Args:
        evaluate: float64 [n], whose sum is the function; reads ``tensors``.
        along: the derivative of the sum along a direction, by forward mode.
        tensors: what is moved in place, and put back.

    Example:
        Along v the derivative of x'x is 2 x'v:

        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> right = forward_slopes(
        ...     lambda: x * x, lambda v: float(2 * x @ v[0]), {"x": x}, 2e-16, torch.Generator().manual_seed(0)
        ... )
        >>> any(slope.wrong for slope in right)
        False
    """
    scales = own_scales(tensors)
    names = [list(tensors)]
    if len(tensors) > 1:  # one tensor alone: its error is not drowned by the others
        names += [[name] for name in list(tensors)[:ALONE]]
    slopes = []
    for moved in names:
        probe = Probe(evaluate, [tensors[n] for n in moved], [scales[n] for n in moved], eps, generator)
        directions = [probe.random_direction()]
        if len(moved) == len(tensors):
            directions += [probe.scaling_direction(), probe.random_direction()]
        for v in directions:
            by_name = dict(zip(moved, v, strict=True))
            slope = along([by_name[n] if n in by_name else torch.zeros_like(x) for n, x in tensors.items()])
            # What a gradient would be that knows this direction only; the probe then measures as it does for gradients.
            length = sum(float(torch.sum(x * x, dtype=torch.float64)) for x in v)
            if not math.isfinite(slope):
                slopes.append(Slope(math.inf, 0.0, 0.0, 0.0))
            elif length > 0:
                slopes.append(probe.slope([(x.double() * (slope / length)).to(x) for x in v], v))
    return slopes


def words(slopes: Sequence[Slope]) -> str:
    """What slopes show, as words.

    Example:
        >>> words([Slope(0.0, 2.0, 1e-3, 1e-3)]), words([Slope(1.0, 2.0, 1e-3, 1e-3)])
        ('is zero, and should not be', 'is off by 50%')
    """
    wrong = [s for s in slopes if s.wrong]
    if any(math.isinf(s.analytic) for s in wrong):
        return "is not finite"
    if all(abs(s.analytic) <= 1e-9 * abs(s.numeric) for s in wrong):
        return "is zero, and should not be"
    if all(abs(s.analytic + s.numeric) <= s.limit + 1e-3 * abs(s.numeric) for s in wrong):
        return "has the wrong sign"
    return f"is off by {max(s.error for s in wrong):.0%}"
