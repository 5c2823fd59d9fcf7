"""What the statistics of a run mean: each rule reads them and returns findings, or none.

Absolute thresholds cry wolf: a small gradient is a fault in one net and convergence in the next. So every
rule compares a layer with its own weights, with its own past or with the other layers, all of which shrink
together when training goes well. Where nothing can be compared yet, in the first samples, no rule speaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

from hesse.finding import Finding
from hesse.health.stats import Stats

__all__ = ["PATIENCE", "RULES", "dead_units", "exploding", "non_finite", "vanishing"]

PATIENCE = 5  # samples in a row before something that passes by itself is called a fault
WINDOW = 50  # samples that are a layer's own past


def vanishing(stats: Stats) -> list[Finding]:
    """The gradient is lost on its way back to the first layers.

    Compared is the elasticity |g| |w|: by what the loss changes when the layer's weights change by their
    own size. It has the same unit in every layer, does not depend on how a layer's weights are scaled, and
    falls in all layers alike when a net converges. A layer is starved when its elasticity stays below 1e-5
    of that of the layers nearer to the loss. Excused: what is still rising (a zero-initialised head or gate
    opens the way in its own time), and gradients of exactly zero (frozen, masked or unused parts are not a
    loss on the way).
    """
    limit = 1e-5
    recent = stats.records[-PATIENCE:]
    if len(recent) < PATIENCE:
        return []
    shares = [_shares(record["layers"]) for record in recent]
    starved = [
        path
        for path in shares[-1]
        if all(0 < share.get(path, 1.0) < limit for share in shares) and shares[-1][path] < 10 * shares[0][path]
    ]
    if not starved:
        return []
    share, others = shares[-1][starved[0]], len(starved) - 1
    return [
        Finding(
            "vanishing",
            starved[0],
            f"Its gradient, relative to its weights, is {share:.1e} of that of the layers nearer to the loss"
            + (f"; {others} more layers are starved likewise." if others else "."),
            f"Between {starved[-1]} and the loss the gradient is lost: use skip connections, a normalisation "
            "layer, an activation that does not saturate (ReLU, GELU), or initial weights scaled for the "
            "activation (torch.nn.init.calculate_gain).",
            value=share,
            limit=limit,
            step=recent[-1]["step"],
        )
    ]


def exploding(stats: Stats) -> list[Finding]:
    """Steps or gradients far beyond the layer's own scale, while the loss is worse than at the start.

    Either a step was larger than the weights themselves twice in a row, or gradient or weights have grown to
    30 times the median of the layer's past while the loss has doubled. Neither is a fault while the loss is
    better than at the start: a net that has converged may jump and recover. Without a loss only a
    thousandfold growth counts.
    """
    if len(stats.records) < 2:
        return []
    *past, now = stats.records[-WINDOW:]
    start = stats.losses[0] if stats.losses else None
    factor = 1e3
    if start is not None:
        if now["loss"] is None or now["loss"] < start:
            return []
        factor = 30.0 if now["loss"] >= start + abs(start) else math.inf
    for path, layer in now["layers"].items():
        ratios = [record["layers"].get(path, {}).get("update_ratio") or 0.0 for record in (past[-1], now)]
        if start is not None and min(ratios) > 1:
            message = f"The last step was {ratios[-1]:.1f} times as large as the weights themselves."
            return [_too_far(path, message, ratios[-1], 1.0, now["step"])]
        for key, words in (("grad_norm", "gradient"), ("weight_norm", "weight vector")):
            usual = [n for record in past if (n := record["layers"].get(path, {}).get(key))]
            growth = (layer[key] or 0.0) / median(usual) if len(usual) >= 3 else 0.0
            if math.isfinite(growth) and growth > factor:
                message = f"Its {words} is {growth:.0f} times as long as it usually was."
                return [_too_far(path, message, growth, factor, now["step"])]
    return []


def dead_units(stats: Stats) -> list[Finding]:
    """More than two thirds of a layer's units were zero for every example of several batches in a row.

    A dead unit gets no gradient, so it stays dead. Some always die and some rest; a layer that has lost
    most of them is poorer than it looks.
    """
    limit = 2 / 3
    if not stats.records:
        return []
    now = stats.records[-1]
    return [
        Finding(
            "dead_units",
            path,
            f"{layer['dead']:.0%} of its units were zero in all of the last {PATIENCE} batches looked at.",
            "Lower the learning rate, start the biases before it at zero, normalise its inputs, or use "
            "LeakyReLU or GELU; units already dead come back only by new initial weights.",
            value=layer["dead"],
            limit=limit,
            step=now["step"],
        )
        for path, layer in now["layers"].items()
        if layer["dead"] is not None and layer["dead"] > limit
    ]


def non_finite(stats: Stats) -> list[Finding]:
    """NaN or infinity in the loss, in a gradient or in the weights."""
    if not stats.records:
        return []
    now = stats.records[-1]
    places: list[tuple[str, str, float]] = []
    for path, layer in now["layers"].items():
        for key, words in (("weight_norm", "norm of the weights"), ("grad_norm", "norm of the gradient")):
            value = layer[key]
            if value is not None and not math.isfinite(value):
                places.append((path, words, value))
    if now["loss"] is not None and not math.isfinite(now["loss"]):
        places.insert(0, ("loss", "loss", now["loss"]))
    if not places:
        return []
    where, words, value = places[0]
    layers = [path for path, _, _ in places if path != "loss"]
    spread = (
        f" It reached {len(set(layers))} of {len(now['layers'])} layers." if layers else " The layers are still finite."
    )
    return [
        Finding(
            "non_finite",
            where,
            f"The {words} is {value}.{spread}",
            "Look for NaN in this batch; otherwise lower the learning rate or clip gradients "
            "(torch.nn.utils.clip_grad_norm_), and run hesse.check.gradients on the batch: it names the "
            "module where NaN arises.",
            severity="error",
            value=str(value),
            limit="finite",
            step=now["step"],
        )
    ]


RULES: tuple[Callable[[Stats], list[Finding]], ...] = (non_finite, exploding, vanishing, dead_units)


def _shares(layers: dict[str, dict[str, float | None]]) -> dict[str, float]:
    """Elasticity of each layer, in units of the largest among the layers nearer to the loss."""
    elastic = {
        path: layer["grad_norm"] * layer["weight_norm"]
        for path, layer in layers.items()
        if layer["grad_norm"] is not None and layer["weight_norm"]
    }
    shares = {}
    largest = 0.0
    for path in reversed(elastic):
        if largest and math.isfinite(elastic[path]) and math.isfinite(largest):
            shares[path] = elastic[path] / largest
        largest = max(largest, elastic[path])
    return dict(reversed(shares.items()))


def _too_far(path: str, message: str, value: float, limit: float, step: int) -> Finding:
    return Finding(
        "exploding",
        path,
        f"{message} The loss is worse than at the start.",
        "Lower the learning rate or warm it up, clip gradients (torch.nn.utils.clip_grad_norm_), and scale "
        "the initial weights to the layer's inputs.",
        severity="error",
        value=value,
        limit=limit,
        step=step,
    )
