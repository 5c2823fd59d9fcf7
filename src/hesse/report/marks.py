"""Findings as marks on charts: at which row, at which step, with which sign, and what they say when pointed at.

A finding names a module, a parameter, a function called in a forward, or the model itself; a chart has rows for
layers that hold weights. A parameter belongs to its layer, an activation to the layer called before it, a container
to its first layer, and what concerns the whole model has a row of its own.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hesse.finding import Finding
from hesse.report.figure import Figure, Row

__all__ = ["WHOLE", "Mark", "called", "marks", "row_of", "trace"]

WHOLE = "(whole model)"
SIGNS = {"error": "x", "warning": "triangle-up", "info": "circle"}  # told apart without colour, too
GRAVITY = tuple(SIGNS)
WIDTH = 64  # characters of a line of hover text


@dataclass(frozen=True, slots=True)
class Mark:
    """All findings at one row and step: the gravest gives the sign, the text tells each."""

    row: str
    step: int
    severity: str
    text: str


def marks(findings: Iterable[Finding], names: Sequence[str], order: Mapping[str, int]) -> list[Mark]:
    """The findings that were made at a step, each at one of ``names`` or at :data:`WHOLE`.

    Args:
        names: rows of the chart.
        order: when a module or function was first called in a forward pass, as sensors record it.

    Example:
        >>> dead = Finding("dead_units", "fc1.relu", "9 of 16 units gave zero.", step=40)
        >>> [(mark.row, mark.step) for mark in marks([dead], ["fc1", "fc2"], {})]
        [('fc1', 40)]
    """
    found: dict[tuple[str, int], list[Finding]] = {}
    for finding in findings:
        if finding.step is not None:
            found.setdefault((row_of(finding.where, names, order), finding.step), []).append(finding)
    return [
        Mark(row, step, min((f.severity for f in group), key=GRAVITY.index), "<br><br>".join(map(_said, group)))
        for (row, step), group in found.items()
    ]


def row_of(where: str, names: Sequence[str], order: Mapping[str, int]) -> str:
    """The row that ``where`` belongs to.

    Example:
        >>> rows = ["conv", "body.0", "body.2", "head"]
        >>> [row_of(w, rows, {"conv": 1, "act": 2}) for w in ("head.weight", "body", "act", "Net")]
        ['head', 'body.0', 'conv', '(whole model)']
    """
    path = where
    while path:
        if path in names:
            return path
        path = path.rpartition(".")[0]
    inside = [name for name in names if where and name.startswith(f"{where}.")]
    if inside:
        return inside[0]
    before = [name for name in names if where in order and order.get(name, 0) and order[name] < order[where]]
    return max(before, key=lambda name: order[name], default=WHOLE)


def called(rows: Sequence[Row]) -> dict[str, int]:
    """When each module or function was first called in a forward pass, by the newest record that knows it."""
    return {name: seen["order"] for row in rows for name, seen in row["layers"].items() if seen.get("order")}


def trace(found: Sequence[Mark], y: Sequence[str | float], **more: object) -> Figure:
    """The marks as a trace of plotly's, at heights ``y``."""
    return {
        "type": "scatter",
        "mode": "markers",
        "showlegend": False,
        "x": [mark.step for mark in found],
        "y": list(y),
        "text": [mark.text for mark in found],
        "marker": {
            "symbol": [SIGNS[mark.severity] for mark in found],
            "color": [f"var(--{mark.severity})" for mark in found],
            "size": 12,
            "line": {"color": "var(--page)", "width": 1.5},
        },
        "hovertemplate": "%{text}<extra></extra>",
        **more,
    }


def _said(finding: Finding) -> str:
    """The finding's sentence and remedy, as lines that plotly shows as they are."""
    head = f"<b>{html.escape(finding.kind)}</b> at step {finding.step}"
    where = [f"{finding.where}"] if finding.where else []
    remedy = [f"What to do: {finding.remedy}"] if finding.remedy else []
    lines = [line for text in (*where, finding.message, *remedy) for line in textwrap.wrap(text, WIDTH)]
    return "<br>".join([head, *(html.escape(line, quote=False) for line in lines)])
