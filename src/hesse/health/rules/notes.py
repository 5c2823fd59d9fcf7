"""What looks like a fault and is none, said to be healthy: a monitor that is silent leaves the reader to wonder.

Notes are sentences, not findings. Each names the number that a fixed threshold would have cried about.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from hesse.health.rules.curves import FIRST, course, elasticities, number, weighted
from hesse.health.stats import Stats

__all__ = [
    "NOTES",
    "convergence",
    "few_dead",
    "frozen",
    "idle_bias",
    "key_bias",
    "sparse_embeddings",
    "units_of_loss",
    "zero_head",
]

SMALL = 1e-4  # what a script with fixed thresholds calls a vanishing gradient


def convergence(stats: Stats) -> list[str]:
    """Gradients that have become small in all layers alike, with a loss that has fallen."""
    going = course(stats)
    if going is None or going.stuck or len(stats.records) <= FIRST:
        return []
    first, last = elasticities(stats.records[0]), elasticities(stats.records[-1])
    ratios = [last[path] / first[path] for path in last if first.get(path)]
    if not ratios or max(ratios) > 0.01 or not all(math.isfinite(ratio) for ratio in ratios):
        return []
    return [
        f"Gradients are {max(ratios):.1e} of what they were at the start, or less, in all layers alike, and the loss "
        f"has fallen from {going.start:.3g} to {going.now:.3g}: that is convergence, not a vanishing gradient."
    ]


def units_of_loss(stats: Stats) -> list[str]:
    """All gradients tiny (or huge) from the start, because the loss is."""
    if not stats.records or stats.records[0]["loss"] is None:
        return []
    record = stats.records[0]
    loss, elastic = abs(record["loss"]), list(elasticities(record).values())
    grads = [g for layer in record["layers"].values() if (g := number(layer, "grad_norm"))]
    if not grads or not loss or not math.isfinite(loss) or SMALL < max(grads) < 1 / SMALL:
        return []
    if not 1e-3 < max(elastic) / loss < 1e3:
        return []
    size = "small" if max(grads) < 1 else "large"
    return [
        f"All gradients are {size} (at most {max(grads):.1e}) because the loss is counted in {size} units "
        f"({record['loss']:.1e}); relative to it they are as they should be."
    ]


def zero_head(stats: Stats) -> list[str]:
    """A layer that starts at zero and lets nothing through in the first step, then opens the way."""
    if len(stats.records) < 2:
        return []
    notes = []
    for path in weighted(stats, stats.records[0]):
        start, now = (
            number(record["layers"].get(path, {}), "out_rms") for record in (stats.records[0], stats.records[-1])
        )
        if start == 0 and now:
            notes.append(
                f"{path} starts at zero, so that the layers before it get no gradient in the first step; they do since."
            )
    return notes


def sparse_embeddings(stats: Stats) -> list[str]:
    """Rows of a table that no example of the batch has looked up."""
    if not stats.records:
        return []
    notes = []
    for path, layer in stats.records[-1]["layers"].items():
        zero = number(layer, "grad_zero")
        if zero is not None and zero > 0.5 and "Embedding" in stats.anatomy.get(path, {}).get("type", ""):
            notes.append(f"{zero:.0%} of the gradient of {path} is zero: rows that the batch does not look up.")
    return notes


def key_bias(stats: Stats) -> list[str]:
    """The bias of attention's keys adds the same to all scores of a query, so softmax gives it no gradient."""
    paths = [path for path, part in stats.anatomy.items() if part["type"] == "MultiheadAttention"]
    biased = [path for path in paths if "in_proj_bias" in stats.anatomy[path].get("params", {})]
    if not biased:
        return []
    return [f"The key bias in {_some(biased)} has no gradient by structure: it shifts all scores of a query alike."]


def idle_bias(stats: Stats) -> list[str]:
    """A bias without a gradient in a layer whose weight has one: what follows cancels it."""
    if not stats.records:
        return []
    layers = stats.records[-1]["layers"]
    idle = [p for p, x in layers.items() if (names := x.get("without")) and x.get("grad_norm") and _biases(names)]
    if not idle:
        return []
    return [
        f"The bias in {_some(idle)} has no gradient although the weight has: what follows cancels a shift (a "
        "difference, a softmax, a normalisation)."
    ]


def _biases(names: list[str]) -> bool:
    return all("bias" in name for name in names)


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def frozen(stats: Stats) -> list[str]:
    """Parts whose parameters are all frozen."""
    parts = {path: list(part["params"].values()) for path, part in stats.anatomy.items() if part.get("params")}
    still = [path for path, params in parts.items() if not any(p["trainable"] for p in params)]
    if not still or len(still) == len(parts):
        return []
    return [f"{_some(still)}: frozen (requires_grad=False), so not watched."]


def few_dead(stats: Stats) -> list[str]:
    """Layers in which some units are dead, and enough are not."""
    if not stats.records:
        return []
    dead = {
        p: d for p, layer in stats.records[-1]["layers"].items() if 0.1 < (d := number(layer, "dead") or 0.0) <= 2 / 3
    }
    if not dead:
        return []
    path = max(dead, key=lambda p: dead[p])
    return [f"{dead[path]:.0%} of the units of {path} are silent, at most; the others carry on, as is usual with ReLU."]


NOTES: tuple[Callable[[Stats], list[str]], ...] = (
    convergence,
    units_of_loss,
    zero_head,
    sparse_embeddings,
    key_bias,
    idle_bias,
    frozen,
    few_dead,
)
