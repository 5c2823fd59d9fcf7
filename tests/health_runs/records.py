"""Statistics written by hand: a chain of like layers, of which a test changes a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hesse.health.stats import Stats

__all__ = ["CHAIN", "at", "spike", "written"]

CHAIN = ("0", "2", "4", "6", "8")
USUAL: dict[str, Any] = {
    "grad_norm": 1.0,
    "weight_norm": 10.0,
    "update_ratio": 1e-3,
    "moved": 1e-2,
    "lr": 0.1,
    "without": [],
    "in_rms": 1.0,
    "out_rms": 1.0,
    "out_grad_rms": 1.0,
    "spread": 0.8,
}


def at(value: Any, i: int) -> Any:
    """A number, or what a function says of the record's index."""
    return value(i) if callable(value) else value


def spike(height: float, where: int = 9) -> Callable[[int], float]:
    return lambda i: height if i == where else 1.0


def written(
    changed: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    samples: int = 10,
    loss: Any = 1.0,
    times: Mapping[str, Any] | None = None,
    told: Sequence[float] | None = None,
    chain: Sequence[str] = CHAIN,
    types: Mapping[str, str] | None = None,
) -> Stats:
    """Records of a chain of linear layers, one every ten steps.

    Args:
        changed: by layer, or by activation, numbers that differ from the usual ones (or functions of the index).
        samples: how many records.
        loss: of each record.
        times: gradients over time by path, lists or functions of the index.
        told: losses of all steps.
        chain: paths of the layers in order; an activation named in ``changed`` comes where its name sorts.
        types: classes of layers that are not linear.
    """
    changed = changed or {}
    activations = [path for path in changed if path not in chain]
    order = {path: i for i, path in enumerate(sorted([*chain, *activations]))}
    records = []
    for i in range(samples):
        layers = {}
        for path in order:
            numbers = {**(USUAL if path in chain else {}), "order": order[path], **changed.get(path, {})}
            layers[path] = {key: at(value, i) for key, value in numbers.items()}
        step = 10 * i + 1
        heard = {path: {"grad": at(grads, i)} for path, grads in (times or {}).items()}
        records.append({"step": step, "loss": at(loss, i), "lr": 0.1, "rows": 32, "layers": layers, "times": heard})
    linear = {
        "weight": {"shape": [8, 8], "dtype": "float32", "trainable": True},
        "bias": {"shape": [8], "dtype": "float32", "trainable": True},
    }
    anatomy: dict[str, dict[str, Any]] = {
        path: {
            "type": (types or {}).get(path, "Linear" if path in chain else "ReLU"),
            "index": i,
            "params": linear if path in chain else {},
            "tied": [],
        }
        for i, path in enumerate(order)
    }
    return Stats(records, anatomy, [[i + 1, value] for i, value in enumerate(told or [])])
