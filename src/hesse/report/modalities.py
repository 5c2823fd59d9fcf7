"""What each modality brings: alone, when it is missing, averaged over all orders, to each class, epoch by epoch.

The Shapley value of a modality is the part of the score that it adds to the modalities before it, averaged over all
orders in which they can be added; so the values of all add up to what the model gains over seeing nothing. "Alone" is
that part in the first place, "without" tells it in the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hesse.report import modality_charts
from hesse.report.figure import Chart
from hesse.report.numbers import signed, value
from hesse.report.records import Records

__all__ = ["Contribution", "contribution", "name_of"]

# Rows of the table: key in the record, heading, what it says, and how it is written ("" is a score).
MEASURES = (
    ("shapley", "adds", "the part of the score that it adds, averaged over all orders of adding (Shapley)", "signed"),
    ("alone", "alone", "the score with all others hidden, a guess where it is absent itself", ""),
    ("without", "without it", "the score with it alone hidden", ""),
    ("probe", "probe", "the score of a linear model on its features, of rows that have it: what its encoder knows", ""),
    ("gradient_share", "gradient", "its share of the gradient of all encoders: who is being trained", "accuracy"),
    ("curvature_share", "curvature", "its share of the curvature: whose weights the predictions depend on", "accuracy"),
)


@dataclass(frozen=True, slots=True)
class Contribution:
    """The section: a table, charts, and the score by which modalities are there. What is empty is left out."""

    names: list[str]  # of all modalities
    shown: list[str]  # of those in the table
    measures: list[tuple[str, list[str], str]]  # heading, one cell a modality, what it says
    charts: list[Chart]
    classes: Chart | None
    presence: list[dict[str, Any]]
    fallback: str
    fusion: list[tuple[str, str, bool]]


def name_of(modality: Mapping[str, Any]) -> str:
    """A modality by the name of its column, with its kind where that is not the same.

    Example:
        >>> name_of({"name": "photo", "kind": "image"}), name_of({"name": "columns", "kind": "columns"})
        ('photo (image)', 'columns')
    """
    return modality["name"] + (f" ({modality['kind']})" if modality["kind"] != modality["name"] else "")


def contribution(run: Records) -> Contribution:
    """What the records say of each modality; modalities that the config does not name are none."""
    record = run.evaluation
    seen = record.get("modalities") or {}
    named = {each["key"]: name_of(each) for each in run.config["modalities"]}
    rows = [(name, seen[key]) for key, name in named.items() if key in seen]
    return Contribution(
        names=list(named.values()),
        shown=[name for name, _ in rows],
        measures=[
            (heading, [_cell(found.get(key), form, run.score) for _, found in rows], says)
            for key, heading, says, form in MEASURES
            if any(found.get(key) is not None for _, found in rows)
        ],
        charts=_charts(run, rows),
        classes=modality_charts.by_class([(name, found.get("by_class") or {}) for name, found in rows]),
        presence=_presence(record.get("presence") or [], named, run.score),
        fallback=_fallback(record.get("fallback"), named),
        fusion=_fusion(run),
    )


def _cell(number: float | None, form: str, score: str) -> str:
    return signed(number, score) if form == "signed" else value(number, form or score)


def _charts(run: Records, rows: list[tuple[str, dict[str, Any]]]) -> list[Chart]:
    full, baseline = run.evaluation.get("value"), run.evaluation.get("baseline")
    if not rows or full is None:
        return []
    drawn: list[Chart | None] = []
    if all(found.get("shapley") is not None for _, found in rows):
        added = [(name, found["shapley"]) for name, found in rows]
        drawn.append(modality_charts.parts(added, run.score, full, full - sum(part for _, part in added)))
    if any(found.get(key) is not None for _, found in rows for key in ("alone", "without")):
        masked = [(name, found.get("alone"), found.get("without")) for name, found in rows]
        drawn.append(modality_charts.masked(masked, run.score, full, baseline))
    drawn.append(modality_charts.speed([(name, found.get("speed") or []) for name, found in rows]))
    return [chart for chart in drawn if chart is not None]


def _presence(found: list[dict[str, Any]], named: Mapping[str, str], score: str) -> list[dict[str, Any]]:
    """Scores by which modalities are there, the best first."""
    known = [each for each in found if each.get("value") is not None]
    low = min((0.0, *(each["value"] for each in known)))
    high = max((each["value"] for each in known), default=1.0)
    return [
        {
            "marks": [key in each["present"] for key in named],
            "value": value(each["value"], score),
            "bar": round(100 * (each["value"] - low) / ((high - low) or 1.0), 1),
            "n": each.get("n"),
        }
        for each in sorted(known, key=lambda each: (-each["value"], len(each["present"])))
    ]


def _fallback(found: Mapping[str, Any] | None, named: Mapping[str, str]) -> str:
    """A sentence on the modality that answers alone, if one does."""
    if not found:
        return ""
    name = named.get(found["modality"], found["modality"])
    reason = str(found.get("reason") or "").strip()
    return f"{name} answers alone. {reason}".rstrip()


def _fusion(run: Records) -> list[tuple[str, str, bool]]:
    """The kinds of fusion that ``--fusion auto`` tried: name, lowest validation loss, whether it was taken."""
    tried: Mapping[str, float | None] = run.config.get("fusion_tried") or {}
    best = sorted(tried.items(), key=lambda each: math.inf if each[1] is None else each[1])
    return [(name, value(loss), name == run.config.get("fusion")) for name, loss in best]
