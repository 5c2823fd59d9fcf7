"""Which fusion suits a table, by trying: each is trained briefly from the same start; the lowest validation loss wins.

A short race is no proof of how a long one ends, but what is far behind after two epochs seldom comes back. The winner
begins anew, so that a run with ``--fusion auto`` is bit for bit the run with the fusion that it chose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from hesse.finding import InputError
from hesse.multimodal.fusion import FUSIONS
from hesse.training.build import build_model
from hesse.training.loop import Plan, epochs, start
from hesse.training.optimizers import make_optimizer
from hesse.training.screen import Screen

__all__ = ["choose_fusion", "refuse_fusion"]

EPOCHS = 2  # of a try
SHARE = 0.05  # of the seconds or the epochs, the most that a try takes


def refuse_fusion(name: str) -> None:
    """Raise :class:`InputError` unless there is a fusion of that name, or it is "auto"."""
    if name not in (*FUSIONS, "auto"):
        names = ", ".join(FUSIONS)
        raise InputError(
            "no such fusion", "fusion", f"There is no fusion {name!r}.", f"Choose from {names} and auto.", name
        )


def choose_fusion(plan: Plan, settings: Mapping[str, Any], screen: Screen) -> dict[str, Any]:
    """Try every fusion on the plan's rows.

    A try takes two epochs, or a twentieth of the plan's if that is more, and at most a twentieth of its seconds.

    Args:
        plan: of the run that is to follow.
        settings: of the run, whose optimiser trains the tries.
        screen: shows what came out.

    Returns:
        ``fusion``, the name with the lowest validation loss, and ``fusion_tried``, the lowest validation loss of each
        by name; None of one that diverged.
    """
    if len(plan.schema.modalities) == 1:
        screen.say("fusion: there is one modality, and nothing to fuse: concat")
        return {"fusion": "concat", "fusion_tried": {}}
    tried = {name: _try(plan, settings, name) for name in FUSIONS}
    best = min(tried, key=lambda name: tried[name])
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in tried.items())
    screen.say(f"fusion: {best}, by the validation loss of a short try: {losses}")
    return {
        "fusion": best,
        "fusion_tried": {name: loss if math.isfinite(loss) else None for name, loss in tried.items()},
    }


def _try(plan: Plan, settings: Mapping[str, Any], fusion: str) -> float:
    """The lowest validation loss of a short training; infinite if there was none."""
    plan = replace(
        plan,
        epochs=EPOCHS if plan.epochs is None else max(min(EPOCHS, plan.epochs), round(SHARE * plan.epochs)),
        seconds=None if plan.seconds is None else SHARE * plan.seconds,
        patience=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(plan.seed)
        model = build_model(plan.schema, {**settings, "fusion": fusion})
        replica = plan.team.replica(model)
        optimizer = make_optimizer(settings["optimizer"], replica, settings["lr"], settings["weight_decay"])
        state = start(model, optimizer, replica)
        for _ in epochs(plan, state):
            pass
    return state.best_loss
