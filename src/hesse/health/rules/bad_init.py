"""Initial weights that lose the signal on its way forward: it shrinks, grows, or becomes the same for every example.

Weights of variance gain^2 / fan-in keep the scale of a signal through any depth; a steady factor a layer other than
one is raised to the power of the depth (Glorot and Bengio 2010; He et al. 2015, https://arxiv.org/abs/1502.01852;
Poole et al. 2016, https://arxiv.org/abs/1606.05340, on examples that become alike).
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean, median

from hesse.finding import Finding
from hesse.health.rules.curves import FIRST, curve, growth, number, profile, weighted
from hesse.health.rules.saturation import MOST
from hesse.health.rules.vanishing import LOST, fading, shares
from hesse.health.stats import Record, Stats

__all__ = ["bad_init"]

FAR = 1e3  # between the first layer's input and the last layer's
STEADY = 0.75  # of the layers take part in it
LARGE = 5.0  # times what its siblings, and what an orthogonal weight, would give
FIFTHS = 5  # parts of the depth
DEEP = 8  # layers over which a gentle factor becomes a large one


def bad_init(stats: Stats) -> list[Finding]:
    """Initial weights whose layers multiply the signal, or wash out what tells the examples apart.

    Judged by the first samples only, comparing layers with each other: the size of their inputs from the first to
    the last, which a good start keeps and a steady factor a layer does not; how much their outputs differ between
    examples, compared with the first layer's; and the last layer's output with its input, its siblings' gain and the
    loss: a loss that the outputs' own size explains starts far above what a constant prediction would reach.
    """
    if not stats.records or len(stats.records) > FIRST:
        return []
    record = stats.records[0]
    paths = weighted(stats, record)
    return (
        _scale(stats, record, paths)
        or _stream(stats, record, paths)
        or _alike(stats, record, paths)
        or _outputs(stats, record, paths)
    )


def _scale(stats: Stats, record: Record, paths: list[str]) -> list[Finding]:
    sizes = profile(record, "in_rms", paths)
    if len(sizes) < 4:
        return []
    change = growth(list(sizes.values()))
    if change is None or 1 / FAR < change[0] < FAR or change[1] < STEADY:
        return []
    factor = change[0] ** (1 / (len(sizes) - 1))
    first, last = next(iter(sizes)), list(sizes)[-1]
    verb = "shrinks" if factor < 1 else "grows"
    return [
        _finding(
            stats,
            first,
            f"From {first} to {last} the signal {verb} by a factor of {factor:.2g} a layer, {change[0]:.1e} in all.",
            "Scale the initial weights to what the activation preserves: torch.nn.init.kaiming_normal_ for ReLU, "
            "xavier_normal_ for tanh; or put a normalisation layer after each.",
            change[0],
            FAR,
            "in_rms",
            sizes,
        )
    ]


def _stream(stats: Stats, record: Record, paths: list[str]) -> list[Finding]:
    """A signal that grows all along the depth, however gently, until the loss is about its size.

    The first losses say whether it matters: they are about the outputs, and far from settled.
    """
    sizes = profile(record, "in_rms", paths)
    if len(sizes) < DEEP or min(sizes.values()) <= 0 or list(sizes)[-1] != paths[-1]:
        return []
    # Layers inside a block and between blocks see different scales by turns: parts of the depth are compared.
    logs = [math.log(size) for size in sizes.values()]
    bounds = [i * len(logs) // FIFTHS for i in range(FIFTHS + 1)]
    change = growth([math.exp(fmean(logs[a:b])) for a, b in pairwise(bounds)])
    whole = math.exp(logs[-1] - logs[0])
    if change is None or min(change[0], whole) < LARGE**2 or change[1] < STEADY:
        return []
    told = [loss for _, loss in stats.told] or stats.losses
    known = [abs(loss) for loss in told if math.isfinite(loss)]
    unsettled = len(known) < len(told) or max(known, default=0.0) > 2 * min(known, default=0.0)
    first, last = next(iter(sizes)), paths[-1]
    swamped = [now for now in stats.records if _swamped(now, last) and _about_size(stats, now, last, sizes[first])]
    if not unsettled or not swamped:
        return []
    return [
        _finding(
            stats,
            first,
            f"From {first} to {last} the signal grows all along the depth, by a factor of {whole:.2g} over "
            f"{len(sizes)} layers, and the outputs ({swamped[0]['layers'][last]['out_rms']:.3g}) are so large that the "
            f"loss is {swamped[0]['loss']:.3g} for their size alone.",
            "Put a normalisation layer before each branch, or start the last layer of each residual branch at zero, or "
            "scale it down by the square root of their number; without skip connections torch.nn.init."
            "kaiming_normal_ for ReLU, xavier_normal_ for tanh.",
            whole,
            LARGE**2,
            "in_rms",
            sizes,
        )
    ]


def _swamped(record: Record, head: str) -> bool:
    """Whether the outputs' size explains the loss: their square, or, of logits, about their size."""
    loss, out = record["loss"], number(record["layers"].get(head, {}), "out_rms")
    if loss is None or not math.isfinite(loss) or not out:
        return False
    return 0.5 < loss / out**2 < 2 or (out > LARGE and 0.3 < loss / out < 6)


