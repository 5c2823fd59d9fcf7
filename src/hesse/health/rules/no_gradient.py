"""Parameters that are meant to be trained and are not: unused, cut off, or forgotten in the optimizer.

Three faults look alike from outside, since the loss may still fall by what the other layers learn: the module is
never called; it is called, and a ``detach()``, ``.data``, ``no_grad`` or an integer cuts the way back; or the gradient
arrives and no optimizer holds the parameter.
"""

from __future__ import annotations

import math
from statistics import median

from hesse.finding import Finding
from hesse.health.rules.curves import PATIENCE, curve, in_order, number
from hesse.health.stats import Record, Stats

__all__ = ["no_gradient"]

FAINT = 1e-4  # of the usual gradient
UNCALLED = PATIENCE + 2  # samples after which a module that is never called may still be a task whose turn will come


def no_gradient(stats: Stats) -> list[Finding]:
    """Trainable parameters without a gradient, or with one and without a step, while the rest trains.

    Compared is a layer with the others in the same samples, from the first sample on: no gradient at all, or exactly
    zero, in each of at least six, and of four times as many where others take turns (experts, tasks). A layer whose
    optimizer has not stepped in a sample (the other half of a GAN) is not judged by it. A bias alone may have none by
    structure: that of attention's keys, or of a critic whose scores are compared. Left to other rules: layers below
    dead units, and zeros at the end of a vanishing gradient.

    Layers in a row with the same fault are one finding: at the last of them, above which the gradient was cut, or at
    the module that holds them all when it is unused or forgotten.
    """
    records = stats.records
    if len(records) <= PATIENCE or not stats.anatomy or not any(map(_suspicious, records[-1]["layers"].values())):
        return []
    groups: list[tuple[str, list[str]]] = []
    for path in in_order(records[-1]):
        layer = records[-1]["layers"][path]
        if layer.get("weight_norm") is None:
            continue  # an activation, or a layer whose parameters are counted where they are shared
        cause = _cause(stats, path) if _suspicious(layer) else ""
        inner = stats.anatomy.get(path, {}).get("index") != 0  # what the model itself holds stands alone
        if inner and groups and groups[-1][0] == cause and stats.anatomy.get(groups[-1][1][0], {}).get("index") != 0:
            groups[-1][1].append(path)
        else:
            groups.append((cause, [path]))
    return [_finding(stats, cause, paths) for cause, paths in groups if cause]


def _suspicious(layer: dict[str, object]) -> bool:
    """Whether the last sample alone leaves it open that a layer does not train."""
    return layer.get("weight_norm") is not None and bool(
        layer.get("without") or not layer.get("grad_norm") or not layer.get("update_ratio")
    )


def _cause(stats: Stats, path: str) -> str:
    """Why a layer does not train: "cut", "partly", "unused", "unknown" or "forgotten"; empty when it does."""
    due = _due(stats, path)
    if len(due) > PATIENCE and all(_others_train(record, path) for record in due):
        names = _without(stats, path)
        patient = len(due) > 4 * PATIENCE or not _in_turns(stats)
        if names and patient and not _explained(stats, path):
            if len(names) < len(_trainable(stats, path)):
                return "partly" if any("bias" not in name for name in names) else ""
            if any(number(record["layers"][path], "order") is not None for record in due):
                return "cut"
            heard = any("order" in layer for record in due for layer in record["layers"].values())
            if heard and len(due) <= UNCALLED:
                return ""
            return "unused" if heard else "unknown"
    return "forgotten" if _forgotten(stats, path) else ""


CAUSES = {
    "cut": (
        "It takes part in the forward pass, and nothing comes back.",
        "Look for detach(), .data, torch.no_grad(), .item(), argmax or a new tensor made from values between it and "
        "the loss; hesse.check.gradients names the line. If it is meant to stay so, freeze it: requires_grad_(False).",
    ),
    "partly": (
        "The layer's other parameters get theirs.",
        "Use them in forward, or freeze them with requires_grad_(False).",
    ),
    "unused": (
        "It is never called in the forward pass.",
        "Use it in forward, remove it, or freeze it with requires_grad_(False).",
    ),
    "unknown": (
        "It is unused, or cut off from the loss.",
        "Use it in forward, look for detach() or no_grad() after it, or freeze it with requires_grad_(False).",
    ),
    "forgotten": (
        "Its gradient arrives, and no optimizer holds it.",
        "Give its parameters to the optimizer (build the optimizer after the layer, or optimizer.add_param_group), or "
        "freeze it with requires_grad_(False).",
    ),
}


