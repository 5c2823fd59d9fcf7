"""From what was read of a step to its record, and how many records and losses are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hesse.health.norms import Meter
from hesse.health.origin import Origin
from hesse.health.sensors import Reading, Sensor
from hesse.health.stats import Record, Stats

__all__ = ["Made", "mean", "moved", "number", "record", "refused", "thinned", "unusual"]

KEPT = 300  # records; older ones are thinned, so that a long run's memory and checkpoint stay small
TOLD = 1000  # losses, likewise
ALWAYS = ("grad_norm", "weight_norm", "update_ratio", "dead")  # keys that every layer and activation has
RECENT = 20  # losses that a new one is held against
FAR = 10  # times the distance that is usual among them


@dataclass(slots=True)
class Made:
    """What is known of a step that was made, beside what the meter holds.

    Attributes:
        rates: learning rate of each parameter that an optimiser stepped, by its id.
        skipped: whether the guard left it out.
        late: whether gradients were read only after the step, when they may have been zeroed.
    """

    sampled: bool = False
    skipped: bool = False
    late: bool = False
    readings: list[tuple[Sensor, Reading]] = field(default_factory=list)
    rates: dict[int, Any] = field(default_factory=dict)
    rows: int | None = None
    autocast: torch.dtype | None = None
    origin: Origin | None = None


def record(step: int, made: Made, meter: Meter, more: Sequence[Tensor] = ()) -> tuple[Record, list[Any]]:
    """The record of a step, its loss still to be filled in, and the values of ``more``, by one transfer."""
    cells = [
        (sensor.section, path, key, value)
        for sensor, reading in made.readings
        for path, part in reading.items()
        for key, value in part.items()
    ]
    half = {path for _, path, key, value in cells if key == "dtype" and value == "torch.float16"}
    tensors = [value for _, _, _, value in cells if isinstance(value, Tensor)]
    layers, whole, values = meter.read([*tensors, *more], half)
    read = iter(values)
    rates = [float(rate) for rate in made.rates.values() if rate is not None]
    new: Record = {
        "step": step,
        "loss": None,
        "lr": rates[0] if rates else None,
        "rows": made.rows,
        "autocast": None if made.autocast is None else str(made.autocast).removeprefix("torch."),
        "skipped": made.skipped,
        "origin": None if made.origin is None else made.origin.to_dict(),
        **whole,
        "layers": layers,
        "branches": {},
        "times": {},
        "ties": {},
    }
    for layer in meter.layers:
        rate = next((r for p in layer.params if (r := made.rates.get(id(p))) is not None), None)
        if made.late:
            layers[layer.path]["without"] = None
        layers[layer.path] |= {"lr": None if rate is None else float(rate), "dead": None}
    for section, path, key, value in cells:
        part = new[section].setdefault(path, dict.fromkeys(ALWAYS) if section == "layers" else {})
        part[key] = next(read) if isinstance(value, Tensor) else value
    return new, list(read)


def moved(record: Record) -> bool:
    """Whether the step changed any weight."""
    return any(layer.get("update_ratio") for layer in record["layers"].values())


def refused(record: Record) -> bool:
    """Whether this was no step: the loss is fine, gradients are not, and no weight changed. So does a GradScaler."""
    grads = [g for layer in record["layers"].values() if (g := layer.get("grad_norm")) is not None]
    known = any(layer.get("update_ratio") is not None for layer in record["layers"].values())
    fine = record["loss"] is None or math.isfinite(record["loss"])
    return known and fine and not moved(record) and not all(map(math.isfinite, grads))


def number(loss: Tensor | float) -> Tensor | float:
    """A number at once where that costs nothing; a tensor on another device waits for the next sample."""
    if isinstance(loss, Tensor):
        return float(loss.item()) if loss.device.type == "cpu" else loss.detach().clone().reshape(())
    return float(loss)


def mean(losses: Sequence[Tensor | float]) -> Tensor | float | None:
    """Of the batches that a step was made from.

    Example:
        >>> mean([1.0, 2.0]), mean([])
        (1.5, None)
    """
    return sum(losses[1:], losses[0]) / len(losses) if losses else None


def unusual(loss: float, told: Sequence[Sequence[float]]) -> bool:
    """Whether a loss lies above all recent ones, and much further than they lie apart.

    Example:
        >>> calm = [[i, 1 + 0.01 * (i % 5)] for i in range(20)]
        >>> unusual(1.1, calm), unusual(2.0, calm)
        (False, True)
    """
    recent = [value for _, value in told[-RECENT:]]
    if len(recent) < RECENT or loss <= max(recent):
        return False
    middle = median(recent)
    return loss - middle > FAR * median(abs(value - middle) for value in recent)


def thinned(stats: Stats) -> None:
    """Every second of the older half is dropped when there are too many."""
    if len(stats.records) > KEPT:
        stats.records[: KEPT // 2] = stats.records[: KEPT // 2 : 2]
    if len(stats.told) > TOLD:
        stats.told[: TOLD // 2] = stats.told[: TOLD // 2 : 2]
