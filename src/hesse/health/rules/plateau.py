"""The loss has stopped falling and the gradients are well: what is left cannot be learnt from these batches."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, median

from hesse.finding import Finding
from hesse.health.rules.curves import FIRST, PATIENCE
from hesse.health.rules.progress import coherence, fall, kept, told
from hesse.health.stats import Record, Stats

__all__ = ["plateau"]


def plateau(stats: Stats) -> list[Finding]:
    """The loss is flat while every batch still pulls, each its own way.

    Compared are gradients with those of the start (as long as they were, to a third: nothing has vanished, nothing
    has converged to zero) and with one another: successive ones have little in common, so their mean is gone
    and what is left is noise; and the weights move as in a random walk, where a slow start goes its way. The loss is
    still more than 60 % of what it was at the start: a training that has come down and ended is no plateau. Causes:
    labels that are wrong or shuffled against their inputs, inputs that do not tell, or a loss that has reached what
    is possible. It is no gradient fault, so it is told as information.
    """
    records = stats.records
    steps, losses = told(stats)
    if len(records) < FIRST + PATIENCE or records[-1]["step"] < 150:
        return []
    half = records[len(records) // 2 :]
    late = [loss for step, loss in zip(steps, losses, strict=True) if step >= half[0]["step"]]
    if len(late) < 2 * PATIENCE or fall(late)[1] > 2 or kept(stats) < 1 / 3:
        return []
    if median(losses[:3]) - median(late) > 0.4 * abs(median(losses[:3])):
        return []
    cosines = [c for a, b in pairwise(records[FIRST:]) if (c := coherence(a, b)) is not None]
    if len(cosines) < PATIENCE or fmean(cosines) > 0.2 or not _wanders(records):
        return []
    return [
        Finding(
            "plateau",
            "loss",
            f"The loss has stayed at {median(late):.4g} since step {half[0]['step']} (it began at {losses[0]:.4g}), "
            "while layers get gradients as long as at the start that point elsewhere in each batch (mean cosine "
            f"{fmean(cosines):.2f}). Gradients are healthy; what is left looks like noise to this model.",
            "Check that labels belong to their inputs (shuffling, joins, an offset of one row), look for wrong labels, "
            "and compare with a constant prediction; if the loss is as good as can be, stop here.",
            severity="info",
            value=median(late),
            limit=losses[0],
            step=records[-1]["step"],
            evidence={"steps": steps, "values": losses, "cosines": cosines},
        )
    ]


def _wanders(records: list[Record]) -> bool:
    """Whether weights move, but get no farther: twice the steps lead a random walk 1.4 times as far, a path twice."""
    middle = min(records, key=lambda record: abs(record["step"] - records[-1]["step"] / 2))["layers"]
    now = {path: layer["moved"] for path, layer in records[-1]["layers"].items() if layer.get("moved")}
    if not now or max(now.values()) < 0.01:
        return False
    return median([d / (middle.get(path, {}).get("moved") or d) for path, d in now.items()]) < 1.5
