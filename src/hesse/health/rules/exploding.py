"""Steps, gradients or activations grow beyond the layer's own scale: through depth, through time, or in training.

The other side of vanishing: Jacobians with gains above one multiply (Pascanu, Mikolov and Bengio 2013,
https://arxiv.org/abs/1211.5063).
"""

from __future__ import annotations

import math
from statistics import median

from hesse.finding import Finding
from hesse.health.rules.curves import PATIENCE, WINDOW, curve, elasticities, growth, number, profile, weighted
from hesse.health.stats import Record, Stats

__all__ = ["exploding"]

BLOWN = 1e3  # from one end of a net, or of time, to the other
STEADY = 0.75  # of the layers, or steps of time, take part in it
LONG = 0.1  # of the weights is a step that may throw them
KEYS = (("grad_norm", "gradient"), ("weight_norm", "weight vector"), ("out_rms", "output"))


def exploding(stats: Stats) -> list[Finding]:
    """A signal or gradient that grows far beyond the layer's own scale.

    In depth: the signal grows on its way forward, or the gradient (relative to the weights, |g| |w|) on its way back,
    steadily and more than a thousandfold from one end of the net to the other; there a layer is compared with the
    others. In time: so does the gradient from the last step of a recurrence to the first. In training: gradient,
    weights or output have grown to 30 times the median of the layer's past, and stay there, while the loss has
    doubled since the start. That is no fault while the loss is better (a net that has converged may jump and
    recover), and has another name where steps of a tenth of the weights had thrown them before, or where only one
    sample shows it. Without a loss only a thousandfold growth counts.
    """
    through_time = _through_time(stats)
    if through_time or len(stats.records) < 2:
        return through_time
    return _through_depth(stats) or _in_training(stats)


def _in_training(stats: Stats) -> list[Finding]:
    """Growth that two samples in a row show: one may be a single odd batch."""
    *past, last, now = stats.records[-WINDOW:]
    start = next((record["loss"] for record in stats.records if record["loss"] is not None), None)
    factor = BLOWN
    if start is not None:
        if any(record["loss"] is None or not record["loss"] >= start + abs(start) for record in (last, now)):
            return []
        factor = 30.0
    before = past[-PATIENCE:]
    for path, layer in now["layers"].items():
        for key, words in KEYS:
            usual = [n for record in past if (n := record["layers"].get(path, {}).get(key))]
            grown = [(x.get(key) or 0.0) / median(usual or [1.0]) for x in (last["layers"].get(path, {}), layer)]
            if len(usual) < 3 or not factor < min(grown) or not math.isfinite(grown[1]):
                continue
            # A long step that follows a large gradient is no cause of it.
            if not _thrown(before if key == "grad_norm" else [*before, last]):
                return [_grown(stats, path, key, words, grown[1], factor)]
    return []


def _thrown(records: list[Record]) -> bool:
    """Whether a step had changed a layer, this or another, by more than a tenth of its weights."""
    layers = [layer for record in records for layer in record["layers"].values()]
    return any((number(layer, "update_ratio") or 0.0) > LONG for layer in layers)


def _through_depth(stats: Stats) -> list[Finding]:
    found: list[tuple[str, str, tuple[float, float], dict[str, float]]] = []
    for record in reversed(stats.records[-2:]):
        back = elasticities(record)
        ahead = profile(record, "in_rms", weighted(stats, record))
        for words, way, sizes in (("gradient, relative to its weights,", "back", back), ("signal", "forward", ahead)):
            values = list(sizes.values())
            grown = growth(values if way == "forward" else values[::-1]) if len(values) >= 4 else None
            if grown is not None and _blown(grown):
                found.append((words, way, grown, sizes))
                break
        else:
            return []
    words, way, (times, _), sizes = found[0]
    where, last = next(iter(sizes)), list(sizes)[-1]
    return [
        Finding(
            "exploding",
            where,
            f"The {words} grows on its way {way}, by a factor of {times ** (1 / (len(sizes) - 1)):.2g} a layer: "
            f"{times:.1e} in all between {where} and {last}.",
            "Scale the initial weights down to what the activation preserves (torch.nn.init.calculate_gain), add "
            "normalisation layers, and clip gradients (torch.nn.utils.clip_grad_norm_).",
            severity="error",
            value=times,
            limit=BLOWN,
            step=stats.records[-1]["step"],
            evidence={**curve(stats, where, "grad_norm"), "profile": sizes},
        )
    ]


def _through_time(stats: Stats) -> list[Finding]:
    """Two samples in a row; one is enough for what will not live to see the next."""
    if not stats.records:
        return []
    now = stats.records[-1]
    findings = []
    for path in now.get("times", {}):
        *_, back = backs = [_back(record.get("times", {}).get(path, {}).get("grad")) for record in stats.records[-2:]]
        twice = len(backs) == 2 and all(map(_blown, backs))
        if back is None or not (twice or _blown(back, 10 * BLOWN)):
            continue
        findings.append(
            Finding(
                "exploding",
                path,
                f"The gradient grows on its way back through time: at the first steps it is {back[0]:.1e} times what "
                "it is at the last.",
                "Clip gradients (torch.nn.utils.clip_grad_norm_), start the recurrent weights orthogonal "
                "(torch.nn.init.orthogonal_), or use an LSTM or GRU.",
                severity="error",
                value=back[0],
                limit=BLOWN,
                step=now["step"],
                evidence={**curve(stats, path, "grad_norm"), "profile": now["times"][path]["grad"]},
            )
        )
    return findings


def _blown(grown: tuple[float, float] | None, limit: float = BLOWN) -> bool:
    return grown is not None and grown[0] > limit and grown[1] > STEADY


def _back(grads: list[float] | None) -> tuple[float, float] | None:
    """Growth from the last step of time to the first, over the steps that a gradient reaches at all."""
    grads = [grad for grad in grads or [] if grad and math.isfinite(grad)]
    return growth(grads[::-1]) if len(grads) >= 8 else None


def _grown(stats: Stats, path: str, key: str, words: str, value: float, limit: float) -> Finding:
    now = stats.records[-1]
    worse = "" if now["loss"] is None else " The loss is worse than at the start."
    return Finding(
        "exploding",
        path,
        f"Its {words} is {value:.0f} times as long as it usually was.{worse}",
        "Clip gradients (torch.nn.utils.clip_grad_norm_), lower the learning rate or warm it up, and scale the initial "
        "weights to the layer's inputs.",
        severity="error",
        value=value,
        limit=limit,
        step=now["step"],
        evidence={**curve(stats, path, key), "profile": profile(now, key, list(now["layers"]))},
    )
