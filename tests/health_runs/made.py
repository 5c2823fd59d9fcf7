"""Statistics written by hand, for rules alone: three like layers, whose numbers may be functions of the record."""

from __future__ import annotations

from typing import Any

from hesse.health.stats import Stats

__all__ = ["LAYERS", "made"]

LAYERS = "first", "middle", "last"
USUAL: dict[str, Any] = {
    "grad_norm": 1.0,
    "weight_norm": 10.0,
    "update_ratio": 1e-3,
    "moved": lambda i: 1e-2 * i,
    "coherence": 0.3,
    "turn": 0.5,
    "stuck": 0.0,
    "grad_zero": 0.1,
    "grad_tiny": 0.0,
    "lr": None,
}


def made(
    count: int = 20,
    *,
    loss: Any = lambda i: 1.0 / (1 + i),
    lr: Any = 0.1,
    every: int = 10,
    first: int = 1,
    told: list[float] | None = None,
    dtype: str = "float32",
    more: dict[str, Any] | None = None,
    **numbers: Any,
) -> Stats:
    """Records ``every`` steps apart, from step ``first`` on.

    Args:
        loss, lr: a number or a function of the record's index.
        told: the losses of all steps, when they are known between samples.
        dtype: of the weights.
        more: further entries of a record.
        numbers: ``grad_norm=`` for all layers, ``first_grad_norm=`` for one.
    """

    def at(value: Any, i: int) -> Any:
        return value(i) if callable(value) else value

    records = []
    for i in range(count):
        layers = {
            layer: {key: at(numbers.get(f"{layer}_{key}", numbers.get(key, usual)), i) for key, usual in USUAL.items()}
            for layer in LAYERS
        }
        extra = {key: at(value, i) for key, value in (more or {}).items()}
        record = {"step": first + every * i, "loss": at(loss, i), "lr": at(lr, i), "layers": layers, "branches": {}}
        records.append(record | {"ties": {}} | extra)
    parts = {path: {"type": "Linear", "params": {"weight": {"shape": [2, 2], "dtype": dtype}}} for path in LAYERS}
    return Stats(records, parts, [[i + 1, value] for i, value in enumerate(told or [])])
