"""Sharpness at the edge of stability: every step ends as far beyond the minimum along it as it began before."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from hesse.finding import Finding
from hesse.health.rules.progress import fall, told, turn, turns
from hesse.health.stats import Stats

__all__ = ["curvature"]

STEPS = 6  # turns in a row that must be near the edge


def curvature(stats: Stats) -> list[Finding]:
    """The slope is reversed along step after step while the loss, on average, still falls.

    For the step s of gradients g, ``turn`` = g(x + s)'s / g(x)'s = 1 + s'Hs / g's is -1 where the learning rate times
    the curvature along the step is 2: the edge of stability, to which training of whole batches drives the sharpness
    by itself (Cohen et al., 2021). No constant of the model enters. There, a larger learning rate makes the loss
    jump; it is information while the loss still falls nearly every step, and a warning when it goes up and down or
    has begun to rise. With small batches noise keeps the turn nearer to zero.
    """
    seen = turns(stats, STEPS)
    _, losses = told(stats)
    near = [value for value in seen if -1.6 < value < -0.75]
    if len(seen) < STEPS or len(near) < STEPS - 1 or median(seen) > -0.85 or len(losses) < 2 * STEPS:
        return []
    last = losses[-20:]
    ups = sum(b > a for a, b in pairwise(last)) / (len(last) - 1)
    down, _ = fall(losses)
    now = stats.records[-1]
    rate = f" (now {now['lr']:.2g})" if now.get("lr") else ""
    return [
        Finding(
            "curvature",
            "optimizer",
            f"The slope along the step is reversed behind it, at {len(near)} of the last {STEPS} seen (median turn "
            f"{median(seen):.2f}; -1 is the edge of stability), and the loss rose in {ups:.0%} of the last steps.",
            f"The learning rate{rate} is as large as this sharpness bears: halve it, or add warm-up, weight averaging "
            "or sharpness-aware training; leave it if the loss keeps falling on average.",
            severity="info" if down > 0 and ups < 0.25 else "warning",
            value=median(seen),
            limit=-1.0,
            step=now["step"],
            evidence={"steps": [r["step"] for r in stats.records], "values": [turn(r) for r in stats.records]},
        )
    ]
