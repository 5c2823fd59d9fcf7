"""Units that are zero for every example, and so are never told to change.

The case that is met is the dying ReLU: one step too large, or a bias too low, and a unit is off for all data (Lu,
Shin, Su and Karniadakis 2019, https://arxiv.org/abs/1903.06733).
"""

from __future__ import annotations

from hesse.finding import Finding
from hesse.health.rules.curves import PATIENCE, before, curve, in_order, number, place
from hesse.health.stats import Stats

__all__ = ["dead_units"]

MOST = 2 / 3
FEW = 8
ALIKE = 1e-3  # of its size is all by which a layer's output differs between examples


def dead_units(stats: Stats) -> list[Finding]:
    """More than two thirds of a layer's units were zero for every example of several batches in a row.

    A dead unit gets no gradient, so it stays dead. Some always die and some rest; a layer that has lost
    most of them is poorer than it looks. Each unit is compared with its own past: only one that was silent in
    every sample of several in a row counts. Where what comes in is the same for every example, or zero, units are
    silent for another reason, and only the first of several dead layers is to blame. Of a layer with less than eight
    units all must be dead: two thirds of four are gone by chance.
    """
    if not stats.records:
        return []
    now = stats.records[-1]
    findings: dict[str, Finding] = {}
    shares = {path: dead for path, layer in now["layers"].items() if (dead := number(layer, "dead") or 0.0) > MOST}
    for path in in_order(now) if shares else ():
        if path not in shares or _starved(stats, path):
            continue
        dead = shares[path]
        if dead < 1 and (_units(stats, path) or FEW) < FEW:
            continue
        where = place(stats, path)
        findings.setdefault(
            where,
            Finding(
                "dead_units",
                where,
                f"{dead:.0%} of its units were zero in all of the last {PATIENCE} batches looked at.",
                "Lower the learning rate, start the biases before it at zero, normalise its inputs, or use "
                "LeakyReLU or GELU; units already dead come back only by new initial weights.",
                value=dead,
                limit=MOST,
                step=now["step"],
                evidence=dict(curve(stats, path, "dead")),
            ),
        )
    return list(findings.values())


def _starved(stats: Stats, path: str) -> bool:
    """Whether an activation has nothing to work on: zeros, or what hardly differs between examples."""
    now = stats.records[-1]
    layers = before(stats, now, path)
    if layers and now["layers"][layers[-1]].get("out_rms") == 0:
        return True
    spread = number(now["layers"][layers[-2]], "spread") if len(layers) > 1 else None
    return spread is not None and spread < ALIKE


def _units(stats: Stats, path: str) -> int | None:
    """How many units an activation has: the rows of the weight before it."""
    layers = before(stats, stats.records[-1], path)
    shapes = [p["shape"] for p in stats.anatomy[layers[-1]]["params"].values()] if layers else []
    return next((shape[0] for shape in shapes if shape and len(shape) > 1), None)
