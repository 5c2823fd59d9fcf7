"""A run's state on disk: one file that holds everything between two steps, and the records beside it.

The file is torch's own format, read with ``weights_only=True``: tensors, numbers, texts and their containers, no
pickled objects. It is written whole or not at all, and the records are cut back to it on resume, so a crash at any
moment loses at most the steps since the last save.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from hesse.files import atomic_path, read_lines, write_json, write_lines
from hesse.finding import InputError
from hesse.training.loop import State

__all__ = ["restore", "save"]

CHECKPOINT = "checkpoint.pt"
COUNTERS = ("epoch", "batch", "step", "seconds", "loss_sum", "best_loss", "best_epoch")


def save(folder: Path, state: State) -> None:
    """Write the state and its records into ``folder``."""
    write_lines(folder / "metrics.jsonl", state.metrics)
    write_lines(folder / "steps.jsonl", state.steps)
    write_lines(folder / "layers.jsonl", state.monitor.records)
    write_json(folder / "findings.json", [finding.to_dict() for finding in state.findings])
    with atomic_path(folder / CHECKPOINT) as temporary:
        torch.save(
            {
                "model": state.model.state_dict(),
                "average": state.average.state_dict(),
                "best": state.best,
                "optimizer": state.optimizer.state_dict(),
                "monitor": state.monitor.state_dict(),
                "random": torch.get_rng_state(),
                **{name: getattr(state, name) for name in COUNTERS},
            },
            temporary,
        )


def restore(folder: Path, state: State) -> None:
    """Bring a freshly started ``state`` to where the run in ``folder`` was saved.

    Raises:
        InputError: there is no checkpoint, it is damaged, or it holds pickled objects.
    """
    saved = _load(folder / CHECKPOINT)
    try:
        state.model.load_state_dict(saved["model"])
        state.average.load_state_dict(saved["average"])
        state.optimizer.load_state_dict(saved["optimizer"])
        for name in COUNTERS:
            setattr(state, name, saved[name])
        state.best = saved["best"]
        torch.set_rng_state(saved["random"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            "foreign checkpoint",
            str(folder / CHECKPOINT),
            f"The checkpoint does not fit this run: {error}.",
            "Resume with the version of hesse that wrote it, or train anew with --overwrite.",
        ) from error
    state.metrics = [row for row in read_lines(folder / "metrics.jsonl") if row["epoch"] <= state.epoch]
    state.steps = [row for row in read_lines(folder / "steps.jsonl") if row["step"] <= state.step]
    state.monitor.load_state_dict(saved["monitor"])


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(
            "no checkpoint", str(path), "There is no checkpoint to resume from.", "Train anew with --overwrite."
        )
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise InputError(
            "unsafe checkpoint",
            str(path),
            "The checkpoint holds pickled objects, which could run any code when read; hesse never writes such.",
            "Do not trust this file: restore it from where it came from, or train anew with --overwrite.",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(
            "damaged checkpoint", str(path), f"The checkpoint cannot be read: {error}.", "Train anew with --overwrite."
        ) from error
    if not isinstance(saved, dict):
        raise InputError(
            "foreign checkpoint", str(path), "This is no checkpoint of hesse.", "Train anew with --overwrite."
        )
    return saved
