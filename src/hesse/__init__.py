"""hesse: second-order training for PyTorch, on the formula x - alpha B^{-1} grad f.

The public names are loaded when first used, so that ``hesse --help`` does not wait for torch, and so that the
trainer's libraries are needed only by those who train on tables.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hesse import check as check
    from hesse import curvature as curvature
    from hesse import minimizers as minimizers
    from hesse import optim as optim
    from hesse.doctor import diagnose as diagnose
    from hesse.finding import Finding as Finding
    from hesse.finding import InputError as InputError
    from hesse.health import watch as watch
    from hesse.minimizers import argmin as argmin
    from hesse.minimizers import least_squares as least_squares
    from hesse.minimizers import minimize as minimize
    from hesse.objective import closure as closure
    from hesse.training import Run as Run
    from hesse.training import train as train
    from hesse.training.estimator import MultimodalClassifier as MultimodalClassifier
    from hesse.training.estimator import MultimodalRegressor as MultimodalRegressor
    from hesse.training.tune import tune as tune

__version__ = "0.1.0"

_HOME = {
    "Finding": "hesse.finding",
    "InputError": "hesse.finding",
    "MultimodalClassifier": "hesse.training.estimator",
    "MultimodalRegressor": "hesse.training.estimator",
    "Run": "hesse.training",
    "argmin": "hesse.minimizers",
    "closure": "hesse.objective",
    "diagnose": "hesse.doctor",
    "least_squares": "hesse.minimizers",
    "minimize": "hesse.minimizers",
    "train": "hesse.training",
    "tune": "hesse.training.tune",
    "watch": "hesse.health",
}
_ROOMS = ("check", "curvature", "minimizers", "optim")

__all__ = [
    "Finding",
    "InputError",
    "MultimodalClassifier",
    "MultimodalRegressor",
    "Run",
    "argmin",
    "check",
    "closure",
    "curvature",
    "diagnose",
    "least_squares",
    "minimize",
    "minimizers",
    "optim",
    "train",
    "tune",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"hesse.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'hesse' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
