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
    "kfac": lambda model, **given: KFAC(model, **given),
    "soap": lambda model, **given: SOAP(model.parameters(), **given),
    "shampoo": lambda model, **given: Shampoo(model.parameters(), **given),
    "adamw": lambda model, **given: torch.optim.AdamW(model.parameters(), **given),
    "adam": lambda model, **given: torch.optim.Adam(model.parameters(), **given),
    "adagrad": lambda model, **given: torch.optim.Adagrad(model.parameters(), **given),
    "sgd": lambda model, **given: torch.optim.SGD(model.parameters(), momentum=0.9, **given),
    # Without a line search torch's LBFGS takes full steps, which on a new batch each time diverges.
    "lbfgs": lambda model, **given: torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", **given),
}
SELF_TUNING = ("kfac",)
WITHOUT_DECAY = ("lbfgs",)
DETERMINISTIC = {"lbfgs": 4096}  # rows at most; these take the difference of two batches for curvature, and diverge


def refuse_optimizer(name: str, lr: float | None = None, weight_decay: float | None = None) -> None:
    """Raise :class:`InputError` unless there is an optimiser of that name that takes such a rate and such a decay."""
    if name not in OPTIMIZERS:
        raise InputError(
            "no such optimizer",
            "optimizer",
            f"There is no optimizer {name!r}.",
            f"Choose from {', '.join(OPTIMIZERS)}.",
            name,
        )
    if weight_decay is not None and name in WITHOUT_DECAY:
        message = f"{name} has no weight decay; got {weight_decay}."
        remedy = "Leave out weight_decay, or choose another optimizer."
        raise InputError("unused weight decay", "weight_decay", message, remedy, weight_decay)
    if weight_decay is not None and not 0 <= weight_decay < math.inf:
        message = f"Weight decay must be 0 or more; got {weight_decay}."
        raise InputError("bad weight decay", "weight_decay", message, "Try 0.01, or leave it out.", weight_decay)
    if lr is None:
        return
    if name in SELF_TUNING:
        message = f"{name} finds its own learning rate at every step; got {lr}."
        raise InputError("unused learning rate", "lr", message, "Leave out lr, or choose another optimizer.", lr)
    if not 0 < lr < math.inf:
        message = f"A learning rate must be a positive number; got {lr}."
        raise InputError("bad learning rate", "lr", message, "Try 0.001, or leave it out.", lr)


def make_optimizer(
    name: str, model: nn.Module, lr: float | None = None, weight_decay: float | None = None
) -> torch.optim.Optimizer:
    """The optimiser called ``name`` for the parameters of ``model``; what is None is as its own default has it."""
    given = {"lr": lr, "weight_decay": weight_decay}
    return OPTIMIZERS[name](model, **{key: value for key, value in given.items() if value is not None})


def batch_size(name: str, rows: int) -> int:
    """Rows a step when none are asked for: the power of two next to a 32nd of ``rows``, 16 to 512.

    An epoch is then about 32 steps. A self-tuning method gets 64 at the least: it takes its batch at its word, and 16
    noisy rows say anything. A method made for deterministic functions gets all rows, up to 4096.

    Example:
        >>> batch_size("kfac", 5000), batch_size("kfac", 320), batch_size("adamw", 320), batch_size("lbfgs", 1437)
        (256, 64, 16, 1437)
    """
    if name in DETERMINISTIC:
        return min(rows, DETERMINISTIC[name])
    least = 64 if name in SELF_TUNING else 16
    return min(512, max(least, 1 << (max(1, rows // 32) - 1).bit_length()))
