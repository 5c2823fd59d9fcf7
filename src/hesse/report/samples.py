"""The rows on which the modalities disagree most, shown as they are: pictures, players, texts.

Training leaves small copies of their media in ``samples`` in the run folder. They are put into the page, so that it
stays one file; what would make it too large is left out with a word. A record says which files to show, but only
files of that folder are read, and only as kinds that cannot carry a program.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hesse.report.modalities import name_of
from hesse.report.numbers import brief
from hesse.report.records import Records

__all__ = ["Answer", "Row", "disagreements"]

MOST = 12  # rows
BYTES = 3_000_000  # of media in the page
TEXT = 600  # characters of a text
KINDS = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".wav": "audio/wav",
    ".ogg": "audio/ogg",
    ".oga": "audio/ogg",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One modality of one row: what was seen, and what it alone makes of it."""

    name: str
    kind: str  # "image", "audio", "text", "columns"
    predicted: str
    sure: float | None
    right: bool | None  # None of a quantity, which is more or less right
    pull: str  # what it adds to the joint answer
    source: str = ""  # data URI of a picture or sound
    text: str = ""
    cells: list[tuple[str, str]] = field(default_factory=list)
    word: str = ""  # why nothing is shown


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table, counted from 1 as the findings do."""

    number: int
    actual: str
    predicted: str
    sure: float | None
    right: bool | None
    answers: list[Answer]


def disagreements(run: Records, folder: Path) -> list[Row]:
    """The rows that ``evaluation.json`` names, with their media as long as there is room for them."""
    room = BYTES
    quantity = run.targets[0]["task"] == "regression"

    def right(said: Any, found: Mapping[str, Any]) -> bool | None:
        return None if quantity or said is None else bool(said == found.get("actual"))

    rows = []
    for found in (run.evaluation.get("disagreements") or [])[:MOST]:
        answers = []
        for modality in run.config["modalities"]:
            own = (found.get("by_modality") or {}).get(modality["key"]) or {}
            sample = (found.get("samples") or {}).get(modality["key"]) or {}
            shown, size = _sample(sample, folder, room)
            room -= size
            said, pull = own.get("predicted"), own.get("shapley")
            answers.append(
                Answer(
                    name_of(modality),
                    modality["kind"],
                    _label(said),
                    own.get("confidence"),
                    right(said, found),
                    "" if pull is None else _pull(pull),
                    **shown,
                )
            )
        said = found.get("predicted")
        rows.append(
            Row(
                found["row"] + 1,
                _label(found.get("actual")),
                _label(said),
                found.get("confidence"),
                right(said, found),
                answers,
            )
        )
    return rows


def _label(said: Any) -> str:
    """A class, or a quantity to four digits; empty if nothing was said."""
    if not isinstance(said, float):
        return "" if said is None else str(said)
    return f"{said:,.0f}" if 1000 <= abs(said) < 1e9 else f"{said:.4g}"


def _pull(pull: float) -> str:
    """Signed: of a log-probability to two decimals, of a large quantity to the unit."""
    return (f"{pull:+,.0f}" if abs(pull) >= 100 else f"{pull:+.2f}").replace("-", "−")


def _sample(sample: Mapping[str, Any], folder: Path, room: int) -> tuple[dict[str, Any], int]:
    """What of an :class:`Answer` shows the sample, and how many bytes of media it takes."""
    if sample.get("file"):
        return _media(str(sample["file"]), folder, room)
    text = sample.get("text")
    if isinstance(text, Mapping):
        return {"cells": [(brief(name), brief(_label(cell))) for name, cell in text.items()]}, 0
    return {"text": brief("" if text is None else text, TEXT)}, 0


def _media(name: str, folder: Path, room: int) -> tuple[dict[str, Any], int]:
    path = folder / name
    kind = KINDS.get(path.suffix.lower())
    # A record made elsewhere must not take files from this machine into a page that is passed on.
    inside = path.resolve().is_relative_to((folder / "samples").resolve())
    if kind is None or not inside:
        return {"word": f"{brief(name)} is not a picture or sound of the run's samples."}, 0
    if not path.is_file():
        return {"word": f"{brief(name)} is not there any more."}, 0
    size = path.stat().st_size
    if size > room:
        return {"word": f"Left out: the page holds {BYTES / 1e6:g} MB of samples at most."}, 0
    return {"source": f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"}, size
