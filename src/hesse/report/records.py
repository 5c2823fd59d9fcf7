"""What a run folder holds, read for the report.

Only ``config.json`` has to be there; it is what makes a folder a run folder. Every other record may be
missing or empty, as an interrupted run leaves it. What is there but cannot be read is an error, because a
page that silently left something out would be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hesse.files import read_json, read_lines
from hesse.finding import InputError

__all__ = ["OPTIMIZERS", "Records", "optimizer_label", "read", "read_spectrum", "read_tune"]

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
TUNE = ("target", "optimizer", "objective", "sampler", "asked", "budget", "space", "trials", "command")
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
    def targets(self) -> list[dict[str, Any]]:
        """Name, task and classes of what is predicted; runs of version 0.1.0 have one target, named in three places."""
        alone = {"name": self.config["target"], "task": self.config["task"], "classes": self.config["classes"]}
        return self.config.get("targets") or [alone]

    @property
    def score(self) -> str:
        """``"accuracy"``, ``"r2"`` or another; ``"mean score"`` where there are several targets."""
        if self.evaluation.get("score"):
            return str(self.evaluation["score"])
        if len(self.config.get("targets") or ()) > 1:
            return "mean score"
        return "r2" if self.config["task"] == "regression" else "accuracy"


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
    return _single(folder / "spectrum.json", "spectrum", SPECTRUM, "Make it with hesse spectrum RUN.")


def read_tune(folder: Path) -> dict[str, Any]:
    """Read the record of ``hesse tune``.

    Raises:
        InputError: there is none, or it is damaged.
    """
    record = _single(folder / "tune.json", "search", TUNE, "Give the folder that hesse tune has written (--out).")
    return {"seconds": None} | record


def _single(path: Path, what: str, keys: Sequence[str], remedy: str) -> dict[str, Any]:
    record = _json(path, {})
    if not record:
        raise InputError(f"no {what}", str(path), "There is no such record.", remedy)
    absent = [key for key in keys if key not in record]
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
    remedies["tune.json"] = "Go on with the search: hesse tune writes the file anew after every trial."
    remedy = remedies.get(path.name, "Delete the file to build the page without it.")
    return InputError("damaged record", str(path), f"It cannot be read: {what}.", remedy)