def _about_size(stats: Stats, record: Record, head: str, usual: float) -> bool:
    """Whether outputs are far above a usual size, and shrinking them would take most of the loss away.

    Loss over slope times size is 1/2 for squares and about 1 for logits, and small where targets are as large as the
    outputs, as in a model that has been trained.
    """
    layer = record["layers"][head]
    slope, rows = number(layer, "out_grad_rms"), record.get("rows")
    if layer["out_rms"] < LARGE * usual:
        return False
    if not slope or not rows:
        return True
    shapes = [p["shape"] for p in stats.anatomy[head]["params"].values() if p["shape"] and len(p["shape"]) > 1]
    width = shapes[0][0] if shapes else 1
    return bool(abs(record["loss"]) > 0.3 * slope * rows * math.sqrt(width) * layer["out_rms"])


def _alike(stats: Stats, record: Record, paths: list[str]) -> list[Finding]:
    """Outputs that are the same for every example from one hidden layer on, though the first layer's are not.

    Silent where the gradient is lost with the signal, or units are dead or saturated: that has a name of its own.
    """
    spreads = {p: s for p, s in profile(record, "spread", paths[:-1]).items() if record["layers"][p].get("out_rms")}
    if len(spreads) < 2:
        return []
    (first, usual), *rest = spreads.items()
    gone: list[str] = []
    for path, spread in reversed(rest):
        if spread >= usual / FAR:
            break
        gone.insert(0, path)
    if not gone or fading(stats, record) or _blocked(record, gone[0]):
        return []
    where = gone[0]
    return [
        _finding(
            stats,
            where,
            f"Its outputs are the same for every example: they differ by {spreads[where]:.1e} of their size, those of "
            f"{first} by {usual:.1e}.",
            "Larger initial weights and biases at zero (torch.nn.init.kaiming_normal_ for ReLU, xavier_normal_ for "
            "tanh), skip connections, or normalisation layers.",
            spreads[where],
            usual / FAR,
            "spread",
            spreads,
        )
    ]


def _blocked(record: Record, where: str) -> bool:
    layers = record["layers"]
    saturated = any((number(layer, "saturated") or 0.0) >= MOST for layer in layers.values())
    return saturated or layers[where].get("in_rms") == 0 or any(s < LOST for s in shares(record).values())


def _outputs(stats: Stats, record: Record, paths: list[str]) -> list[Finding]:
    """Outputs so large that the loss is about them and not about the data."""
    if not paths or not _swamped(record, paths[-1]):
        return []
    gains = {
        path: out / size
        for path in paths
        if (out := number(record["layers"][path], "out_rms")) and (size := number(record["layers"][path], "in_rms"))
    }
    head = paths[-1]
    if head not in gains:
        return []
    out = record["layers"][head]["out_rms"]
    usual = median([gain for path, gain in gains.items() if path != head] or [1.0])
    whole = out / (number(record["layers"][next(iter(gains))], "in_rms") or out)
    alone = gains[head] > LARGE * max(1.0, usual)
    if not alone and not (whole > LARGE**2 and usual > 2):
        return []
    where = head if alone else max(gains, key=lambda path: gains[path])
    return [
        _finding(
            stats,
            where,
            f"It multiplies the size of its input by {gains[where]:.1f}, and the outputs ({out:.1f}) are so large that "
            f"the loss starts at {record['loss']:.3g} for their size alone.",
            "Scale its initial weights down, to a variance of one over the number of inputs (torch.nn.init."
            "xavier_normal_) or less; a last layer may start at zero.",
            gains[where],
            LARGE * max(1.0, usual) if alone else 2.0,
            "out_rms",
            gains,
        )
    ]


def _finding(
    stats: Stats, where: str, message: str, remedy: str, value: float, limit: float, key: str, sizes: dict[str, float]
) -> Finding:
    return Finding(
        "bad_init",
        where,
        message,
        remedy,
        value=value,
        limit=limit,
        step=stats.records[-1]["step"],
        evidence={**curve(stats, where, key), "profile": sizes},
    )
