"""What a run folder holds, read for the report.

Only ``config.json`` has to be there; it is what makes a folder a run folder. Every other record may be
missing or empty, as an interrupted run leaves it. What is there but cannot be read is an error, because a
page that silently left something out would be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hesse.files import read_json, read_lines
from hesse.finding import InputError

__all__ = ["Records", "optimizer_label", "read", "read_spectrum"]

REQUIRED = ("hesse", "target", "task", "classes", "optimizer", "modalities", "split", "command")
# What the page can do without in a config.
OPTIONAL: dict[str, Any] = {
    "notes": [],
    "status": "finished",
    "table": "",
    "rows": None,
    "created": None,
    "parameters": None,
    "python_call": "",
}
SPECTRUM = ("target", "optimizer", "lr", "parameters", "gauss_newton", "hessian", "blocks")
REMEDY = "Give the folder that `hesse train` has written (--out)."
OPTIMIZERS = {
    "kfac": "K-FAC",
    "adamw": "AdamW",
    "adam": "Adam",
    "adagrad": "Adagrad",
    "sgd": "SGD",
    "lbfgs": "L-BFGS",
    "shampoo": "Shampoo",
    "soap": "SOAP",
}

Json = TypeVar("Json", dict[str, Any], list[Any])


@dataclass(frozen=True, slots=True)
class Records:
    """What a run folder holds; absent records are empty."""

    config: dict[str, Any]
    columns: dict[str, Any]
    metrics: list[Any]
    steps: list[Any]
    layers: list[Any]
    findings: list[Any]
    evaluation: dict[str, Any]
    beside: list[Records]  # runs trained for the same time with other optimisers

    @property
    def label(self) -> str:
        """The optimiser, with its learning rate if it has one."""
        return optimizer_label(self.config)

    @property
    def score(self) -> str:
        """``"accuracy"`` or ``"r2"``."""
        return "accuracy" if self.config["task"] == "classification" else "r2"


def optimizer_label(config: Mapping[str, Any]) -> str:
    """The optimiser of a run, with its learning rate if it has one."""
    name = config.get("optimizer", "unknown optimiser")
    lr = config.get("lr")
    return OPTIMIZERS.get(name, name) + (f", lr {lr:g}" if lr is not None else "")


def read(folder: Path) -> Records:
    """Read the records of a run, and of the runs trained beside it.

    Raises:
        InputError: the folder is not a run folder, or one of its records is damaged.
    """
    config = _json(folder / "config.json", {})
    absent = [key for key in REQUIRED if key not in config]
    if absent:
        if not folder.is_dir():
            seen = "There is no such folder."
        elif config:
            seen = f"Its config.json lacks {', '.join(absent)}."
        else:
            seen = "It holds no config.json."
        raise InputError("not a run folder", str(folder), seen, REMEDY)
    return _records(folder, OPTIONAL | config)


def read_spectrum(folder: Path) -> dict[str, Any]:
    """Read the record of ``hesse spectrum``.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / "spectrum.json"
    record = _json(path, {})
    if not record:
        raise InputError("no spectrum", str(path), "There is no such record.", "Make it with hesse spectrum RUN.")
    absent = [key for key in SPECTRUM if key not in record]
    if absent:
        raise _damaged(path, f"it lacks {', '.join(absent)}")
    return record


def _records(folder: Path, config: dict[str, Any]) -> Records:
    beside = sorted(path for path in folder.glob("compare/*") if path.is_dir())
    return Records(
        config=config,
        columns=_json(folder / "columns.json", {}),
        metrics=_lines(folder / "metrics.jsonl"),
        steps=_lines(folder / "steps.jsonl"),
        layers=_lines(folder / "layers.jsonl"),
        findings=_json(folder / "findings.json", []),
        evaluation=_json(folder / "evaluation.json", {}),
        beside=[
            _records(path, {"optimizer": path.name, "task": config["task"]} | _json(path / "config.json", {}))
            for path in beside
        ],
    )


def _json(path: Path, empty: Json) -> Json:
    if not path.is_file() or not path.stat().st_size:
        return empty
    try:
        value = read_json(path)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, type(empty)):
        raise _damaged(path, f"a {type(empty).__name__} was expected, not a {type(value).__name__}")
    return value


def _lines(path: Path) -> list[Any]:
    try:
        return read_lines(path)
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, what: str) -> InputError:
    remedies = {"config.json": REMEDY, "spectrum.json": "Make it anew with hesse spectrum RUN."}
    remedy = remedies.get(path.name, "Delete the file to build the page without it.")
    return InputError("damaged record", str(path), f"It cannot be read: {what}.", remedy)
