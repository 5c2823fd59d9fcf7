"""The optimisers that the main job knows by name: torch's own and hesse's, all on the same closure.

To add one: a line here. ``lr`` None means the optimiser's own default, which for K-FAC is "found at every step".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from hesse.finding import InputError
from hesse.optim import KFAC, SOAP, Shampoo

__all__ = ["OPTIMIZERS", "batch_size", "make_optimizer", "refuse_optimizer"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "kfac": lambda model: KFAC(model),
    "soap": lambda model, **lr: SOAP(model.parameters(), **lr),
    "shampoo": lambda model, **lr: Shampoo(model.parameters(), **lr),
    "adamw": lambda model, **lr: torch.optim.AdamW(model.parameters(), **lr),
    "adam": lambda model, **lr: torch.optim.Adam(model.parameters(), **lr),
    "adagrad": lambda model, **lr: torch.optim.Adagrad(model.parameters(), **lr),
    "sgd": lambda model, **lr: torch.optim.SGD(model.parameters(), momentum=0.9, **lr),
    # Without a line search torch's LBFGS takes full steps, which on a new batch each time diverges.
    "lbfgs": lambda model, **lr: torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", **lr),
}
SELF_TUNING = ("kfac",)
DETERMINISTIC = {"lbfgs": 4096}  # rows at most; these take the difference of two batches for curvature, and diverge


def refuse_optimizer(name: str, lr: float | None = None) -> None:
    """Raise :class:`InputError` unless there is an optimiser of that name that takes such a learning rate."""
    if name not in OPTIMIZERS:
        raise InputError(
            "no such optimizer",
            "optimizer",
            f"There is no optimizer {name!r}.",
            f"Choose from {', '.join(OPTIMIZERS)}.",
            name,
        )
    if lr is None:
        return
    if name in SELF_TUNING:
        message = f"{name} finds its own learning rate at every step; got {lr}."
        raise InputError("unused learning rate", "lr", message, "Leave out lr, or choose another optimizer.", lr)
    if not 0 < lr < math.inf:
        message = f"A learning rate must be a positive number; got {lr}."
        raise InputError("bad learning rate", "lr", message, "Try 0.001, or leave it out.", lr)


def make_optimizer(name: str, model: nn.Module, lr: float | None = None) -> torch.optim.Optimizer:
    """The optimiser called ``name`` for the parameters of ``model``, at its own default rate if ``lr`` is None."""
    return OPTIMIZERS[name](model) if lr is None else OPTIMIZERS[name](model, lr=lr)


def batch_size(name: str, rows: int) -> int:
    """Rows a step when none are asked for: the power of two next to a 32nd of ``rows``, 16 to 512.

    An epoch is then about 32 steps. A method made for deterministic functions gets all rows, up to 4096.

    Example:
        >>> batch_size("kfac", 1437), batch_size("kfac", 20), batch_size("lbfgs", 1437)
        (64, 16, 1437)
    """
    if name in DETERMINISTIC:
        return min(rows, DETERMINISTIC[name])
    return min(512, max(16, 1 << (max(1, rows // 32) - 1).bit_length()))
