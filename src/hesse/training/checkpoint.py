"""A run's state on disk: one file that holds everything between two steps, and the records beside it.

The file is torch's own format, read with ``weights_only=True``: tensors, numbers, texts and their containers, no
pickled objects. It is written whole or not at all, and it holds the records too: those beside it are views of it for
people and pages, written after it, so whatever a crash leaves of them does not matter to a resumed run.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from hesse.files import atomic_path, write_json, write_lines
from hesse.finding import Finding, InputError
from hesse.training.loop import State

__all__ = ["CHECKPOINT", "restore", "save"]

CHECKPOINT = "checkpoint.pt"
PLAIN = ("epoch", "batch", "step", "seconds", "waited", "seen", "loss_sum", "best_loss", "best_epoch")
RECORDS = ("metrics", "steps", "skipped")


def save(folder: Path, state: State) -> None:
    """Write the state and its records into ``folder``."""
    content = io.BytesIO()  # what torch writes to a disk that is full fails with an error of its own
    torch.save(
        {
            "model": state.model.state_dict(),
            "average": state.average.state_dict(),
            "best": state.best,
            "optimizer": state.optimizer.state_dict(),
            "monitor": state.monitor.state_dict(),
            "random": torch.get_rng_state(),
            "earlier": [finding.to_dict() for finding in state.earlier],
            **{name: getattr(state, name) for name in PLAIN + RECORDS},
        },
        content,
    )
    with atomic_path(folder / CHECKPOINT) as temporary:
        temporary.write_bytes(content.getbuffer())
    write_lines(folder / "metrics.jsonl", state.metrics)
    write_lines(folder / "steps.jsonl", state.steps)
    write_lines(folder / "layers.jsonl", state.monitor.records)
    write_json(folder / "findings.json", [finding.to_dict() for finding in state.findings])


def restore(folder: Path, state: State) -> None:
    """Bring a freshly started ``state``, and torch's generator, to where the run in ``folder`` was saved.

    Raises:
        InputError: the checkpoint is damaged, of another model, or holds pickled objects.
    """
    path = folder / CHECKPOINT
    saved = _load(path)
    try:
        state.best = dict(saved["best"])
        if state.best:
            state.average.module.load_state_dict(state.best)  # to see that it fits
        state.model.load_state_dict(saved["model"])
        state.average.load_state_dict(saved["average"])
        state.optimizer.load_state_dict(saved["optimizer"])
        state.monitor.load_state_dict(saved["monitor"])
        state.earlier = [Finding(**finding) for finding in saved["earlier"]]
        for name in PLAIN + RECORDS:
            setattr(state, name, saved[name])
        torch.set_rng_state(saved["random"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # whatever a foreign file holds
        raise InputError(
            "foreign checkpoint",
            str(path),
            f"The checkpoint does not fit this run: {' '.join(str(error).split())[:200]}.",
            "Resume with the version of hesse that wrote it, or train anew with --overwrite.",
        ) from error


def _load(path: Path) -> dict[str, Any]:
    def refusal(kind: str, message: str) -> InputError:
        return InputError(
            kind, str(path), message, "Put the file back that hesse wrote, or train anew with --overwrite."
        )

    if not zipfile.is_zipfile(path):  # torch.load would take such a file for a pickle of old
        raise refusal(
            "damaged checkpoint",
            "This is no whole file in torch's format: it is cut short, or something else. hesse has not read it.",
        )
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise refusal(
            "unsafe checkpoint",
            "It holds pickled objects besides tensors, numbers and texts, which could run any code when read. hesse "
            "writes no such files and has not read this one.",
        ) from error
    except (AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise refusal("damaged checkpoint", f"It cannot be read: {reason}.") from error
    if not isinstance(saved, dict):
        raise refusal("foreign checkpoint", "This is no checkpoint of hesse.")
    return saved
