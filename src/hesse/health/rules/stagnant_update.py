"""Updates are rounded away: weights kept in low precision do not feel small steps."""

from __future__ import annotations

from statistics import median

from hesse.finding import Finding
from hesse.health.rules.curves import PATIENCE, WINDOW
from hesse.health.rules.progress import kept, rising
from hesse.health.stats import Stats

__all__ = ["stagnant_update"]

LOW = "float16", "float8"  # the first is part of "bfloat16"


def stagnant_update(stats: Stats) -> list[Finding]:
    """Most elements of a layer had a gradient and did not change, in several samples in a row.

    A step shorter than half the distance to the next number is lost: in bfloat16 that is 1/512 to 1/256 of the
    weight, in float16 1/4096 to 1/2048. Compared is each element with itself before the step, so the learning rate,
    the optimiser and the size of weights need not be known. Layers in float32 are left to update_too_small. The rule
    waits while the learning rate rises, and is silent when gradients have shrunk to a tenth: steps of a converged net
    may round away. Remedy: weights in float32, or rounding at random (Zamirai et al., 2020).
    """
    limit = 0.5
    recent = [record for record in stats.records[-WINDOW:] if not record.get("skipped")][-PATIENCE:]
    if len(recent) < PATIENCE or recent[-1]["step"] < 20 or rising(stats) or kept(stats) < 0.1:
        return []
    found = []
    for path in recent[-1]["layers"]:
        shares = [record["layers"].get(path, {}).get("stuck") for record in recent]
        if _low(stats, path) and all(share is not None and share > limit for share in shares):
            found.append((median(share for share in shares if share is not None), path))
    if not found:
        return []
    worst, where = max(found)
    others = f" So it is in {len(found) - 1} more." if len(found) > 1 else ""
    every = [(record["step"], record["layers"].get(where, {}).get("stuck")) for record in stats.records]
    return [
        Finding(
            "stagnant_update",
            where,
            f"In the last {PATIENCE} samples {worst:.0%} of its weights had a gradient and did not change: the update "
            f"is smaller than half a unit in the last place of {_dtype(stats, where)}.{others}",
            "Keep the weights in float32 (autocast computes in low precision all the same), or use an optimiser with "
            "stochastic rounding or Kahan summation; a larger learning rate only hides it.",
            value=worst,
            limit=limit,
            step=recent[-1]["step"],
            evidence={"steps": [step for step, _ in every], "values": [value for _, value in every]},
        )
    ]


def _dtype(stats: Stats, path: str) -> str:
    params = stats.anatomy.get(path, {}).get("params", {})
    return next((str(p["dtype"]) for p in params.values() if any(low in p["dtype"] for low in LOW)), "")


def _low(stats: Stats, path: str) -> bool:
    return bool(_dtype(stats, path))
