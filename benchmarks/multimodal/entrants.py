"""Who runs: optimisers, torch's at a searched learning rate and hesse's as they come; and cures, around any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import hesse
from benchmarks.multimodal.models import WIDTH, Apart
from benchmarks.multimodal.tasks import CLASSES
from hesse.multimodal import balance

__all__ = ["CURES", "OPTIMIZERS", "PLAN", "RATES", "TRIED", "WATCHED", "Entrant"]

# Found by ``--search`` on seed 3: the best accuracy on validation rows after AdamW's ten epochs or their time.
TRIED = {"SGD": (0.01, 0.03, 0.1), "Adagrad": (0.003, 0.01, 0.03), "AdamW": (0.001, 0.003, 0.01)}
RATES: dict[str, dict[str, float]] = {
    "degraded": {"SGD": 0.1, "Adagrad": 0.01, "AdamW": 0.003},
    "speaker": {"SGD": 0.1, "Adagrad": 0.03, "AdamW": 0.01},
    "demo": {"SGD": 0.03, "Adagrad": 0.003, "AdamW": 0.003},
    "balanced": {"SGD": 0.1, "Adagrad": 0.03, "AdamW": 0.01},
}
RATES["heard"] = RATES["speaker"]


def _widths(model: nn.Module) -> dict[str, int]:
    return dict.fromkeys(model.encoders, WIDTH)


OPTIMIZERS: dict[str, Callable[[nn.Module, float], Any]] = {
    "SGD": lambda model, rate: torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9),
    "Adagrad": lambda model, rate: torch.optim.Adagrad(model.parameters(), lr=rate),
    "AdamW": lambda model, rate: torch.optim.AdamW(model.parameters(), lr=rate),
    "SOAP": lambda model, _: hesse.optim.SOAP(model.parameters()),
    "Shampoo": lambda model, _: hesse.optim.Shampoo(model.parameters()),
    "KFAC": lambda model, _: hesse.optim.KFAC(model),
    "GaussNewton": lambda model, _: hesse.optim.GaussNewton(model),
}

CURES: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "none": lambda model, _: model,
    "Heads": lambda model, _: balance.Heads(model, CLASSES, _widths(model)),
    "G-Blend": lambda model, _: balance.GBlend(model, CLASSES, _widths(model)),
    "OGM-GE": lambda model, _: balance.OGMGE(model, CLASSES, _widths(model)),
    "MMPareto": lambda model, optimizer: balance.MMPareto(
        model, CLASSES, _widths(model), gamma=1.0 if optimizer == "KFAC" else 1.5
    ),
    "PMR": lambda model, _: balance.PMR(model, CLASSES, _widths(model)),
    "Pool": lambda model, _: balance.Pool(model, CLASSES, _widths(model)),
    "apart": lambda model, _: Apart(model, CLASSES),
}

BARE = [(name, "none") for name in OPTIMIZERS]
CURED = [(name, cure) for cure in CURES if cure not in ("none", "apart") for name in ("AdamW", "SOAP", "KFAC")]
POOLED = [(name, "Pool") for name in ("AdamW", "SOAP", "KFAC")]
APART = ("AdamW", "apart")
PLAN: dict[str, list[tuple[str, str]]] = {
    "degraded": [*BARE, *CURED, ("SGD", "Pool"), ("Adagrad", "Pool"), ("Shampoo", "Pool"), APART],
    "speaker": [*BARE, *(row for row in CURED if row[0] != "KFAC" or row[1] == "Pool"), APART],
    "heard": [("AdamW", "none"), ("SOAP", "none"), *POOLED, APART],
    "demo": [*BARE[:-1], *POOLED, APART],
    "balanced": [*BARE[:-1], *POOLED, APART],
}
WATCHED = ("AdamW", "SOAP", "KFAC")


@dataclass(frozen=True)
class Entrant:
    """An optimiser at a rate (NaN where nothing is to set), and a cure."""

    optimizer: str
    cure: str = "none"
    rate: float = float("nan")

    @property
    def name(self) -> str:
        return self.optimizer if self.cure == "none" else f"{self.optimizer} + {self.cure}"
