"""The record of a search for settings as ``hesse tune`` writes it, without training anything."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from hesse.files import write_json


def make_search(folder: Path, trials: int = 24, *, target: str = "digit", seed: int = 2, **more: Any) -> dict[str, Any]:
    """Write a ``tune.json`` whose loss has its valley at a rate of 3e-3; returns the record."""
    random = np.random.default_rng(seed)
    done: list[dict[str, Any]] = []
    least = math.inf
    for number in range(trials):
        lr = float(10 ** random.uniform(-5, -0.5))
        params = {
            "lr": lr,
            "weight_decay": float(10 ** random.uniform(-6, -1)),
            "batch_size": int(random.choice([16, 32, 64])),
            "dropout": float(random.uniform(0, 0.5)),
        }
        loss = 0.3 + 0.25 * math.log10(lr / 3e-3) ** 2 + abs(float(random.normal(0, 0.05)))
        state = "failed" if number == 5 else "pruned" if loss > 0.9 else "complete"
        least = min(least, loss) if state == "complete" else least
        done.append(
            {
                "number": number,
                "state": state,
                "params": params,
                "value": loss if state == "complete" else None,
                "score": 0.95 - 0.3 * loss if state == "complete" else None,
                "seconds": None if state == "failed" else 3.0 if state == "pruned" else 12.5,
                "epochs": None if state == "failed" else 2 if state == "pruned" else 8,
                "best_so_far": least if math.isfinite(least) else None,
                "folder": f"trials/{number:04}",
                "error": "The validation loss was never a number." if state == "failed" else None,
            }
        )
    complete = [trial for trial in done if trial["state"] == "complete"]
    best = min(complete, key=lambda trial: trial["value"], default=None)
    record = {
        "target": target,
        "task": "classification",
        "score": "accuracy",
        "sampler": "tpe",
        "optimizer": "adamw",
        "seed": 0,
        "jobs": 2,
        "direction": "minimize",
        "objective": "validation loss",
        "budget": {"epochs": None, "seconds": 12.5},
        "asked": 24,
        "space": {
            "lr": {"kind": "log", "low": 1e-5, "high": 0.3},
            "weight_decay": {"kind": "log", "low": 1e-6, "high": 0.1},
            "batch_size": {"kind": "choice", "values": [16, 32, 64]},
            "dropout": {"kind": "linear", "low": 0.0, "high": 0.5},
        },
        "trials": done,
        "best": best and {key: best[key] for key in ("number", "params", "value", "score", "seconds", "folder")},
        "kfac": {"value": 0.34, "score": 0.86, "seconds": 12.4, "folder": "kfac"},
        "part": "test",
        "baseline": 0.1,
        "seconds": sum(trial["seconds"] or 0.0 for trial in done),
        "command": "hesse tune digits.csv --target digit --optimizer adamw --trials 24 --seconds 12.5",
        **more,
    }
    write_json(folder / "tune.json", record)
    return record
