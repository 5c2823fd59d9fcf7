"""The gradients agree on where to go, and the weights hardly go there."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean, median, stdev

from hesse.finding import Finding
from hesse.health.rules.curves import PATIENCE
from hesse.health.rules.progress import coherence, fall, kept, rising, told
from hesse.health.stats import Record, Stats

__all__ = ["update_too_small"]

LOW = "float16", "float8"  # "bfloat16" holds the first: what rounds updates away is stagnant_update


def update_too_small(stats: Stats) -> list[Finding]:
    """The weights hardly move, though the gradient keeps its direction and the loss is where it began.

    Small steps alone are no fault: a net that has converged makes them, and so does fine-tuning that works. Gradients
    of a net that has nothing to learn point everywhere and those of a converged net are small beside its loss. Here
    the loss would change noticeably if the weights changed by one per cent, they have changed by less than that since
    the start, and the loss by less than its own fiftieth; and either samples in a row agree (their mean cosine is
    above zero by far more than its scatter), or all the way gone, had it been straight downhill, could not have
    changed the loss by a thousandth. Gradients that all have the same length have been clipped to it, and say
    nothing of their own size. While the learning rate rises (warm-up) the rule waits.

    One layer alone, whose weights have not changed at all while its gradient flows and others learn, is not in the
    optimiser. And a learning rate that fell to a thousandth of its peak in the first
    half of a run that still had a way to go has been decayed too early.
    """
    return _left_out(stats) or _crawls(stats) or _decayed(stats)


def _left_out(stats: Stats) -> list[Finding]:
    """Layers with a gradient whose weights are as they were at the start."""
    records = stats.records
    if len(records) < 2 * PATIENCE:
        return []
    now = records[-1]
    still = [
        path
        for path, layer in now["layers"].items()
        if layer.get("moved") == 0
        and layer.get("lr") != 0  # frozen that way on purpose
        and all(r["layers"].get(path, {}).get("grad_norm") for r in records[-PATIENCE:])
        and not _low(stats, path)
    ]
    others = [layer["moved"] for path, layer in now["layers"].items() if layer.get("moved")]
    if not still or not others:
        return []
    more = f" So are {', '.join(still[1:4])}{' and others' if len(still) > 4 else ''}." if len(still) > 1 else ""
    moved = [record["layers"].get(still[0], {}).get("moved") for record in records]
    return [
        Finding(
            "update_too_small",
            still[0],
            f"Its gradient flows, but its weights are after {now['step']} steps as they were at the start, while the "
            f"others have moved by {median(others):.2g} of theirs.{more}",
            "Give its parameters to the optimiser (they may have been replaced or created after it was made) with a "
            "learning rate above zero, or set requires_grad_(False) if it is to stay frozen.",
            value=0.0,
            limit=median(others),
            step=now["step"],
            evidence={"steps": [record["step"] for record in records], "values": moved},
        )
    ]


def _crawls(stats: Stats) -> list[Finding]:
    """All layers together."""
    records = stats.records
    _, losses = told(stats)
    if len(records) < 2 * PATIENCE or len(losses) < 2 * PATIENCE or records[-1]["step"] < 60 or rising(stats):
        return []
    now = records[-1]
    known = [
        now["layers"][p] for p in now["layers"] if not _low(stats, p) and now["layers"][p].get("moved") is not None
    ]
    farthest = max((layer["moved"] for layer in known), default=1.0)
    down, errors = fall(losses)
    scale = abs(fmean(losses[: max(1, len(losses) // 3)]))
    if farthest > 0.01 or down > (0.005 if errors > 3 else 0.02) * scale:
        return []
    slopes = [(layer.get("grad_norm") or 0.0) * (layer.get("weight_norm") or 0.0) for layer in known]
    reach = sum(slope * layer["moved"] for slope, layer in zip(slopes, known, strict=True))
    cut = _cut(records)
    why = _why(records, reach < 1e-3 * scale and not cut)
    if why is None or (sum(slopes) < 0.01 * scale and not cut):
        return []
    usual = median([layer["update_ratio"] for layer in known if layer.get("update_ratio")] or [0.0])
    factor = 10.0 ** max(1, round(math.log10(3e-3 / usual))) if usual else 10.0
    rate = f", from {now['lr']:.2g} to about {now['lr'] * factor:.2g}" if now.get("lr") else ""
    clipped = f"Clip less: gradients are cut to the same length, {cut:.2g}, at every step. Or raise" if cut else "Raise"
    return [
        Finding(
            "update_too_small",
            "optimizer",
            f"After {now['step']} steps no layer has moved by more than {farthest:.1e} of its weights and the loss is "
            f"where it began ({losses[0]:.4g}, now {losses[-1]:.4g}), although {why}.",
            f"{clipped} the learning rate {factor:.0e} times{rate}; with Adam and a loss of tiny unit, also multiply "
            "the loss or lower eps; check that the schedule counts steps as it should.",
            value=farthest,
            limit=0.01,
            step=now["step"],
            evidence={
                "steps": [record["step"] for record in records],
                "values": [_usual(record) for record in records],
                "reach": reach,
            },
        )
    ]


def _why(records: list[Record], hopeless: bool) -> str | None:
    """How it is known that longer steps would do better."""
    cosines = [c for a, b in pairwise(records) if (c := coherence(a, b)) is not None]
    if len(cosines) >= PATIENCE and fmean(cosines) > 3 * stdev(cosines) / math.sqrt(len(cosines)):
        return f"gradients in a row agree in direction (mean cosine {fmean(cosines):.2f})"
    if hopeless and records[-1]["step"] >= 100:
        return "there is a gradient; all the way gone so far could not change the loss by a thousandth"
    return None


def _cut(records: list[Record]) -> float | None:
    """The length that all gradients have, if it is the same in each sample: what clipping to it leaves."""
    norms = [
        math.sqrt(sum((layer.get("grad_norm") or 0.0) ** 2 for layer in record["layers"].values()))
        for record in records[-2 * PATIENCE :]
    ]
    return norms[-1] if norms[-1] and max(norms) < 1.001 * min(norms) else None


def _usual(record: Record) -> float:
    """The step of the layer in the middle, in units of its weights."""
    return median([layer["update_ratio"] for layer in record["layers"].values() if layer.get("update_ratio")] or [0.0])


def _decayed(stats: Stats) -> list[Finding]:
    """The learning rate fell to nothing long ago, and gradients still agree."""
    rates = [(record["step"], record["lr"]) for record in stats.records if record.get("lr") is not None]
    peak = max((rate for _, rate in rates), default=0.0)
    first = next((i for i in range(len(rates)) if all(rate < 1e-3 * peak for _, rate in rates[i:])), len(rates))
    low = stats.records[-len(rates[first:]) :] if first < len(rates) else []
    if len(low) < 2 * PATIENCE or low[0]["step"] > 0.5 * low[-1]["step"] or kept(stats) < 0.3:
        return []
    cosines = [c for a, b in pairwise(low) if (c := coherence(a, b)) is not None]
    if len(cosines) < PATIENCE or fmean(cosines) < max(0.1, 3 * stdev(cosines) / math.sqrt(len(cosines))):
        return []
    return [
        Finding(
            "update_too_small",
            "optimizer",
            f"The learning rate fell below a thousandth of its peak of {peak:.2g} by step {low[0]['step']} and is "
            f"{rates[-1][1]:.2g} now, at step {low[-1]['step']}, while gradients in a row still agree in direction "
            f"(mean cosine {fmean(cosines):.2f}): the schedule has ended long before the training.",
            "Make the schedule as long as the training: step it once an epoch if it counts epochs, and give it the "
            "number of steps that there will be.",
            value=rates[-1][1],
            limit=1e-3 * peak,
            step=low[-1]["step"],
            evidence={"steps": [step for step, _ in rates], "values": [rate for _, rate in rates], "cosines": cosines},
        )
    ]


def _low(stats: Stats, path: str) -> bool:
    """Whether the layer's weights are kept in low precision."""
    params = stats.anatomy.get(path, {}).get("params", {})
    return any(name in param["dtype"] for param in params.values() for name in LOW)
