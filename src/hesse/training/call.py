"""The call that made a run: what is written into its configuration, and how to make the same call again."""

from __future__ import annotations

import math
import os
import platform
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hesse
from hesse.finding import InputError
from hesse.multimodal import Schema, Table

__all__ = ["DEFAULTS", "default_folder", "extended", "for_schema", "given", "modality_name", "record", "repeated"]

DEFAULTS: dict[str, Any] = {
    "out": None,
    "optimizer": "kfac",
    "lr": None,
    "weight_decay": None,
    "epochs": None,
    "seconds": None,
    "batch_size": None,
    "columns": {},
    "encoders": {},
    "trainable": {},
    "split_column": None,
    "class_weights": None,
    "data_root": None,
    "delimiter": None,
    "skip_bad_rows": False,
    "fusion": "concat",
    "balance": "pool",
    "stream": None,
    "workers": None,
    "compare": [],
    "seed": 0,
}
"""The arguments of :func:`hesse.train` that make a run what it is, as JSON values."""

MAY_CHANGE = ("out", "epochs", "seconds", "compare", "data_root", "delimiter", "workers")  # when a run is resumed
LARGEST_SEED = 2**32 - 1
LONGEST = 30  # characters of a name in a default folder: file systems take 255 bytes, four a character at most


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not at their defaults, as JSON values.

    Raises:
        InputError: a number is out of range.

    Example:
        >>> given(epochs=5, out=Path("runs/pets"), columns=None, seed=0)
        {'epochs': 5, 'out': 'runs/pets'}
    """
    for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("workers", 0)):
        value = arguments.get(name)
        if value is not None and not (isinstance(value, int | np.integer) and value >= least):
            raise InputError(
                "bad argument", name, f"It must be a whole number, {least} or more; got {value}.", "Change it.", value
            )
    seconds, seed = arguments.get("seconds"), arguments.get("seed", 0)
    if seconds is not None and not 0 < seconds < math.inf:
        raise InputError("bad argument", "seconds", f"It must be more than 0; got {seconds}.", "Change it.", seconds)
    if seed > LARGEST_SEED:
        raise InputError("bad argument", "seed", f"It must be at most {LARGEST_SEED}; got {seed}.", "Change it.", seed)
    plain = {name: DEFAULTS[name] if value is None else _json(value) for name, value in arguments.items()}
    return {name: value for name, value in plain.items() if value != DEFAULTS[name]}


def extended(config: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The arguments of a resumed run: those it began with, and what is asked for now.

    Args:
        config: of the run.
        now: the arguments given now, as from :func:`given`.
        folder: of the run.

    Raises:
        InputError: an argument would make it another run.
    """
    for name, value in now.items():
        kept = config.get(name, DEFAULTS[name])
        # What was asked for counts as well: a fusion "auto" has become something else.
        if name not in MAY_CHANGE and value not in (kept, config["arguments"].get(name)):
            raise InputError(
                "another setting",
                name,
                f"The run in {folder} has {name} {kept!r}, which cannot become {value!r} on the way.",
                "Resume without it, or train anew with another --out.",
            )
    before = dict(config["arguments"])
    if "epochs" in now or "seconds" in now:
        before = {name: value for name, value in before.items() if name not in ("epochs", "seconds")}
    compare = list(dict.fromkeys([*before.get("compare", []), *now.get("compare", [])]))
    return before | dict(now) | ({"compare": compare} if compare else {})


def for_schema(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that decide what a table's columns mean, as :func:`make_schema` takes them; where it is split besides."""
    shared = ("encoders", "trainable", "class_weights", "seed")
    return {"overrides": settings["columns"], **{name: settings[name] for name in shared}}


def record(schema: Schema, source: Table) -> dict[str, Any]:
    """What ``config.json`` says about versions and data."""
    return {
        "hesse": hesse.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "table": source.name,
        "target": ", ".join(target.name for target in schema.targets),
        "rows": len(source),
        "task": schema.targets[0].task,
        "classes": list(schema.targets[0].classes),
        "targets": [{"name": t.name, "task": t.task, "classes": list(t.classes)} for t in schema.targets],
        "modalities": [
            {"key": key, "name": modality_name(schema, key), "kind": columns[0].kind if key != "columns" else key}
            for key, columns in schema.modalities.items()
        ],
    }


def repeated(table: Any, target: str | Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says about the call: the arguments, and the same call as a command and in Python.

    Example:
        >>> call = repeated("pets.csv", "species", {"epochs": 5, "columns": {"a b": "text"}, "skip_bad_rows": True})
        >>> print(call["command"])
        hesse train pets.csv --target species --epochs 5 --column 'a b=text' --skip-bad-rows
        >>> print(call["python_call"])
        hesse.train('pets.csv', target='species', epochs=5, columns={'a b': 'text'}, skip_bad_rows=True)
    """
    path = _path(table)
    targets = [target] if isinstance(target, str) else list(target)
    python = [repr(path) if path else "table", f"target={(targets[0] if len(targets) == 1 else targets)!r}"]
    python += [f"{name}={value!r}" for name, value in arguments.items()]
    return {
        "arguments": dict(arguments),
        "command": _command(path or "TABLE", targets, arguments),
        "python_call": f"hesse.train({', '.join(python)})",
    }


def default_folder(table: Any, target: str | Sequence[str]) -> Path:
    """``runs/TABLE-TARGET``, where no letter of either can lead elsewhere.

    Example:
        >>> default_folder("data/pets.csv", "../species").as_posix()
        'runs/pets-___species'
    """
    path = _path(table)
    target = target if isinstance(target, str) else "-".join(target)
    return Path("runs") / f"{_plain('data-frame' if path is None else Path(path).stem)}-{_plain(target)}"


def modality_name(schema: Schema, key: str) -> str:
    """A modality as people know it: the name of its column, or "columns" for all numbers and categories."""
    return key if key == "columns" else schema.modalities[key][0].name


def _command(table: str, targets: Sequence[str], arguments: Mapping[str, Any]) -> str:
    words = ["hesse", "train", table, *(word for target in targets for word in ("--target", target))]
    for name, value in arguments.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option.removeprefix('--')}")
        elif isinstance(value, Mapping):
            option = option.removesuffix("s")  # --column, --encoder
            words += [word for column, kind in value.items() for word in (option, f"{column}={kind}")]
        else:
            words += [word for item in (value if isinstance(value, list) else [value]) for word in (option, str(item))]
    return shlex.join(words)


def _json(value: Any) -> Any:
    """Paths as texts, numpy's numbers as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(dict.fromkeys(value))
    return value.item() if isinstance(value, np.generic) else value


def _path(table: Any) -> str | None:
    """The path, so that no option parser takes it for anything else; None of a data frame."""
    if not isinstance(table, str | os.PathLike):
        return None
    path = os.fspath(table)
    return f"./{path}" if path.startswith("-") else path


def _plain(name: str) -> str:
    """Letters, marks and digits of any script stay, and "-"; whatever else (a slash, a dot, a blank) becomes "_"."""
    return "".join(c if c == "-" or unicodedata.category(c)[0] in "LMN" else "_" for c in name[:LONGEST])
