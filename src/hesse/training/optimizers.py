"""The optimisers that the main job knows by name: torch's own and hesse's, all on the same closure.

To add one: a line here. ``lr`` None means the optimiser's own default, which for hesse's is "found at every step".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hesse.finding import InputError
from hesse.optim import KFAC

__all__ = ["OPTIMIZERS", "make_optimizer"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "kfac": lambda model: KFAC(model),
    "adamw": lambda model, **lr: torch.optim.AdamW(model.parameters(), **lr),
    "adam": lambda model, **lr: torch.optim.Adam(model.parameters(), **lr),
    "adagrad": lambda model, **lr: torch.optim.Adagrad(model.parameters(), **lr),
    "sgd": lambda model, **lr: torch.optim.SGD(model.parameters(), momentum=0.9, **lr),
    # Without a line search torch's LBFGS takes full steps, which on a new batch each time diverges.
    "lbfgs": lambda model, **lr: torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", **lr),
}
SELF_TUNING = ("kfac",)


def make_optimizer(name: str, model: nn.Module, lr: float | None = None) -> torch.optim.Optimizer:
    """The optimiser called ``name`` for the parameters of ``model``.

    Raises:
        InputError: there is none of that name; or a learning rate for one that finds its own, or one that is not
        positive.
    """
    if name not in OPTIMIZERS:
        raise InputError(
            "no such optimizer",
            "optimizer",
            f"There is no optimizer {name!r}.",
            f"Choose from {', '.join(OPTIMIZERS)}.",
        )
    if lr is None:
        return OPTIMIZERS[name](model)
    if name in SELF_TUNING:
        raise InputError(
            "unused learning rate",
            "lr",
            f"{name} finds its own learning rate at every step; got {lr}.",
            "Leave out lr.",
        )
    if not lr > 0:
        raise InputError("bad learning rate", "lr", f"A learning rate must be positive; got {lr}.", "Try 0.001.")
    options: dict[str, Any] = {"lr": lr}
    return OPTIMIZERS[name](model, **options)
