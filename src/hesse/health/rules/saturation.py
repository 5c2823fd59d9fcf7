"""Units and attention at the flat end of their range: they pass a signal on and let no gradient back.

A sigmoid at 10, a tanh of raw pixel values, attention scores without the division by the root of their width
(Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.1; Glorot and Bengio 2010).
"""

from __future__ import annotations

from hesse.finding import Finding
from hesse.health.rules.curves import PATIENCE, course, curve, elasticities, in_order, number, place
from hesse.health.stats import Record, Stats

__all__ = ["MOST", "saturation"]

MOST = 0.8  # of the elements are on the flat part
SHARP = 0.1  # of the entropy of looking everywhere
FAINT = 0.1  # of the elasticity above is left below


def saturation(stats: Stats) -> list[Finding]:
    """Most of an activation is saturated in every sample of several in a row, and the layers below suffer for it.

    Saturated alone is no fault: a trained gate is decided, and the last sigmoid of a good classifier too. So what
    comes through is compared with what arrives: the elasticity |g| |w| of the layer below with that of the layers
    above, and, where it has been so since the first sample, before anything could be learnt, the gradients at their
    outputs. Where neither has suffered, a loss that does not fall counts. Attention that looks at one place counts
    when it has done so from the first sample on, or when the loss has become worse since.
    """
    recent = stats.records[-PATIENCE:]
    if len(recent) < PATIENCE:
        return []
    return _activations(stats, recent) + _attention(stats, recent)


def _activations(stats: Stats, recent: list[Record]) -> list[Finding]:
    flat = [path for path in recent[-1]["layers"] if all(_saturated(record, path) for record in recent)]
    going = course(stats) if flat else None
    found: dict[str, tuple[str, list[tuple[float, float]], bool]] = {}
    for path in (p for p in in_order(recent[-1]) if p in flat):
        passed = [ratios for record in recent if (ratios := _passed(record, path)) is not None]
        born = all(_saturated(record, path) for record in stats.records[:PATIENCE])
        faint = all(elastic < FAINT or (born and grad < FAINT) for elastic, grad in passed)
        if len(passed) == len(recent) and (faint or (going is not None and going.idle)):
            found.setdefault(place(stats, path), (path, passed, faint))
    if not found:
        return []
    where, (path, passed, faint) = next(iter(found.items()))
    share = number(recent[-1]["layers"][path], "saturated") or 0.0
    left = f"{min(passed[-1]):.1e} of the gradient is left below" if faint else "the loss is stuck"
    others = f" So it is at {_listed(list(found)[1:])}." if len(found) > 1 else ""
    return [
        Finding(
            "saturation",
            where,
            f"{share:.0%} of its activations are saturated, where their slope is less than a hundredth of the "
            f"largest, and {left}.{others}",
            "Scale its inputs (normalise the data, or a normalisation layer before it), smaller initial weights "
            "and biases at zero, or an activation that does not saturate (ReLU, GELU).",
            value=share,
            limit=MOST,
            step=recent[-1]["step"],
            evidence={**curve(stats, path, "saturated"), "passed": passed, "activation": path, "layers": list(found)},
        )
    ]


def _saturated(record: Record, path: str) -> bool:
    return (number(record["layers"].get(path, {}), "saturated") or 0.0) >= MOST


def _passed(record: Record, path: str) -> tuple[float, float] | None:
    """What the layer before an activation has, in units of the largest after it: elasticity, gradient at the output.

    None when no layer comes after.
    """
    order, elastic = in_order(record), elasticities(record)
    i = order.index(path)
    before = [p for p in order[: i + 1] if p in elastic]
    after = [p for p in order[i + 1 :] if p in elastic]
    if not before or not after or not max(elastic[p] for p in after):
        return None
    grads = {p: number(record["layers"][p], "out_grad_rms") for p in (before[-1], *after)}
    above = max((g for p in after if (g := grads[p]) is not None), default=0.0)
    below = grads[before[-1]]
    ratio = 1.0 if below is None or above == 0 else below / above
    return elastic[before[-1]] / max(elastic[p] for p in after), ratio


def _attention(stats: Stats, recent: list[Record]) -> list[Finding]:
    found: dict[str, tuple[str, bool]] = {}
    for path, layer in recent[-1]["layers"].items():
        if (now := number(layer, "entropy")) is None or now > SHARP:
            continue
        sharp = [number(record["layers"].get(path, {}), "entropy") for record in recent]
        if any(entropy is None or entropy > SHARP for entropy in sharp):
            continue
        first = number(stats.records[0]["layers"].get(path, {}), "entropy")
        born = first is not None and first < SHARP
        going = None if born else course(stats)
        if born or (going is not None and going.worse):
            found.setdefault(place(stats, path), (path, born))
    if not found:
        return []
    where, (path, born) = next(iter(found.items()))
    entropy = number(recent[-1]["layers"][path], "entropy") or 0.0
    since = "from the start" if born else "and the loss is worse than at the start"
    others = f" So it does at {_listed(list(found)[1:])}." if len(found) > 1 else ""
    return [
        Finding(
            "saturation",
            where,
            f"Its attention looks at one place only (entropy {entropy:.1e} of that of looking everywhere), {since}: "
            f"the softmax lets no gradient back to queries and keys.{others}",
            "Divide the scores by the square root of the head's width, normalise queries and keys, or scale their "
            "initial weights down.",
            value=entropy,
            limit=SHARP,
            step=recent[-1]["step"],
            evidence={**curve(stats, path, "entropy"), "attention": path, "layers": list(found)},
        )
    ]


def _listed(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
