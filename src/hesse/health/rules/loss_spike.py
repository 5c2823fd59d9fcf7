"""The loss jumps: was it one batch, or have the weights been thrown?"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise
from statistics import median
from typing import Any

from hesse.finding import Finding
from hesse.health.rules.curves import WINDOW
from hesse.health.rules.progress import noise, told
from hesse.health.stats import Stats

__all__ = ["loss_spike"]

AFTER = 3  # losses to wait for, to know whether it comes back
ENORMOUS = 30  # times anything seen before: there may be no losses after it to wait for
LONG = 10  # and where the jump leaves the loss below twice what it was at the start


def loss_spike(stats: Stats) -> list[Finding]:
    """A loss far above its recent level.

    Compared is the height above the median of the losses before with their scatter, plain and in the logarithm,
    with the highest of them and with what the training had gained; all of it, because a loss of small batches has
    heavy tails, a falling loss a high past, and a loss near zero jumps by factors that do not matter. Cause: one odd
    batch (the loss is back at once) or weights that were thrown off (it stays high). Remedy: look at that batch and
    clip gradients, or lower the learning rate. What comes back at once and stays below twice the loss at the
    start is a hard example, and no finding; what is beyond all measure is told without waiting.
    """
    steps, losses = told(stats)
    judged = stats.records[-2]["step"] if len(stats.records) > 1 else 0  # steps up to here have been looked at
    start = median(losses[:3]) if losses else 0.0
    begin = max(8, bisect_right(steps, judged) - LONG)
    highest = max(map(abs, losses[:begin]), default=0.0)
    for at in range(begin, len(losses)):
        high = losses[at] > start + abs(start)
        beyond, highest = losses[at] > ENORMOUS * highest, max(highest, abs(losses[at]))
        last = at + (0 if beyond else AFTER if high else LONG)
        if last >= len(losses) or steps[last] <= judged or not _stands_out(losses, at, start):
            continue
        level = median(losses[max(0, at - WINDOW) : at])
        height = losses[at] - level
        after = None if beyond else median(losses[at + 1 : last + 1])
        returned = after is not None and after - level < 0.3 * height
        if high or not returned:
            return [_spike(stats, steps, losses, at, level, after)]
    return []


def _stands_out(losses: list[float], at: int, start: float) -> bool:
    """Whether a loss is far beyond what those before it are like."""
    before = losses[max(0, at - WINDOW) : at]
    if losses[at] <= max(before):
        return False
    level = median(before)
    if at > 20 and level > max(losses[:3]):  # a training that is lost already has nothing to spike from
        return False
    doubt = 1 + 8 / len(before)  # about the scatter, of few losses
    if min(before) > 0 and math.log(losses[at] / level) < 5 * doubt * noise([math.log(loss) for loss in before]):
        return False
    gained = max(start - level, 0.0)
    return losses[at] - level > max(8 * doubt * noise(before), 3 * (max(before) - level), 0.1 * gained) > 0


def _spike(stats: Stats, steps: list[int], losses: list[float], at: int, level: float, after: float | None) -> Finding:
    """``after`` is the loss that followed, None if that has not been waited for."""
    returned = None if after is None else after - level < 0.3 * (losses[at] - level)
    gradient = _unusual(stats, steps[at])
    message = f"The loss rose from {level:.4g} to {losses[at]:.4g} at step {steps[at]}"
    smooth = noise([b - a for a, b in pairwise(losses[max(0, at - 10) : at])]) < 0.005 * abs(level)
    if returned and smooth:
        message += " and came back. The losses before hardly differ, so it was not the batch but the step, too long for"
        message += " the curvature there: the edge of stability."
        remedy = "Halve the learning rate, or clip gradients (torch.nn.utils.clip_grad_norm_)."
    elif returned:
        message += " and was back at the next steps: that one batch is odd, the weights are not."
        remedy = (
            "Look at the data of that step (labels, scale, padding, corrupt files); clip gradients "
            '(torch.nn.utils.clip_grad_norm_) so that one batch cannot throw the weights, or hesse.watch(guard="skip").'
        )
    elif after is None:
        message += ", beyond anything before: by that batch, or by the step before it."
        remedy = (
            "Stop, unless it comes back at once, and go back to the last checkpoint; look at the data of that step "
            "(labels, scale, corrupt files), clip gradients (torch.nn.utils.clip_grad_norm_) or lower the learning "
            "rate."
        )
    else:
        message += f" and stayed at {after:.4g}: the weights have been thrown off."
        remedy = (
            "Go back to a checkpoint from before that step; clip gradients (torch.nn.utils.clip_grad_norm_) or lower "
            "the learning rate, and look at the data of that step and the one before it."
        )
    if gradient is not None:
        message += f" The gradient of {gradient[0]} was {gradient[1]:.0f} times its usual length."
    window = slice(max(0, at - 20), at + 20)
    evidence: dict[str, Any] = {"steps": steps[window], "values": losses[window], "returned": returned}
    if gradient is not None:
        evidence |= {"layer": gradient[0], "growth": gradient[1]}
    return Finding(
        "loss_spike",
        "loss",
        message,
        remedy,
        severity="info" if returned and smooth else "warning",
        value=losses[at],
        limit=level,
        step=steps[at],
        evidence=evidence,
    )


def _unusual(stats: Stats, step: int) -> tuple[str, float] | None:
    """The layer whose gradient at that step was longest in units of its own past, if the step was sampled."""
    past = [record for record in stats.records if record["step"] < step][-WINDOW:]
    now = next((record for record in stats.records if record["step"] == step), None)
    if now is None:
        return None
    growth = {}
    for path, layer in now["layers"].items():
        usual = [n for record in past if (n := record["layers"].get(path, {}).get("grad_norm"))]
        if layer.get("grad_norm") and len(usual) >= 3 and math.isfinite(layer["grad_norm"]):
            growth[path] = layer["grad_norm"] / median(usual)
    worst = max(growth, key=growth.__getitem__, default=None)
    return None if worst is None or growth[worst] < 3 else (worst, growth[worst])
