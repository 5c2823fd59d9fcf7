"""What is wrong with a wrong gradient: its kind, in a sentence, with the numbers that show it.

Each kind of fault relates the gradient as given to the true one in its own way: a multiple of it (wrong sign,
missing factor, wrong reduction), one row's share of it (missing sum), its elements in another order
(transposed), nothing of it (detached), equal to it except somewhere (some elements). The relations are tried
from the most particular to the most general, on elements measured by differences (:mod:`hesse.check.naming.elements`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hesse.check.differences import Slope
from hesse.check.naming.elements import Case, Elements, measure
from hesse.check.naming.relations import CLOSE, RELATIONS, Relation, common_ratio, different, scaled

__all__ = ["Case", "Kind", "name"]

REMEDIES = {
    "straight_through": "If it is meant as a straight-through estimator, declare it with "
    "hesse.check.straight_through; otherwise return zero here, or make the forward smooth.",
    "transposed": "Check operands and transposes in the backward: for y = x @ w it returns grad @ w.T and x.T @ grad; "
    "a permutation or a reshape is undone by its inverse.",
    "missing_sum": "In the backward, sum over every axis that the forward broadcast, summed or normalised over.",
    "wrong_sign": "Negate what the backward returns; look for a difference taken the other way round.",
    "wrong_reduction": "Let the backward divide by the same count as the forward: sum and mean differ by it.",
    "missing_factor": "Look for a factor that the forward applies and the backward forgets or applies twice, and for "
    "hooks that scale gradients.",
    "detached": "Look for detach(), .data, .item(), no_grad() or NumPy on the way, and for a backward that returns "
    "None or zeros. If the gradient stops on purpose, say so with requires_grad_(False).",
    "some_elements": "Look at how the backward treats these elements: masks, borders, slices, indices and branches.",
    "wrong_gradient": "Derive its backward again and compare term by term; look for the wrong tensor saved or changed "
    "in place, detach(), hooks and values kept from an earlier call.",
}
# When the tensors of one call show different kinds, the first of these is the most particular.
ORDER = tuple(REMEDIES)
ENDLESS = (math.inf, -math.inf)  # what JSON cannot write, as NaN


@dataclass(frozen=True)
class Kind:
    """The kind of a fault.

    Args:
        name: for instance ``"missing_factor"``.
        message: completes the sentence "The gradient of X with respect to Y ...".
        remedy: what to do about it.
        evidence: the numbers behind it, as a JSON object; ``"tensors"`` names those that are wrong.
    """

    name: str
    message: str
    remedy: str
    evidence: dict[str, Any] = field(default_factory=dict)


def name(case: Case, slopes: Sequence[Slope], generator: torch.Generator) -> Kind:
    """The kind of fault of a vector-Jacobian product that is known to be wrong.

    Args:
        case: the product and the function it belongs to; its tensors are moved, and put back bit for bit.
        slopes: along which it was found to be wrong; used where single elements are too blunt.
        generator: where random elements and directions come from.

    Example:
        The gradient of x * x is not x:

        >>> x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
        >>> case = Case({"x": x}, {"x": x.clone()}, lambda: x * x, 2.2e-16)
        >>> kind = name(case, [], torch.Generator())
        >>> kind.name, kind.message
        ('missing_factor', 'is 0.5 times what it should be')
    """
    case = replace(case, tensors={name: t for name, t in case.tensors.items() if t.numel()})
    measured = measure(case, generator)
    found = {e.name: _relation(case, e, measured) for e in measured if _differs(e)}
    best = min(found.values(), key=lambda relation: ORDER.index(relation.kind), default=_of_slopes(case, slopes))
    numbers = {key: None if value != value or value in ENDLESS else value for key, value in best.evidence.items()}
    return Kind(best.kind, best.message, REMEDIES[best.kind], {"tensors": list(found), **numbers})


def _differs(e: Elements) -> bool:
    return bool(e.wrong.any()) or any(s.wrong for s in e.blocks)


def _relation(case: Case, e: Elements, measured: Sequence[Elements]) -> Relation:
    """The first that holds for the gradient of one tensor."""
    for relation in RELATIONS:
        found = relation(case, e, measured)
        if found is not None:
            return found
    return different(e)


def _of_slopes(case: Case, slopes: Sequence[Slope]) -> Relation:
    """What can be said where no single element is seen to be wrong."""
    told = [s for s in slopes if s.wrong or s.noise < 0.1]
    if told and all(abs(s.analytic) <= 1e-6 * abs(s.numeric) for s in told):
        return Relation("detached", "is zero although the function depends on it: the path is detached", {})
    ratio = common_ratio(told)
    found = scaled(case, ratio[0], max(2 * CLOSE, ratio[1])) if ratio else None
    if found is not None:
        return found
    error = max((s.error for s in told), default=math.nan)
    if math.isnan(error):
        return Relation("wrong_gradient", "differs from differences of the function", {})
    return Relation("wrong_gradient", f"is off by {error:.0%}, differently in each direction", {"error": error})
