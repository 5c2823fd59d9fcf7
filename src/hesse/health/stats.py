"""What is written down about a model at a sampled step: a few norms a layer, read from the device in one go.

A layer is a module that holds trainable parameters of its own. Gradients are read from ``p.grad`` after the
optimiser's step and not by backward hooks, because an optimiser may take its gradients with
``torch.autograd.grad``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Layer", "Stats", "find_layers", "measure", "silent_units"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """A module with trainable parameters of its own; a parameter that several share belongs to the first."""

    path: str
    module: nn.Module
    params: tuple[nn.Parameter, ...]


@dataclass
class Stats:
    """The records of a run, oldest first: what the rules read.

    A record is ``{"step": int, "loss": float | None, "layers": {path: {"grad_norm", "weight_norm",
    "update_ratio", "dead"}}}``. ``update_ratio`` is |w_new - w_old| / |w_old| of the one step; ``dead`` the
    fraction of units that were zero for whole batches several samples in a row; what was not measured is
    None. Layers come in the order of the model's modules.
    """

    records: list[Record] = field(default_factory=list)

    def series(self, path: str, key: str) -> list[float]:
        """One number of one layer over time, where it was measured."""
        values = (record["layers"].get(path, {}).get(key) for record in self.records)
        return [value for value in values if value is not None]

    @property
    def losses(self) -> list[float]:
        """The recorded losses, oldest first."""
        return [record["loss"] for record in self.records if record["loss"] is not None]


def find_layers(model: nn.Module) -> list[Layer]:
    """The layers of a model, in the order of its modules; the model itself goes by its class's name.

    Example:
        >>> [layer.path for layer in find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))]
        ['0', '2']
    """
    seen: set[int] = set()
    layers = []
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
        seen |= {id(p) for p in own}
        if own:
            layers.append(Layer(path or type(model).__name__, module, tuple(own)))
    return layers


def silent_units(y: Tensor) -> Tensor | None:
    """Units of an activation that are zero for the whole batch, boolean of shape [units].

    Units are the channels of images and volumes [N, C, H, W, ...] and the last axis of anything smaller.
    """
    if y.dim() < 2 or not y.numel():
        return None
    unit = 1 if y.dim() > 3 else y.dim() - 1
    return (y.detach() == 0).all(dim=[d for d in range(y.dim()) if d != unit])


def measure(
    layers: Sequence[Layer],
    before: Sequence[Tensor] | None,
    fractions: Mapping[str, Tensor],
    losses: Sequence[Tensor | float | None],
) -> tuple[list[float | None], dict[str, dict[str, float | None]]]:
    """The losses as numbers and the numbers of every layer now, by one transfer from the device.

    Args:
        layers: as :func:`find_layers` gives them.
        before: the parameters as they were before the step, in the layers' order, when they were kept.
        fractions: fraction of dead units by path, scalars on the device.
        losses: that still wait on the device, or are known, or unknown.
    """
    params = [p.detach() for layer in layers for p in layer.params]
    grads = [None if p.grad is None else p.grad.detach() for layer in layers for p in layer.params]
    present = [g.coalesce().values() if g.is_sparse else g for g in grads if g is not None]
    columns = [_norms(params), _norms(present)]
    if before is not None:
        columns += [_norms(torch._foreach_sub(params, list(before))), _norms(before)]
    columns.append(list(fractions.values()))
    columns.append([loss.detach().reshape(()) for loss in losses if isinstance(loss, Tensor)])
    flat = [value for column in columns for value in column]
    values = iter(torch.stack([v.to(flat[0].device, torch.float64) for v in flat]).tolist() if flat else ())

    weight = [next(values) for _ in params]
    read = iter([_again(g) if v in (0.0, math.inf) else v for g, v in zip(present, values, strict=False)])
    grad = [None if g is None else next(read) for g in grads]
    move = [next(values) for _ in params] if before is not None else []
    old = [next(values) for _ in params] if before is not None else []
    dead = {path: next(values) for path in fractions}
    known = [next(values) if isinstance(loss, Tensor) else loss for loss in losses]

    numbers: dict[str, dict[str, float | None]] = {}
    i = 0
    for layer in layers:
        span = slice(i, i + len(layer.params))
        i = span.stop
        size = _joint(old[span])
        numbers[layer.path] = {
            "grad_norm": _joint(grad[span]),
            "weight_norm": _joint(weight[span]),
            "update_ratio": (_joint(move[span]) or 0.0) / size if size else None,
            "dead": dead.pop(layer.path, None),
        }
    for path, fraction in dead.items():
        numbers[path] = {"grad_norm": None, "weight_norm": None, "update_ratio": None, "dead": fraction}
    return known, numbers


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean norms, one kernel for all; they stay on the device."""
    return list(torch._foreach_norm(list(tensors))) if tensors else []


def _again(grad: Tensor) -> float:
    """The norm in float64 (twenty times slower), for gradients whose squares leave the range."""
    return float(torch.linalg.vector_norm(grad, dtype=torch.float64))


def _joint(norms: Sequence[float | None]) -> float | None:
    """The norm of the parts together; parts without a number are left out."""
    known = [n for n in norms if n is not None]
    return sum(n * n for n in known) ** 0.5 if known else None
