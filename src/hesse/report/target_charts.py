"""What a model says of the test rows, as charts: right against wrong, sure against right, too high against too low.

Each function takes numbers of one target and returns a :class:`~hesse.report.figure.Chart`. ``mark`` is what tells the
names of its charts from those of other targets: nothing for the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hesse.report.figure import SERIES, Chart, Figure, axis, heat, labels, layout, line, rounded

__all__ = ["ANNOTATED", "confusion", "predictions", "reliability", "residuals"]

ANNOTATED = 20  # classes up to which a count fits into its cell


def confusion(classes: Sequence[str], matrix: Sequence[Sequence[int]], mark: str = "") -> Chart:
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
        f"confusion{mark}",
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


def predictions(actual: Sequence[float], predicted: Sequence[float], target: str, mark: str = "") -> Chart:
    """Predicted against actual values of a regression, with the diagonal where every prediction is right."""
    both = [value for value in (*actual, *predicted) if value is not None]
    low, high = min(both), max(both)
    pad = 0.04 * (high - low) or 1.0
    ends = [low - pad, high + pad]
    common = {"range": ends}
    return Chart(
        f"predictions{mark}",
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


def residuals(actual: Sequence[float], predicted: Sequence[float], mark: str = "") -> Chart:
    """Histogram of predicted minus actual."""
    error = np.asarray(predicted, dtype=np.float64) - np.asarray(actual, dtype=np.float64)
    error = error[np.isfinite(error)]
    counts, edges = np.histogram(error, bins=max(8, min(60, math.isqrt(error.size))))
    middle = (edges[1:] + edges[:-1]) / 2
    return Chart(
        f"residuals{mark}",
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


def reliability(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], mark: str = "") -> Chart:
    """How often answers of one confidence are right; on the diagonal the confidence is honest.

    Args:
        before, after: the temperature; bins of equal width, each with its mean ``confidence``, its ``accuracy`` and
            its number ``n`` of rows. The area of a marker is in proportion to the rows.
    """
    most = max(bin["n"] for bin in (*before, *after))
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "honest",
            "x": [0, 1],
            "y": [0, 1],
            "line": {"color": "var(--muted)", "width": 1.5, "dash": "dash"},
            "hoverinfo": "skip",
        }
    ]
    said = []
    for bins, name, colour, symbol, dash in (
        (before, "as trained", SERIES[1], "square", "dot"),
        (after, "with temperature" if before else "confidence", SERIES[0], "circle", "solid"),
    ):
        shown = [bin for bin in bins if bin["n"]]
        if not shown:
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [bin["confidence"] for bin in shown],
                "y": [bin["accuracy"] for bin in shown],
                "customdata": [bin["n"] for bin in shown],
                "line": {"color": colour, "width": 1.75, "dash": dash},
                "marker": {
                    "symbol": symbol,
                    "size": [6 + 14 * math.sqrt(bin["n"] / most) for bin in shown],
                    "opacity": 0.8,
                },
                "hovertemplate": f"<b>{name}</b><br>%{{customdata}} rows, on average %{{x:.1%}} sure"
                "<br>%{y:.1%} of them right<extra></extra>",
            }
        )
        said.append(
            f"{name}: " + ", ".join(f"{bin['confidence']:.0%} sure and {bin['accuracy']:.0%} right" for bin in shown)
        )
    common = {"tickformat": ".0%", "range": [-0.02, 1.04]}
    return Chart(
        f"reliability{mark}",
        "How honest the confidence is",
        f"Reliability diagram, share of right answers against confidence. {'; '.join(said)}.",
        {
            "data": data,
            "layout": layout(axis("confidence", **common), axis("right answers", **common), showlegend=True),
        },
        420,
    )
