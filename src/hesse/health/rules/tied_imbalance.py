"""A parameter that is used twice obeys only one of its uses."""

from __future__ import annotations

import math
from statistics import median

from hesse.finding import Finding
from hesse.health.rules.curves import PATIENCE
from hesse.health.stats import Stats

__all__ = ["tied_imbalance"]


def tied_imbalance(stats: Stats) -> list[Finding]:
    """One use of a shared parameter gets a gradient that overwhelms those of the others, for long.

    Compared are the uses with one another. In a healthy tied language model both gradients are about as long, and
    with large initial weights one is ten times longer; where it stays thirty times as long, sample after sample, the
    matrix is whatever suits that use. Cause: logits or embeddings of the wrong scale, most often (an embedding damped
    on its way in, a head that multiplies it), or a use whose gradient is nearly cut off. Remedy: scale the initial
    weights or the logits, or untie (Press and Wolf, 2017).
    """
    limit = 30.0
    recent = stats.records[-2 * PATIENCE :]
    if len(recent) < 2 * PATIENCE:
        return []
    findings = []
    for param, uses in recent[-1].get("ties", {}).items():
        ratios = []
        for record in recent:
            places: dict[str, float] = {}  # calls of one module, path#2, are turns of one use
            for use, n in record.get("ties", {}).get(param, {}).items():
                if n and math.isfinite(n):
                    places[use.split("#")[0]] = max(n, places.get(use.split("#")[0], 0.0))
            norms = list(places.values())
            ratios.append(max(norms) / min(norms) if len(norms) > 1 else 1.0)
        if min(ratios) > limit:
            known = {use: n for use, n in uses.items() if n}
            strong, weak = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
            findings.append(
                Finding(
                    "tied_imbalance",
                    param,
                    f"Its use at {strong} gets a gradient {median(ratios):.0f} times as long as that at {weak}.",
                    f"Scale what goes into {strong} (divide the logits by the square root of the width, or start the "
                    "shared weights smaller, std 0.02), scale the other use up by as much, or untie the two.",
                    value=median(ratios),
                    limit=limit,
                    step=recent[-1]["step"],
                    evidence={"steps": [record["step"] for record in recent], "values": ratios},
                )
            )
    return findings
