"""The gradient does not reach the early steps of a sequence, and nothing is learnt that would need them less.

Each step back multiplies by the recurrent Jacobian; where that is below one, what happened fifty steps ago cannot be
learnt (Bengio, Simard and Frasconi 1994; Hochreiter and Schmidhuber 1997).
"""

from __future__ import annotations

import math

from hesse.finding import Finding
from hesse.health.rules.curves import PATIENCE, course, number, weighted
from hesse.health.stats import Record, Stats

__all__ = ["vanishing_through_time"]

LOST = 1e-4  # of the largest gradient over time arrives at the first eighth of it
SAMPLES = PATIENCE + 1
LOSSES = 40  # from which to see that the loss does not fall
CONSTANT = 0.1  # of the output's size is all that differs between examples: a prediction that ignores the input


def vanishing_through_time(stats: Stats) -> list[Finding]:
    """A recurrent net whose gradient dies on the way to the first steps of time, and which learns nothing.

    Compared are the gradients at the first eighth of the steps with the largest over time, sample after sample. That
    alone is no fault: every freshly initialised LSTM forgets, and a task that needs the last steps only is learnt all
    the same. So it counts only while the net does not learn: the loss has not come far since the start and falls no
    longer, or falls no longer at what a constant prediction reaches (the outputs hardly differ between examples,
    compared with their own size). Zeros are left out: a truncated recurrence is cut on purpose.
    """
    recent = stats.records[-SAMPLES:]
    if len(recent) < SAMPLES:
        return []
    findings = []
    for path, times in recent[-1].get("times", {}).items():
        if (last := _early(times.get("grad"))) is None or last > LOST:
            continue
        ratios = [_early(record.get("times", {}).get(path, {}).get("grad")) for record in recent]
        known = [ratio for ratio in ratios if ratio is not None]
        # One sample may stray; a ratio that reaches the limit when it rises once more as it has is on its way.
        stray = len(known) < SAMPLES or sorted(known)[-2] > LOST
        if stray or last * last > LOST * known[0] or not _lost(stats, recent):
            continue
        grads = recent[-1]["times"][path]["grad"]
        findings.append(
            Finding(
                "vanishing_through_time",
                path,
                f"At the first steps of the sequence the gradient is {last:.1e} of what it is at the last ones, "
                "and the loss does not fall: what happened early cannot be learnt.",
                "Use an LSTM or GRU whose forget gate starts open (bias 1 to 3, or log of the length), orthogonal "
                "recurrent weights, skips or attention over time, or shorter sequences.",
                value=last,
                limit=LOST,
                step=recent[-1]["step"],
                evidence={
                    "steps": [record["step"] for record in recent],
                    "values": known,
                    "profile": grads,
                },
            )
        )
    return findings


def _early(grads: list[float] | None) -> float | None:
    """The gradient at the first eighth of the steps in units of the largest; None where it is cut or unknown."""
    grads = [grad for grad in grads or [] if math.isfinite(grad)]
    if len(grads) < 8 or max(grads) == 0:
        return None
    first = max(grads[: max(1, len(grads) // 8)])
    if first == 0 and grads[len(grads) // 2] == 0:
        return None
    return first / max(grads)


def _lost(stats: Stats, recent: list[Record]) -> bool:
    """Whether nothing is learnt: the loss stays, or has come to stay at predictions that ignore the input."""
    going = course(stats)
    if going is None or going.count < LOSSES:
        return False
    return going.idle or (going.halted and _constant(stats, recent))


def _constant(stats: Stats, recent: list[Record]) -> bool:
    """Whether the predictions ignore the input."""
    heads = weighted(stats, recent[-1])
    spreads = [number(record["layers"].get(heads[-1], {}), "spread") for record in recent] if heads else [None]
    return all(spread is not None and spread < CONSTANT for spread in spreads)
