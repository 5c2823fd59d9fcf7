"""How a run learned, as charts: score and loss of every epoch, against wall time and against epochs.

Both functions take the rows of ``metrics.jsonl`` and return a :class:`~hesse.report.figure.Chart`, or None where
there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hesse.report.figure import SERIES, SYMBOLS, Chart, Figure, Row, axis, clock, labels, layout, present, scale
from hesse.report.numbers import is_share, plotly_format, score_name, value

__all__ = ["Curve", "loss", "score"]


@dataclass(frozen=True, slots=True)
class Curve:
    """The epochs of one run (rows of ``metrics.jsonl``) and the name of its optimiser."""

    label: str
    rows: Sequence[Row]


def _horizontal(curves: Sequence[Curve], against: str) -> tuple[float, str]:
    if against == "epoch":
        return 1.0, "epoch"
    size, unit = clock(max(row["seconds"] for curve in curves for row in curve.rows))
    return size, f"{unit} of training"


def score(curves: Sequence[Curve], name: str, against: str) -> Chart | None:
    """Validation score (``"accuracy"``, ``"r2"``, ...) of every run against its ``"seconds"`` or its ``"epoch"``."""
    curves = [Curve(curve.label, present(curve.rows, "valid_score", against)) for curve in curves]
    curves = [curve for curve in curves if curve.rows]
    if not curves:
        return None
    size, title = _horizontal(curves, against)
    data: list[Figure] = []
    for i, curve in enumerate(curves):
        chosen = max((k for k, row in enumerate(curve.rows) if row.get("best")), default=None)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": labels([curve.label])[0],
                "x": [row[against] / size for row in curve.rows],
                "y": [row["valid_score"] for row in curve.rows],
                "customdata": [row["epoch"] for row in curve.rows],
                "line": {"color": SERIES[i % 6], "width": 2.5 if i == 0 else 2},
                "marker": {
                    "symbol": SYMBOLS[i % 6],
                    "size": [13 if k == chosen else 5 for k in range(len(curve.rows))],
                    "line": {"width": 0},
                    "opacity": 1,
                },
                "hovertemplate": "<b>%{fullData.name}</b><br>epoch %{customdata}: %{y"
                + f":{plotly_format(name)}"
                + "}<extra></extra>",
            }
        )
    # As many digits as tell the marks of a narrow range apart.
    spread = max(values) - min(values) if (values := [y for trace in data for y in trace["y"]]) else 0.0
    more = sum(0 < spread < limit for limit in (0.05, 0.005))
    what = score_name(name)
    ends = "; ".join(
        f"{c.label} ends at {value(c.rows[-1]['valid_score'], name)} in epoch {c.rows[-1]['epoch']}" for c in curves
    )
    return Chart(
        f"score-{against}",
        f"Validation {what} against {'wall time' if against == 'seconds' else 'epochs'}",
        f"Line chart of validation {what} against {title}: {ends}.",
        {
            "data": data,
            "layout": layout(
                axis(title, rangemode="tozero"),
                # An R² far below zero, as first epochs have it, must not flatten the rest of the curve.
                axis(tickformat=f".{more}%", autorangeoptions={"clipmin": 0, "clipmax": 1.02})
                if is_share(name)
                else axis(tickformat=f".{2 + more}~f", autorangeoptions={"clipmin": -0.5}),
                showlegend=True,
            ),
        },
    )


def loss(curves: Sequence[Curve], against: str) -> Chart | None:
    """Validation loss (solid) and training loss (dotted) of every run, against time or epochs as above."""
    data: list[Figure] = []
    shown = [curve for curve in curves if present(curve.rows, against)]
    if not shown:
        return None
    size, title = _horizontal([Curve(c.label, present(c.rows, against)) for c in shown], against)
    for i, curve in enumerate(shown):
        for key, kind, dash in (("valid_loss", "validation", "solid"), ("train_loss", "training", "dot")):
            rows = present(curve.rows, key, against)
            if not rows:
                continue
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines" if len(rows) > 1 else "markers",
                    "name": labels([curve.label])[0],
                    "legendgroup": str(i),
                    "showlegend": kind == "validation",
                    "x": [row[against] / size for row in rows],
                    "y": [row[key] for row in rows],
                    "customdata": [row["epoch"] for row in rows],
                    "line": {"color": SERIES[i % 6], "width": 2, "dash": dash},
                    "hovertemplate": f"<b>%{{fullData.name}}</b>, {kind}<br>"
                    "epoch %{customdata}: %{y:.4g}<extra></extra>",
                }
            )
    if not data:
        return None
    vertical = scale([y for trace in data for y in trace["y"]])
    ends = "; ".join(
        f"{curve.label} ends at {row['valid_loss']:.3g} in validation"
        for curve in shown
        for row in present(curve.rows, "valid_loss")[-1:]
    )
    return Chart(
        f"loss-{against}",
        f"Loss against {'wall time' if against == 'seconds' else 'epochs'}"
        + (", log scale" if vertical["type"] == "log" else ""),
        f"Line chart of loss against {title}: {ends}.",
        {
            "data": data,
            "layout": layout(axis(title, rangemode="tozero"), axis(**vertical), showlegend=True),
        },
    )
