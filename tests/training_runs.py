"""What a run left, to compare with another one, and ways to cut one off."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hesse.files import read_json, read_lines
from hesse.training import loop


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Do something during the ``number``-th call of ``take_step`` from now on."""
    calls, take_step = [0], loop.take_step

    def step(*args: Any) -> float:
        calls[0] += 1
        if calls[0] == number:
            act()
        return take_step(*args)

    monkeypatch.setattr(loop, "take_step", step)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "waited")} for row in rows]


def records(folder: Path) -> dict[str, Any]:
    """All that a run leaves but wall times, and its weights as bytes."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {
        "model": (folder / "model.safetensors").read_bytes(),
        "last weights": {name: t.numpy().tobytes() for name, t in checkpoint["model"].items()},
        "random": checkpoint["random"].tolist(),
        "evaluation": read_json(folder / "evaluation.json"),
        "findings": read_json(folder / "findings.json"),
        **{name: without_seconds(read_lines(folder / f"{name}.jsonl")) for name in ("metrics", "steps", "layers")},
        "status": read_json(folder / "config.json")["status"],
    }
