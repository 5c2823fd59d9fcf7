"""The page of ``hesse doctor``: what is wrong, where and what to do, and the numbers that say so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hesse.files import write_text
from hesse.finding import Finding
from hesse.report import layer_curves, layers
from hesse.report.figure import SERIES, Chart, axis, digits, layout, scale, thin
from hesse.report.page import render
from hesse.report.spectrum import short

__all__ = ["build_doctor"]


def build_doctor(record: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a diagnosis, from its JSON object alone.

    Args:
        record: what ``Diagnosis.to_dict()`` returns.
        path: of the page, for instance ``doctor.html``.

    Returns:
        The path: one file that opens without network, in light and dark, on screens and on paper.
    """
    entries = [(Finding(**e["finding"]), [Finding(**f) for f in e["consequences"]]) for e in record["entries"]]
    found = [finding for first, rest in entries for finding in (first, *rest)]
    course = record["course"] or {"records": [], "losses": []}
    maps = [layers.gradients(course["records"], found), layer_curves.curves(course["records"], found)]
    shown = [chart for chart in maps if chart is not None]
    losses = [chart for chart in (_losses(course["losses"]),) if chart is not None]
    text = render(
        "doctor.html.j2",
        [*shown, *losses],
        record=record,
        faults=[(first, rest) for first, rest in entries if first.severity != "info"],
        others=[first for first, _ in entries if first.severity == "info"],
        shown=shown,
        losses=losses,
        short=short,
    )
    write_text(path, text)
    return path


def _losses(losses: list[float | None]) -> Chart | None:
    """The loss of every step; where it was no number, there is a gap."""
    known = [loss for loss in losses if loss is not None]
    if not known:
        return None
    rows = thin([{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)], 1000)
    values = [row["loss"] for row in rows]
    lost = len(losses) - len(known)
    return Chart(
        "losses",
        "Loss of each batch, before its step",
        f"Line chart of the loss over {len(losses)} steps, from {known[0]:.4g} to {known[-1]:.4g}."
        + (f" In {lost} of them it was no finite number." if lost else ""),
        {
            "data": [
                {
                    "type": "scatter",
                    "mode": "lines" if len(rows) > 1 else "markers",
                    "x": [row["step"] for row in rows],
                    "y": digits(np.array(values, float)),
                    "line": {"color": SERIES[0], "width": 1.75},
                    "hovertemplate": "step %{x}<br>loss %{y:.4g}<extra></extra>",
                }
            ],
            "layout": layout(axis("step"), axis(**scale(values)), showlegend=False),
        },
        260,
        wide=True,
    )
