"""Who is trained: each encoder's share of the gradient and of the curvature, and how fast its weights moved.

The share of the gradient is where the loss still pulls; that of the curvature (the trace of an encoder's block of the
Gauss-Newton matrix) is whose weights the predictions depend on. A modality that is starved has little of either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hesse.curvature import output_curvature
from hesse.multimodal import Dataset, FusedModel, Schema
from hesse.training.losses import loss_of

__all__ = ["shares", "speeds"]

BATCHES = 4  # of training rows
MOST_ROWS = 128  # of a batch
DRAWS = 8  # a batch


def shares(
    schema: Schema, model: FusedModel, data: Dataset, positions: Tensor, batch_size: int, seed: int
) -> dict[str, dict[str, float]]:
    """By modality ``gradient_share`` and ``curvature_share``, each adding up to 1 over the modalities.

    The gradient's is the norm of a batch's gradient at the encoder's weights, averaged over a few batches. The trace of
    a block of ``J' H J`` is ``E |J' r|^2`` over draws r with ``E r r' = H``, so a pass back is a draw of the traces of
    all encoders. The mean of 32 is used: Hutchinson's estimate (1990), with the draws of the curvature itself.

    Args:
        positions: of training rows in ``data``.
        batch_size: of the run; at most 128 rows of a batch are looked at.
        seed: of the rows and draws.
    """
    generator = torch.Generator().manual_seed(seed)
    order = positions[torch.randperm(len(positions), generator=generator)]
    loss_fn = loss_of(schema)
    weights = {key: list(encoder.parameters()) for key, encoder in model.encoders.items()}
    flat = [p for ps in weights.values() for p in ps if p.requires_grad]
    norms, traces = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)

    def squares(grads: Sequence[Tensor | None]) -> dict[str, float]:
        by_weight = {id(p): g for p, g in zip(flat, grads, strict=True)}
        found = {}
        for key, ps in weights.items():
            own = [by_weight.get(id(p)) for p in ps]
            found[key] = sum(float(g.double().square().sum()) for g in own if g is not None)
        return found

    for some in order.split(min(batch_size, MOST_ROWS))[:BATCHES]:
        inputs, targets = data.batch(some)
        outputs = model(**inputs)
        if not flat or not outputs.requires_grad:  # every encoder is frozen
            break
        slope = torch.autograd.grad(loss_fn(outputs, targets), flat, retain_graph=True, allow_unused=True)
        for key, square in squares(slope).items():
            norms[key] += math.sqrt(square)
        curvature = output_curvature(loss_fn, outputs.detach(), targets)
        for _ in range(DRAWS):
            r = curvature.draw(generator).to(outputs.dtype) * math.sqrt(curvature.weight)
            back = torch.autograd.grad(outputs, flat, r, retain_graph=True, allow_unused=True)
            for key, square in squares(back).items():
                traces[key] += square
    return {key: {"gradient_share": _share(norms, key), "curvature_share": _share(traces, key)} for key in weights}


def speeds(
    records: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], modalities: Sequence[str]
) -> dict[str, list[float | None]]:
    """By modality, epoch by epoch, how far a step moves its encoder's weights, relative to their norm.

    The mean over the steps of the epoch that the monitor sampled; None where it sampled none.

    Args:
        records: of the monitor.
        metrics: rows of ``metrics.jsonl``.
        modalities: their names.

    Example:
        >>> def step(n, moved):
        ...     return {"step": n, "layers": {"encoders.a.conv": {"weight_norm": 2.0, "update_ratio": moved}}}
        >>> speeds([step(1, 0.5), step(2, 0.25), step(9, 0.1)], [{"step": 4}, {"step": 8}, {"step": 12}], ["a"])
        {'a': [0.375, None, 0.1]}
    """
    found: dict[str, list[float | None]] = {key: [] for key in modalities}
    begin = 0
    for row in metrics:
        inside = [record for record in records if begin < record["step"] <= row["step"]]
        begin = row["step"]
        for key in modalities:
            moved = [speed for record in inside if (speed := _speed(record["layers"], f".encoders.{key}.")) is not None]
            found[key].append(sum(moved) / len(moved) if moved else None)
    return found


def _speed(layers: Mapping[str, Mapping[str, Any]], within: str) -> float | None:
    weights = moved = 0.0
    for path, layer in layers.items():
        norm, ratio = layer.get("weight_norm"), layer.get("update_ratio")
        if within in f".{path}" and norm is not None and ratio is not None:
            weights += norm**2
            moved += (norm * ratio) ** 2
    return math.sqrt(moved / weights) if weights > 0 and math.isfinite(moved) else None


def _share(values: Mapping[str, float], key: str) -> float:
    total = sum(values.values())
    return values[key] / total if total > 0 else math.nan
