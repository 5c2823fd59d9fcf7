"""Steps are longer than the loss is straight: they throw the weights instead of improving them."""

from __future__ import annotations

from statistics import median

from hesse.finding import Finding
from hesse.health.rules.progress import fall, noise, told, turn, turns
from hesse.health.stats import Record, Stats

__all__ = ["learning_rate_too_large"]


def learning_rate_too_large(stats: Stats) -> list[Finding]:
    """The loss rises, or does not come down, because of the length of the steps.

    Four signs, none of which counts without the loss:

    - the slope along the step is reversed and longer behind it (``turn`` below -1: the step was more than twice as
      long as the way to the minimum along it) while the loss rises;
    - the loss is above its start although, or because, a layer has been rewritten: its steps are a tenth of its
      weights and more, and it has moved by half of them;
    - the loss has left its level after the learning rate and the steps were raised far above what they were;
    - the loss has not come down while nearly all steps ended as far beyond the minimum along them as they began.

    Compared are steps with the layer's own weights and history, and the loss with its own past and noise. ``where``
    is the layer that is rewritten much faster than the others, else "optimizer". Remedy: a learning rate that many
    times smaller.
    """
    _, losses = told(stats)
    if len(losses) < 2 or not stats.records:
        return []
    now = stats.records[-1]
    where, ratio = _fastest(stats.records[0]), _longest(now)
    seen = turns(stats, 4)
    overshot = [value for value in seen[-2:] if value < -1]
    risen = _risen(losses)
    raised = _raised(stats)
    # A run that went well with short steps is thrown by a batch, not by its learning rate: that is a loss_spike.
    fast = now["step"] <= 20 or raised > 2 or median([_longest(record) for record in stats.records[-20:-1]]) > 0.05
    if fast and ((risen and overshot and (len(overshot) == 2 or ratio > 0.1)) or (ratio > 1 and _jumped(losses))):
        message = (
            f"The loss rises, {losses[0]:.4g} at first and {losses[-1]:.4g} now; the last step changed a layer by "
            f"{ratio:.2g} of its length"
        )
        message += f", and {overshot[-1]:.2g} of the slope along a step was left behind it." if overshot else "."
        return [_finding(stats, where, message, ratio, 0.1)]
    start = losses[0]
    worse = len(losses) > 3 and min(losses[-3:]) > start and median(losses[-3:]) - start > 0.1 * abs(start)
    moved = max((layer.get("moved") or 0.0 for layer in now["layers"].values()), default=0.0)
    if fast and worse and ratio > 0.1 and moved > 0.5:
        message = (
            f"A step changes the weights by {ratio:.2g} of their length, and the loss is {losses[-1]:.4g}, above the "
            f"{start:.4g} at the start."
        )
        return [_finding(stats, where, message, ratio, 0.1)]
    if raised > 2 and _left(losses):
        message = (
            f"The loss left its level, {median(losses[-30:-3]):.4g}, for {losses[-1]:.4g} after the learning rate "
            f"became {raised:.3g} times what it was."
        )
        return [_finding(stats, "optimizer", message, now["lr"], now["lr"] / raised)]
    seen = turns(stats, 8)
    if (
        now["step"] >= 100
        and len(seen) == 8
        and median(seen) < -0.85
        and sorted(seen)[6] < -0.5
        and fall(losses)[1] < 2
    ):
        message = (
            "The loss does not come down, and most steps end beyond the minimum along them (median turn "
            f"{median(seen):.2f})."
        )
        return [_finding(stats, where, message, median(seen), -0.85)]
    return []


def _risen(losses: list[float]) -> bool:
    """Whether the last losses are all above those before, and by more than half of the first."""
    last = min(3, len(losses) - 1)
    before = losses[-20 - last : -last]
    return min(losses[-last:]) > max(before) and losses[-1] - before[0] > 0.5 * abs(before[0])


def _jumped(losses: list[float]) -> bool:
    """Whether the last loss is far above all before."""
    return losses[-1] > max(losses[:-1]) + abs(losses[0])


def _left(losses: list[float]) -> bool:
    """Whether the last three losses are far above all of the thirty before."""
    if len(losses) < 13:
        return False
    before = losses[-33:-3]
    return min(losses[-3:]) > max(before) + 3 * noise(before)


def _ratios(record: Record) -> dict[str, float]:
    """The steps of the layers, in units of their weights."""
    return {path: layer["update_ratio"] for path, layer in record["layers"].items() if layer.get("update_ratio")}


def _longest(record: Record) -> float:
    return max(_ratios(record).values(), default=0.0)


def _fastest(record: Record) -> str:
    """The layer with the longest step in units of its weights, if it stands out, else "optimizer"."""
    ratios = _ratios(record)
    worst = max(ratios, key=ratios.__getitem__, default="")
    others = [value for path, value in ratios.items() if path != worst]
    return worst if others and ratios[worst] > 10 * max(others) else "optimizer"


def _raised(stats: Stats) -> float:
    """The learning rate now, in units of its own past."""
    *past, now = [record.get("lr") for record in stats.records]
    known = [rate for rate in past if rate]
    return now / median(known) if now and len(known) > 2 else 1.0


def _factor(stats: Stats, where: str) -> float:
    """How many times shorter the steps should be: a hundredth of the weights, not past the minimum, as once they were.

    Of the first step, before the weights were thrown.
    """
    layers = stats.records[0]["layers"]
    ratios = [
        layer["update_ratio"]
        for path, layer in layers.items()
        if layer.get("update_ratio") and where in (path, "optimizer")
    ]
    first = turns(Stats(stats.records[:2]), 1)
    return max(2.0, _raised(stats), 100 * median(ratios or [0.0]), 1 - min(first, default=1.0))


def _finding(stats: Stats, where: str, message: str, value: float, limit: float) -> Finding:
    steps, losses = told(stats)
    now = stats.records[-1]
    factor = _factor(stats, where)
    rate = f", to {now['lr'] / factor:.2g} or less," if now.get("lr") else ""
    lost = losses[-1] > 2 * abs(losses[0])
    again = "; start again from weights that are not thrown off" if lost else ""
    recent = stats.records[-20:]
    turned = {"steps": [record["step"] for record in recent], "values": [turn(record) for record in recent]}
    return Finding(
        "learning_rate_too_large",
        where,
        message,
        f"Lower the learning rate {factor:.0f} times{rate} and warm it up{again}.",
        severity="error" if lost else "warning",
        value=value,
        limit=limit,
        step=now["step"],
        evidence={"steps": steps[-50:], "values": losses[-50:], "turns": turned},
    )
