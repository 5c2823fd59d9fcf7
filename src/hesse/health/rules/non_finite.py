"""NaN or infinity in the loss, in a gradient or in the weights: where it arose, and what makes such numbers."""

from __future__ import annotations

import math
from typing import Any

from hesse.finding import Finding
from hesse.health.rules.progress import told
from hesse.health.stats import Record, Stats

__all__ = ["non_finite"]

GENERAL = "run hesse.check.gradients on the batch to see the operation"
REMEDIES = {
    "input": "Clean the data: drop or fill such rows, check divisions and logarithms in the preprocessing, and refuse "
    "batches that are not finite.",
    "weight": "Go back to the last good checkpoint; lower the learning rate or warm it up, and clip gradients "
    "(torch.nn.utils.clip_grad_norm_, error_if_nonfinite=True).",
    "forward": "Keep the argument inside the operation's domain: a small number added or clamped inside log, sqrt and "
    "division, the maximum subtracted before exp, no row masked entirely before softmax.",
    "loss": "Use the loss that takes logits (cross_entropy, binary_cross_entropy_with_logits, logsumexp), check "
    "targets for NaN and for classes out of range, and that no batch or mask is empty.",
    "backward": "The value is finite and its slope is not (sqrt or norm at zero, a division or logarithm that "
    "torch.where hides): add a small number inside, or make the argument safe before it.",
}
HALF = " In float16 everything above 65504 is infinite: use bfloat16, or leave this operation out of autocast."
PLACES = {
    "input": "The model was given numbers that are not finite",
    "weight": "A weight is not finite",
    "forward": "The forward pass makes numbers that are not finite out of finite ones",
    "loss": "The model's output is finite and the loss or its gradient is not",
    "backward": "The forward pass is finite and the backward pass makes gradients that are not",
}


def non_finite(stats: Stats) -> list[Finding]:
    """A loss, a gradient or a weight is NaN or infinite: never healthy, so nothing needs comparing.

    Told is the first record of it only, since all that follows is infected. Where it arose has been found by running
    the pass again (:mod:`hesse.health.origin`): in the data, in a weight after the optimiser's step, in an operation
    of the forward pass, in the loss, or in the slope of an operation that is finite itself. Each has its own remedy.
    Without that the loss, or the first layer, is named.
    """
    if not stats.records or not _places(stats.records[-1]):
        return []
    now = next(record for record in stats.records if _places(record))
    places = _places(now)
    where, words, value = places[0]
    layers = {path for path, _, _ in places if path != "loss"}
    reached = f"it reached {len(layers)} of {len(now['layers'])} layers." if layers else "the layers are still finite."
    origin: dict[str, Any] = now.get("origin") or {}
    stage = origin.get("stage")
    if stage not in PLACES:
        message = f"The {words} is {value}; {reached}"
        remedy = f"Look for NaN in this batch; otherwise lower the learning rate or clip gradients, and {GENERAL}."
    else:
        where = origin["where"]
        message = PLACES[stage] + (f", in {origin['operation']}" if origin.get("operation") else "")
        message += f" (rows {', '.join(map(str, origin['rows']))} of the batch)" if origin.get("rows") else ""
        message += f"; the {words} is {value}, {reached}" + (f" {origin['note']}" if origin.get("note") else "")
        remedy = REMEDIES[stage] + (HALF if now.get("autocast") == "float16" and stage != "input" else "")
    steps, losses = told(stats)
    return [
        Finding(
            "non_finite",
            where,
            message,
            remedy,
            severity="error",
            value=str(value),
            limit="finite",
            step=now["step"],
            function=origin.get("operation"),
            file=origin.get("file"),
            line=origin.get("line"),
            evidence={"steps": steps[-50:], "values": losses[-50:], "stage": stage, "layers": sorted(layers)},
        )
    ]


def _places(record: Record) -> list[tuple[str, str, float]]:
    """What is not finite: the loss, and layers with the norm that shows it, weights before gradients."""
    places = []
    if record["loss"] is not None and not math.isfinite(record["loss"]):
        places.append(("loss", "loss", record["loss"]))
    for key, words in (("weight_norm", "norm of the weights"), ("grad_norm", "norm of the gradient")):
        for path, layer in record["layers"].items():
            value = layer.get(key)
            if value is not None and not math.isfinite(value):
                places.append((path, words, value))
    return places
