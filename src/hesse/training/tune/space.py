"""What is searched over: learning rate, weight decay where there is one, and rows a step.

Rates and decays are drawn evenly in their logarithms, between bounds that hold the best value of every task that
hesse's benchmarks know, a factor of ten to spare on each side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hesse.finding import InputError
from hesse.training.optimizers import DETERMINISTIC, OPTIMIZERS, SELF_TUNING, WITHOUT_DECAY, refuse_optimizer

if TYPE_CHECKING:
    import optuna

__all__ = ["draw", "refuse_untunable", "space"]

RATES = {
    "soap": (1e-4, 1e-1),
    "shampoo": (1e-4, 1e-1),
    "adamw": (1e-5, 1e-1),
    "adam": (1e-5, 1e-1),
    "adagrad": (1e-4, 1.0),
    "sgd": (1e-5, 1.0),
    "lbfgs": (1e-2, 1.0),
}
DECAYS = (1e-6, 1e-1)
BATCHES = (16, 32, 64, 128, 256, 512)


def refuse_untunable(optimizer: str) -> None:
    """Raise :class:`InputError` for an optimiser that does not exist or finds its own settings."""
    refuse_optimizer(optimizer)
    if optimizer in SELF_TUNING:
        raise InputError(
            "nothing to tune",
            "optimizer",
            f"{optimizer} finds its own settings at every step; a search trains it once, beside the others.",
            f"Choose from {', '.join(name for name in OPTIMIZERS if name not in SELF_TUNING)}, or use hesse train.",
            optimizer,
        )


def space(optimizer: str, rows: int) -> dict[str, dict[str, Any]]:
    """What to draw for an optimiser on so many training rows.

    Example:
        >>> space("adamw", 300)["lr"], space("adamw", 100)["batch_size"]
        ({'kind': 'log', 'low': 1e-05, 'high': 0.1}, {'kind': 'choice', 'values': [16, 32, 64]})
        >>> list(space("lbfgs", 300))
        ['lr']
    """
    low, high = RATES[optimizer]
    found: dict[str, dict[str, Any]] = {"lr": {"kind": "log", "low": low, "high": high}}
    if optimizer not in WITHOUT_DECAY:
        found["weight_decay"] = {"kind": "log", "low": DECAYS[0], "high": DECAYS[1]}
    if optimizer not in DETERMINISTIC:
        sizes = [size for size in BATCHES if size <= rows] or [BATCHES[0]]
        found["batch_size"] = {"kind": "choice", "values": sizes}
    return found


def draw(trial: optuna.Trial, space: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Settings for one trial."""
    return {
        name: trial.suggest_categorical(name, one["values"])
        if one["kind"] == "choice"
        else trial.suggest_float(name, one["low"], one["high"], log=True)
        for name, one in space.items()
    }