def _finding(stats: Stats, cause: str, paths: list[str]) -> Finding:
    where = paths[-1] if cause in ("cut", "partly") else _holder(stats, paths)
    last = stats.records[-1]
    names = _trainable(stats, where) if where in last["layers"] and cause != "partly" else _without(stats, paths[-1])
    more = f" {len(paths)} layers in a row, from {paths[0]} to {paths[-1]}." if len(paths) > 1 else ""
    what = {"partly": f"Its {', '.join(names)} never got a gradient", "forgotten": "Its weights have never moved"}
    because, remedy = CAUSES[cause]
    return Finding(
        "no_gradient",
        where,
        f"{what.get(cause, 'It never got a gradient')} in {last['step']} steps, while other layers train. "
        f"{because}{more}",
        remedy,
        value=0.0,
        limit="not zero",
        step=last["step"],
        evidence={**curve(stats, paths[-1], "grad_norm"), "cause": cause, "layers": paths, "parameters": names},
    )


def _holder(stats: Stats, paths: list[str]) -> str:
    """The module that holds all of these layers and no other; the first layer when there is none."""
    parts = paths[0].split(".")
    held = set(paths)
    for i in range(1, len(parts)):
        prefix = ".".join(parts[:i])
        inside = {p for p in stats.records[-1]["layers"] if p in stats.anatomy and p.startswith(prefix + ".")}
        inside = {p for p in inside if stats.anatomy[p].get("params")}
        if inside and inside <= held and held <= inside:
            return prefix
    return paths[0]


def _in_turns(stats: Stats) -> bool:
    """Whether other layers have a gradient in some samples and none in others: experts, tasks, dropped layers."""
    seen: dict[str, set[bool]] = {}
    for record in stats.records:
        for path, layer in record["layers"].items():
            if layer.get("weight_norm") is not None and number(layer, "lr") is not None:
                seen.setdefault(path, set()).add(bool(layer.get("grad_norm")))
    return any(len(states) > 1 for states in seen.values())


def _without(stats: Stats, path: str) -> list[str]:
    """Names of the parameters of a layer that had no gradient in any sample that may judge it."""
    found = set(_trainable(stats, path))
    for record in _due(stats, path):
        layer = record["layers"][path]
        missing = layer.get("without")
        if missing is None:
            missing = [] if layer.get("grad_norm") else _trainable(stats, path)
        found &= set(missing)
    return sorted(found)


def _forgotten(stats: Stats, path: str) -> bool:
    """Whether a layer with a gradient is in no optimizer and has never moved."""
    records = stats.records
    layers = [record["layers"].get(path, {}) for record in records]
    if any(number(layer, "update_ratio") or number(layer, "lr") is not None for layer in layers):
        return False
    if number(layers[-1], "moved") or not all(number(layer, "grad_norm") for layer in layers):
        return False
    rest = [record["layers"][p] for record in records[-1:] for p in record["layers"] if p != path]
    moving = [layer for layer in rest if number(layer, "update_ratio")]
    usual = median([number(layer, "grad_norm") or 0.0 for layer in moving]) if moving else math.inf
    return (number(layers[-1], "grad_norm") or 0.0) > FAINT * usual  # else its step may be too small for a float


def _trainable(stats: Stats, path: str) -> list[str]:
    return [name for name, p in stats.anatomy[path]["params"].items() if p["trainable"]]


def _due(stats: Stats, path: str) -> list[Record]:
    """The samples that may judge the layer: those in which its optimizer has stepped, or all if none is known."""
    records = [record for record in stats.records if path in record["layers"]]
    held = [record for record in records if number(record["layers"][path], "lr") is not None]
    return held or records


def _others_train(record: Record, path: str) -> bool:
    return any(number(layer, "grad_norm") for p, layer in record["layers"].items() if p != path)


def _explained(stats: Stats, path: str) -> bool:
    """Whether zeros (not missing gradients) have a cause of their own: dead or saturated units, a fading gradient."""
    if stats.records[-1]["layers"][path].get("grad_norm") is None:
        return False
    now = stats.records[-1]["layers"]
    blocked = any((number(x, "dead") or 0.0) > 0.9 or (number(x, "saturated") or 0.0) > 0.9 for x in now.values())
    grads = [g for x in now.values() if (g := number(x, "grad_norm"))]
    return blocked or now[path].get("weight_norm") == 0 or max(grads) > 1e5 * min(grads)
