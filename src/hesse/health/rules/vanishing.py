"""The gradient is lost on its way back through the depth of a net.

Each layer passes back the gradient times its weights and the slope of its activation. Where both together are less
than one, what arrives at the first layers falls geometrically with depth (Hochreiter 1991; Glorot and Bengio 2010,
https://proceedings.mlr.press/v9/glorot10a.html).
"""

from __future__ import annotations

import math

from hesse.finding import Finding
from hesse.health.rules.curves import PATIENCE, course, curve, elasticities, growth, weighted
from hesse.health.stats import Record, Stats

__all__ = ["LOST", "fading", "shares", "vanishing"]

LOST = 1e-5  # of the elasticity of the layers nearer to the loss: training them would take 1e5 times as long
WEAK = 1e-2  # counts only where it fades steadily and nothing is learnt
STEADY = 0.75  # of the layers take part in the fading
LOSSES = 60  # from which to see that nothing is learnt


def vanishing(stats: Stats) -> list[Finding]:
    """The gradient is lost on its way back to the first layers.

    Compared is the elasticity |g| |w|: by what the loss changes when the layer's weights change by their
    own size. It has the same unit in every layer, does not depend on how a layer's weights are scaled, and
    falls in all layers alike when a net converges. A layer is starved when its elasticity stays below 1e-5
    of that of the layers nearer to the loss, or below 1e-2 where it fades steadily from the last layer to the first
    and the loss does not fall. Excused: what is still rising (a zero-initialised head or gate opens the way in its own
    time), and gradients of exactly zero (frozen, masked or unused parts are not a loss on the way) unless the layers
    above them are starved already.

    ``where`` is the first starved layer when the gradient fades over several layers, and the layer just below the
    place when nearly all of it is lost at one place.
    """
    recent = stats.records[-PATIENCE:]
    if len(recent) < PATIENCE:
        return []
    last = shares(recent[-1])
    if not any(0 < share < WEAK for share in last.values()):
        return []
    history = [*map(shares, recent[:-1]), last]
    for limit in (LOST, WEAK):
        starved = [path for path in last if _starved([share.get(path) for share in history], limit)]
        if starved and (limit == LOST or (_idle(stats) and fading(stats, recent[-1]))):
            return [_finding(stats, last, starved, limit)]
    return []


def fading(stats: Stats, record: Record) -> bool:
    """Whether the gradient fades steadily, to less than a hundredth, from the last layer with a matrix to the first."""
    elastic = elasticities(record)
    grown = growth([elastic[path] for path in weighted(stats, record) if path in elastic])
    return grown is not None and grown[0] > 1 / WEAK and grown[1] >= STEADY


def _idle(stats: Stats) -> bool:
    going = course(stats)
    return going is not None and going.count >= LOSSES and going.idle


def _starved(history: list[float | None], limit: float) -> bool:
    known = [share for share in history if share is not None]
    if len(known) < len(history) or not all(0 < share < limit for share in known):
        return False
    return known[-1] < 10 * known[0]


def _finding(stats: Stats, now: dict[str, float], starved: list[str], limit: float) -> Finding:
    paths = list(now)
    below = paths[: paths.index(starved[0])]
    zero = [path for path in below if now[path] == 0]  # lost altogether: less than a float can hold
    starved = zero + starved
    last = starved[-1]
    where = last if _at_one_place(now, last) else starved[0]
    share, others = now[where], len(starved) - 1
    return Finding(
        "vanishing",
        where,
        f"Its gradient, relative to its weights, is {share:.1e} of that of the layers nearer to the loss"
        + (f"; {others} more layers are starved likewise, from {starved[0]} to {last}." if others else "."),
        f"Between {last} and the loss the gradient is lost: use skip connections, a normalisation "
        "layer, an activation that does not saturate (ReLU, GELU), or initial weights scaled for the "
        "activation (torch.nn.init.calculate_gain).",
        value=share,
        limit=limit,
        step=stats.records[-1]["step"],
        evidence={
            **curve(stats, where, "grad_norm"),
            "profile": now,
            "starved": starved,
            "lost_above": last,
        },
    )


def _at_one_place(now: dict[str, float], last: str) -> bool:
    """Whether nearly all of the gradient is lost between one layer and the next, with many layers to compare."""
    paths = list(now)
    lowest = min((share for share in now.values() if share > 0), default=0.0)
    if len(paths) < 4 or lowest == 0 or now[last] == 0:
        return False
    above = paths[paths.index(last) + 1 :]
    here = math.log(min(now[above[0]], 1.0) if above else 1.0) - math.log(now[last])
    return here > 0.8 * -math.log(lowest)


def shares(record: Record) -> dict[str, float]:
    """Elasticity of each layer, in units of the largest among the layers nearer to the loss."""
    elastic = elasticities(record)
    found = {}
    largest = 0.0
    for path in reversed(elastic):
        if largest and math.isfinite(elastic[path]) and math.isfinite(largest):
            found[path] = elastic[path] / largest
        largest = max(largest, elastic[path])
    return dict(reversed(found.items()))
