"""The result of a run as charts: how it learned, where it errs, and what each modality brings.

Each function takes numbers from the run's records and returns a :class:`~hesse.report.figure.Chart`, or None
where the records hold nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hesse.report.figure import (
    SERIES,
    SYMBOLS,
    Chart,
    Figure,
    Row,
    axis,
    clock,
    heat,
    labels,
    layout,
    line,
    percent,
    present,
    rounded,
    scale,
)

__all__ = ["Curve", "confusion", "loss", "modalities", "predictions", "residuals", "score"]

ANNOTATED = 20  # classes up to which a count fits into its cell


@dataclass(frozen=True, slots=True)
class Curve:
    """The epochs of one run (rows of ``metrics.jsonl``) and the name of its optimiser."""

    label: str
    rows: Sequence[Row]


def _value(score_name: str, value: float) -> str:
    return percent(value) if score_name == "accuracy" else f"{value:.3f}"


def _horizontal(curves: Sequence[Curve], against: str) -> tuple[float, str]:
    if against == "epoch":
        return 1.0, "epoch"
    size, unit = clock(max(row["seconds"] for curve in curves for row in curve.rows))
    return size, f"{unit} of training"


def score(curves: Sequence[Curve], name: str, against: str) -> Chart | None:
    """Validation ``"accuracy"`` or ``"r2"`` of every run against its ``"seconds"`` or its ``"epoch"``."""
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
                + (":.1%" if name == "accuracy" else ":.3f")
                + "}<extra></extra>",
            }
        )
    what = "accuracy" if name == "accuracy" else "R²"
    ends = "; ".join(
        f"{c.label} ends at {_value(name, c.rows[-1]['valid_score'])} in epoch {c.rows[-1]['epoch']}" for c in curves
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
                axis(tickformat=".0%", autorangeoptions={"clipmin": 0, "clipmax": 1.02})
                if name == "accuracy"
                else axis(tickformat=".2~f", autorangeoptions={"clipmin": -0.5}),
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
                    "mode": "lines",
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


def confusion(classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> Chart:
    """Confusion matrix ``[actual, predicted]``: colour is the share of the actual class, text the count."""
    counts = np.asarray(matrix, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    n = len(classes)
    names = labels(classes, 24)
    common = {"type": "category", "showgrid": False, "ticks": ""}
    trace: Figure = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": rounded(share),
        "zmin": 0,
        "zmax": 1,
        "customdata": counts.astype(int).tolist(),
        "colorscale": heat("var(--page)", "var(--matrix-1)", "var(--matrix-2)", "var(--matrix-3)"),
        "showscale": False,
        "xgap": 1.5 if n <= ANNOTATED else 0,
        "ygap": 1.5 if n <= ANNOTATED else 0,
        "hovertemplate": "actual <b>%{y}</b>, predicted <b>%{x}</b><br>"
        "%{customdata} rows, %{z:.1%} of this class<extra></extra>",
    }
    if n <= ANNOTATED:
        trace["text"] = [[f"{int(count):,}" if count else "" for count in row] for row in counts]
        trace["texttemplate"] = "%{text}"
    height = max(300, min(640, 90 + 40 * n))
    short = {"tickmode": "array", "tickvals": names, "ticktext": labels(classes, 9)} if n <= ANNOTATED else {}
    return Chart(
        "confusion",
        "Confusion matrix",
        f"Confusion matrix of {n} classes; the table of classes holds the same numbers: "
        f"{int(np.trace(counts)):,} of {int(counts.sum()):,} rows are on the diagonal.",
        {
            "data": [trace],
            "layout": layout(axis("predicted", **common), axis("actual", autorange="reversed", **common)),
            "narrow": {"xaxis": short, "yaxis": short, "font": {"size": 11}},
        },
        height,
    )


def predictions(actual: Sequence[float], predicted: Sequence[float], target: str) -> Chart:
    """Predicted against actual values of a regression, with the diagonal where every prediction is right."""
    both = [value for value in (*actual, *predicted) if value is not None]
    low, high = min(both), max(both)
    pad = 0.04 * (high - low) or 1.0
    ends = [low - pad, high + pad]
    common = {"range": ends}
    return Chart(
        "predictions",
        "Predicted against actual",
        f"Scatter plot of {len(actual):,} test rows, predicted against actual {target}, with the diagonal.",
        {
            "data": [
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": "perfect prediction",
                    "x": ends,
                    "y": ends,
                    "line": {"color": "var(--muted)", "width": 1.5, "dash": "dash"},
                    "hoverinfo": "skip",
                },
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": "test rows",
                    "x": list(actual),
                    "y": list(predicted),
                    "marker": {"color": SERIES[0], "size": 6, "opacity": 0.55},
                    "hovertemplate": "actual %{x:.4g}<br>predicted %{y:.4g}<extra></extra>",
                },
            ],
            "layout": layout(axis("actual", **common), axis("predicted", **common), showlegend=True),
        },
        420,
    )


def residuals(actual: Sequence[float], predicted: Sequence[float]) -> Chart:
    """Histogram of predicted minus actual."""
    error = np.asarray(predicted, dtype=np.float64) - np.asarray(actual, dtype=np.float64)
    error = error[np.isfinite(error)]
    counts, edges = np.histogram(error, bins=max(8, min(60, math.isqrt(error.size))))
    middle = (edges[1:] + edges[:-1]) / 2
    return Chart(
        "residuals",
        "Residuals",
        f"Histogram of predicted minus actual: median {np.median(error):.3g}, "
        f"nine tenths between {np.quantile(error, 0.05):.3g} and {np.quantile(error, 0.95):.3g}.",
        {
            "data": [
                {
                    "type": "bar",
                    "x": middle.tolist(),
                    "y": counts.tolist(),
                    "width": np.diff(edges).tolist(),
                    "customdata": np.stack([edges[:-1], edges[1:]], axis=1).tolist(),
                    "marker": {"color": SERIES[0], "line": {"color": "var(--page)", "width": 1}},
                    "hovertemplate": "%{y} rows between %{customdata[0]:.3g} and %{customdata[1]:.3g}<extra></extra>",
                }
            ],
            "layout": layout(
                axis("predicted minus actual"),
                axis("test rows"),
                shapes=[line("x", 0.0, "var(--muted)")],
            ),
        },
        420,
    )


def modalities(
    rows: Sequence[tuple[str, float | None, float | None]], name: str, full: float, baseline: float | None
) -> Chart:
    """Score of each modality (label, alone, without) as bars, with the score of all together as a line."""
    names = labels([row[0] for row in rows], 32)
    form = ".1%" if name == "accuracy" else ".3f"
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": title,
            "y": names,
            "x": [row[column] for row in rows],
            "texttemplate": f"%{{x:{form}}}",
            "textposition": "auto",
            "insidetextanchor": "end",
            "marker": {"color": fill, "line": {"color": colour, "width": 2}},
            "insidetextfont": {"color": text},
            "hovertemplate": f"<b>%{{y}}</b>, {title}: %{{x:{form}}}<extra></extra>",
        }
        for column, title, fill, colour, text in (
            (1, "alone (the others masked)", SERIES[0], SERIES[0], "var(--page)"),
            (2, "without it (it alone masked)", "var(--page)", SERIES[1], "var(--ink)"),
        )
    ]
    lines = [line("x", full, "var(--ink)", showlegend=True, name=f"all together {_value(name, full)}")]
    if baseline is not None:
        text = f"baseline {_value(name, baseline)}"
        lines.append(line("x", baseline, "var(--muted)", "dot", showlegend=True, name=text))
    each = "; ".join(
        f"{row[0]}: "
        + ", ".join(
            f"{what} {_value(name, value)}"
            for what, value in (("alone", row[1]), ("without it", row[2]))
            if value is not None
        )
        for row in rows
    )
    x = axis(tickformat=".0%" if name == "accuracy" else ".2~f", rangemode="tozero")
    return Chart(
        "modalities",
        f"Test {'accuracy' if name == 'accuracy' else 'R²'} by modality",
        f"Bar chart. All together {_value(name, full)}. {each}.",
        {
            "data": data,
            "layout": layout(
                x,
                axis(type="category", autorange="reversed", showgrid=False),
                barmode="group",
                bargap=0.3,
                bargroupgap=0.08,
                showlegend=True,
                shapes=lines,
            ),
            "narrow": {
                "yaxis": {
                    "tickmode": "array",
                    "tickvals": names,
                    "ticktext": labels([row[0] for row in rows], 18),
                },
                "font": {"size": 11},
            },
        },
        150 + 74 * len(rows),
    )
