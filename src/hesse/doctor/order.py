"""Findings in the order in which a person should mend them.

A wrong derivative comes first, because no other number can be trusted beside it; then numbers that are no numbers,
layers that get no gradient, gradients that arrive too small or too large, and last how the steps go. Where one finding
explains another it stands above it: a layer behind a saturated activation has a vanishing gradient, a learning rate
that is too large makes the loss jump. What explains what is one table here. A row of it holds only when the reason came
first (hence no chain of reasons is a circle) and, for what happens to gradients on their way back, lies nearer to the
loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hesse.finding import Finding

__all__ = ["Entry", "arrange"]

# Kinds of what is wrong with the course of a training rather than with one layer.
DYNAMICS = ("loss_spike", "learning_rate_too_large", "update_too_small", "curvature", "plateau")
# In the order in which they are told, after what the checks of derivatives found.
GRAVITY = (
    "non_finite",
    "no_gradient",
    "underflow",
    "stagnant_update",
    "bad_init",
    "symmetry",
    "saturation",
    "dead_units",
    "exploding",
    "vanishing",
    "vanishing_through_time",
    "starved_branch",
    "tied_imbalance",
    *DYNAMICS,
)
FLOW = ("no_gradient", "vanishing", "vanishing_through_time", "starved_branch", "tied_imbalance")
# What may follow from what. Of two findings made at the same step the one whose row is higher is the reason.
BRINGS: Mapping[str, tuple[str, ...]] = {
    "derivative": (*FLOW, "dead_units", "exploding", "non_finite", *DYNAMICS),
    "bad_init": (*FLOW, "exploding", "non_finite", "saturation", "dead_units", *DYNAMICS),
    "underflow": (*FLOW, "underflow", "stagnant_update", "update_too_small", "plateau"),
    "symmetry": ("plateau",),
    "exploding": ("exploding", "non_finite", "saturation", "dead_units", *DYNAMICS),
    "learning_rate_too_large": ("exploding", "non_finite", "saturation", "dead_units", *DYNAMICS),
    "curvature": ("exploding", "non_finite", "saturation", "dead_units", *DYNAMICS),
    "loss_spike": ("non_finite", "dead_units"),
    "non_finite": (*FLOW, "non_finite", "dead_units", "saturation", "stagnant_update", *DYNAMICS),
    "saturation": (*FLOW, "plateau"),
    "dead_units": (*FLOW, "plateau"),
    "no_gradient": (*FLOW, "update_too_small", "plateau"),
    "vanishing": (*FLOW, "update_too_small", "plateau"),
    "vanishing_through_time": ("starved_branch", "plateau"),
    "stagnant_update": ("stagnant_update", "update_too_small", "plateau"),
    "update_too_small": ("plateau",),
}
# These act on gradients that pass through a place, hence on what lies before it.
GATES = ("derivative", "saturation", "dead_units", "no_gradient", "vanishing")


@dataclass(frozen=True, slots=True)
class Entry:
    """A finding, and those that may only be its consequences."""

    finding: Finding
    consequences: tuple[Finding, ...] = ()


def arrange(checked: Iterable[Finding], watched: Iterable[Finding], modules: Sequence[str] = ()) -> list[Entry]:
    """Findings in order of gravity, consequences under what explains them; what is no fault comes last.

    Args:
        checked: what the checks of derivatives found, best guess first.
        watched: what was found during training and about curvature.
        modules: paths of the model's modules in the order of a forward pass.

    Example:
        >>> small = Finding("vanishing", "0", "The gradient is a millionth of that of 4.", step=5)
        >>> flat = Finding("saturation", "3", "All of its activations are saturated.", step=5)
        >>> (entry,) = arrange([], [small, flat], ["0", "1", "2", "3", "4"])
        >>> entry.finding.kind, [finding.kind for finding in entry.consequences]
        ('saturation', ['vanishing'])
    """
    place = {path: i for i, path in enumerate(modules)}
    checked = list(checked)
    derivatives = [finding for finding in checked if finding.severity != "info"]
    ordered = sorted((f for f in watched if f.severity != "info"), key=lambda f: (_gravity(f), f.step or 0))
    notes = [finding for finding in (*checked, *watched) if finding.severity == "info"]
    causes = [("derivative", finding) for finding in derivatives] + [(f.kind, f) for f in ordered]
    above: dict[int, Finding] = {}
    for effect in (*ordered, *notes):
        found = [cause for kind, cause in causes if cause is not effect and _explains(kind, cause, effect, place)]
        if found:
            above[id(effect)] = found[0]
    below: dict[int, list[Finding]] = {}
    for effect in (*ordered, *notes):
        root = effect
        while id(root) in above:
            root = above[id(root)]
        if root is not effect:
            below.setdefault(id(root), []).append(effect)
    tops = [f for f in (*derivatives, *ordered) if id(f) not in above]
    return [Entry(f, tuple(below.get(id(f), ()))) for f in (*tops, *(n for n in notes if id(n) not in above))]


def _gravity(finding: Finding) -> int:
    return GRAVITY.index(finding.kind) if finding.kind in GRAVITY else len(GRAVITY)


def _when(kind: str, finding: Finding) -> tuple[int, int]:
    """The order of reasons: by step, and at the same step by the row of the table."""
    return (-1 if kind == "derivative" else finding.step or 0, [*BRINGS, kind].index(kind))


def _explains(kind: str, cause: Finding, effect: Finding, place: Mapping[str, int]) -> bool:
    """Whether the table has it, the cause came first, and a gradient goes from the one to the other."""
    if effect.kind not in BRINGS.get(kind, ()) or _when(kind, cause) >= _when(effect.kind, effect):
        return False
    if kind not in GATES or effect.kind in (*DYNAMICS, "non_finite"):
        return True
    here, there = _position(cause.where, place), _position(effect.where, place)
    inside = effect.where == cause.where or effect.where.startswith(f"{cause.where}.")
    return here is None or there is None or inside or there <= here


def _position(where: str, place: Mapping[str, int]) -> int | None:
    """The place of the module that ``where`` names or lies in; None for the model as a whole."""
    path = where
    while path:
        if path in place:
            return place[path]
        path = path.rpartition(".")[0]
    return None
