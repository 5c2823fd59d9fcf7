"""Gradients fall below the smallest number of their precision, and become zero or lose their digits."""

from __future__ import annotations

from statistics import median
from typing import Any

from hesse.finding import Finding
from hesse.health.rules.curves import PATIENCE
from hesse.health.stats import Record, Stats

__all__ = ["underflow"]


def underflow(stats: Stats) -> list[Finding]:
    """Most of a layer's gradient that is not zero lies below the smallest normal number, several samples in a row.

    Zeros alone say nothing: silent ReLUs, unused rows of an embedding and black pixels make as many. But where
    numbers run out, the zeros have neighbours that are nearly gone: compared is, within one layer, the share of
    subnormal elements with that of all that are not zero. A scaled loss (``GradScaler``) leaves none there. When
    float16 computes the gradients and every element of every layer is exactly zero while there is a loss, all of
    them are gone. Remedy: scale the loss, or compute in bfloat16, whose range is that of float32 (Micikevicius et
    al., 2018).
    """
    limit = 0.5
    recent = stats.records[-PATIENCE:]
    if len(recent) < PATIENCE:
        return []
    gone = all(_gone(record) for record in recent)
    shares = {
        path: [share for record in recent if (share := _lost(record["layers"].get(path, {}), gone)) is not None]
        for path in recent[-1]["layers"]
    }
    found = {path: median(known) for path, known in shares.items() if len(known) == PATIENCE and min(known) > limit}
    if not found:
        return []
    where, worst = next(iter(found.items()))
    zero = recent[-1]["layers"][where].get("grad_zero") or 0.0
    lost = (
        f"{worst:.0%} of the elements of its gradient that are not zero are below"
        if not gone
        else "Its gradient is below"
    )
    return [
        Finding(
            "underflow",
            where,
            f"{lost} the smallest normal number of {_dtype(stats, where)}, and {zero:.0%} are zero; {len(found)} of "
            f"{_layers(recent[-1])} layers lose gradients so.",
            "Scale the loss (torch.amp.GradScaler), or autocast to bfloat16, whose range is that of float32; in "
            "float32 multiply the loss by a constant.",
            value=worst,
            limit=limit,
            step=recent[-1]["step"],
            evidence={
                "steps": [record["step"] for record in stats.records],
                "values": [_lost(record["layers"].get(where, {}), gone) for record in stats.records],
            },
        )
    ]


def _lost(layer: dict[str, Any], gone: bool) -> float | None:
    """Of the elements that are not zero, the share that is below the normal numbers."""
    zero, tiny = layer.get("grad_zero"), layer.get("grad_tiny")
    if zero is None or tiny is None:
        return None
    return tiny / (1 - zero) if zero < 1 else 1.0 if gone else None


def _gone(record: Record) -> bool:
    """Whether float16 left no gradient anywhere though there is a loss."""
    zeros = [layer["grad_zero"] for layer in record["layers"].values() if layer.get("grad_zero") is not None]
    half = record.get("autocast") == "float16"
    return half and bool(record["loss"]) and bool(zeros) and min(zeros) == 1


def _layers(record: Record) -> int:
    return sum(layer.get("grad_zero") is not None for layer in record["layers"].values())


def _dtype(stats: Stats, path: str) -> str:
    params = stats.anatomy.get(path, {}).get("params", {})
    return str(stats.records[-1].get("autocast") or next((p["dtype"] for p in params.values()), "its precision"))
