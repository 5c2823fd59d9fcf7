"""The inside of a run as charts: how the gradient reaches every layer, and what the optimiser did with it.

A layer is a row or a line, in the order of the network. Both charts of layers are of ratios, gradient to
weight and update to weight, because a gradient's size means nothing by itself: layers differ in scale by
nature. What the rules found is marked where and when they found it (see :mod:`hesse.report.marks`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hesse.finding import Finding
from hesse.report.figure import (
    DASHES,
    SERIES,
    Chart,
    Figure,
    Row,
    axis,
    digits,
    heat,
    labels,
    layout,
    present,
    rounded,
    scale,
    thin,
)
from hesse.report.marks import WHOLE, called, marks, trace

__all__ = ["gradients", "steps", "updates"]

MOMENTS = 300  # points over time that a chart of all layers shows: more are not told apart on a screen
NAMED = 48  # layers up to which each has its name on the axis

# What steps.jsonl holds of the optimiser's own decisions: key, title.
DECISIONS = (
    ("damping", "damping"),
    ("lr", "step size (learning rate)"),
    ("momentum", "momentum"),
    ("trust_ratio", "trust ratio"),
)


def _names(rows: Sequence[Row]) -> list[str]:
    """The layers that have weights; an activation is recorded for its dead units alone."""
    return list(dict.fromkeys(name for row in rows for name, seen in row["layers"].items() if seen.get("weight_norm")))


def group(name: str) -> str:
    """The part of the network a layer belongs to; with a cure around it the network is called "model".

    Example:
        >>> group("encoders.image_photo.conv1"), group("model.encoders.image_photo.conv1"), group("head.0")
        ('encoders.image_photo', 'encoders.image_photo', 'head')
    """
    parts = name.removeprefix("model.").split(".")
    return ".".join(parts[: 2 if parts[0] == "encoders" and len(parts) > 2 else 1])


def gradients(rows: Sequence[Row], findings: Sequence[Finding] = ()) -> Chart | None:
    """Heat map over steps of log10(gradient norm / weight norm), one row a layer, inputs at the top.

    Findings are marks on it, at their layer and step.
    """
    every_row = [row for row in rows if row.get("layers")]
    rows = thin(every_row, MOMENTS)
    names = _names(rows)
    ratio = np.full((len(names), len(rows)), np.nan)
    for k, row in enumerate(rows):
        for i, name in enumerate(names):
            seen = row["layers"].get(name, {})
            grad, weight = seen.get("grad_norm"), seen.get("weight_norm")
            if grad and weight:
                ratio[i, k] = math.log10(grad / weight)
    known = ratio[np.isfinite(ratio)]
    if not known.size:
        return None
    # A single exploding cell must not take the whole scale.
    low, high = (float(q) for q in np.quantile(known, (0.01, 0.99)))
    high = max(high, low + 0.5)
    every = math.ceil(len(names) / NAMED)
    found = marks(findings, names, called(every_row))
    extra = [WHOLE] if any(mark.row == WHOLE for mark in found) else []
    shown = labels([*extra, *names], 40)
    brief = labels([*extra, *(name.removeprefix("model.").removeprefix("encoders.") for name in names)], 18)
    label = dict(zip([*extra, *names], shown, strict=True))
    told = " Marked with findings: " + "; ".join(f"{m.row} at step {m.step}" for m in found) + "." if found else ""
    step = max(1, math.ceil((high - low) / 6))
    powers = list(range(math.ceil(low), math.floor(high) + 1, step))
    reached = np.isfinite(ratio).any(axis=1)
    median = np.nanmedian(ratio[reached], axis=1)
    weakest = names[int(np.flatnonzero(reached)[median.argmin()])]
    return Chart(
        "gradients",
        "Gradient norm relative to weight norm, log scale",
        f"Heat map of {len(names)} layers over {len(rows)} moments. The weakest gradient, by the median, is "
        f"that of {weakest} at 10 to the power {median.min():.1f}; the strongest median is "
        f"{median.max():.1f}.{told}",
        {
            "data": [
                {
                    "type": "heatmap",
                    "x": [row["step"] for row in rows],
                    "y": shown,
                    "z": [[None] * len(rows)] * len(extra) + rounded(ratio),
                    "coloraxis": "coloraxis",
                    "hoverongaps": False,
                    "hovertemplate": "<b>%{y}</b><br>step %{x}: 10<sup>%{z:.2f}</sup><extra></extra>",
                },
                *([trace(found, [label[mark.row] for mark in found])] if found else []),
            ],
            "layout": layout(
                axis("step", showgrid=False, range=_ends([row["step"] for row in rows], [mark.step for mark in found])),
                axis(
                    type="category",
                    autorange="reversed",
                    showgrid=False,
                    categoryorder="array",
                    categoryarray=shown,
                    tickmode="array",
                    tickvals=shown[::every],
                    ticktext=shown[::every],
                ),
                plot_bgcolor="var(--hole)",
                coloraxis={
                    "cmin": low,
                    "cmax": high,
                    "colorscale": heat(*(f"var(--heat-{i})" for i in range(1, 8))),
                    "colorbar": {
                        "orientation": "h",
                        "x": 0,
                        "xanchor": "left",
                        "xpad": 0,
                        "y": 1,
                        "yanchor": "bottom",
                        "ypad": 6,
                        "len": 0.5,
                        "thickness": 10,
                        "outlinewidth": 0,
                        "tickangle": 0,
                        "tickvals": powers,
                        "ticktext": [f"10<sup>{power}</sup>" for power in powers],
                    },
                },
            ),
            "chooses": "layer",  # the chart that a click on a row turns to that layer
            "narrow": {
                "yaxis": {"ticktext": brief[::every]},
                "coloraxis": {"colorbar": {"len": 1}},
                "font": {"size": 11},
            },
        },
        130 + min(900, max(160, 22 * len(shown))),
        wide=True,
    )


def _ends(steps: Sequence[int], marked: Sequence[int]) -> list[float]:
    """The ends of the axis: the edges of the outer cells, which reach half-way to their neighbours, and every mark."""
    first, last = (steps[1] - steps[0], steps[-1] - steps[-2]) if len(steps) > 1 else (1, 1)
    return [min([steps[0] - first / 2, *marked]), max([steps[-1] + last / 2, *marked])]


def updates(rows: Sequence[Row]) -> Chart | None:
    """Update norm over weight norm against steps: layers faint, the median of a part of the network bold."""
    rows = thin([row for row in rows if row.get("layers")], MOMENTS)
    names = _names(rows)
    when = [row["step"] for row in rows]
    faint: list[Figure] = []
    bold: list[Figure] = []
    parts = list(dict.fromkeys(group(name) for name in names))
    for i, (part, title) in enumerate(zip(parts, labels(parts), strict=True)):
        members = [name for name in names if group(name) == part]
        ratio = np.array([[row["layers"].get(name, {}).get("update_ratio") for row in rows] for name in members], float)
        ratio[~(ratio > 0)] = np.nan  # neither zero nor no number has a place on a log axis
        if np.isnan(ratio).all():
            continue
        common = {"type": "scatter", "mode": "lines", "x": when, "legendgroup": str(i), "name": title}
        for name, values in zip(labels(members, 60), ratio, strict=True):
            faint.append(
                {
                    **common,
                    "y": digits(values),
                    "showlegend": False,
                    "opacity": 0.35,
                    "line": {"color": SERIES[i % 6], "width": 1},
                    "hovertemplate": f"<b>{_literal(name)}</b><br>step %{{x}}: %{{y:.2e}}<extra></extra>",
                }
            )
        seen = ~np.isnan(ratio).all(axis=0)
        median = np.full(len(when), np.nan)
        median[seen] = np.nanmedian(ratio[:, seen], axis=0)
        bold.append(
            {
                **common,
                "y": digits(median),
                "line": {"color": SERIES[i % 6], "width": 2.5, "dash": DASHES[i % 4]},
                "hovertemplate": "<b>%{fullData.name}</b>, median<br>step %{x}: %{y:.2e}<extra></extra>",
            }
        )
    if not bold:
        return None
    vertical = scale([value for trace in faint for value in trace["y"]])
    ends = [next(value for value in reversed(trace["y"]) if value is not None) for trace in bold]
    each = "; ".join(f"{part} ends at {end:.1e}" for part, end in zip(parts, ends, strict=False))
    return Chart(
        "updates",
        "Size of the update relative to the weight" + (", log scale" if vertical["type"] == "log" else ""),
        f"Line chart of {len(faint)} layers against steps. Medians of the parts of the network: {each}.",
        {"data": faint + bold, "layout": layout(axis("step"), axis(**vertical), showlegend=True)},
        400,
    )


def _literal(text: str) -> str:
    """Braces after a percent sign are plotly's, not the name's."""
    return text.replace("%{", "%&#123;")


def steps(rows: Sequence[Row]) -> Chart | None:
    """Damping, step size, momentum and trust ratio, one panel each; crosses are rejected steps."""
    panels = [(key, title) for key, title in DECISIONS if present(rows, key)]
    if not panels:
        return None
    share = 1 / len(panels)
    gap = 34 / (150 * len(panels))
    data: list[Figure] = []
    more: dict[str, Any] = {}
    notes: list[Figure] = []
    said: list[str] = []
    for i, (key, title) in enumerate(panels):
        suffix = str(i + 1) if i else ""
        seen = thin(present(rows, key), 1000)
        values = [row[key] for row in seen]
        vertical = _robust(values) if key == "trust_ratio" else scale(values)
        top = 1 - i * share
        data.append(
            {
                "type": "scatter",
                "mode": "lines" if len(seen) > 1 else "markers",
                "name": title,
                "x": [row["step"] for row in seen],
                "y": values,
                "yaxis": f"y{suffix}",
                "line": {"color": SERIES[i], "width": 1.75},
                "hovertemplate": f"step %{{x}}<br>{title} %{{y:.3g}}<extra></extra>",
            }
        )
        more[f"yaxis{suffix}"] = axis(domain=[top - share + gap / 2, top - gap], nticks=4, **vertical)
        log = ", log scale" if vertical.get("type") == "log" else ""
        notes.append(
            {
                "text": f"<b>{title}</b>{log}",
                "x": 0,
                "xref": "paper",
                "xanchor": "left",
                "y": top - gap,
                "yref": "paper",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"color": "var(--ink)"},
            }
        )
        said.append(f"{title} from {values[0]:.3g} to {values[-1]:.3g}")
    rejected = _rejected(rows)
    first = panels[0][0]
    crosses = [row for row in rejected if row.get(first) is not None]
    if crosses:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "rejected",
                "x": [row["step"] for row in crosses],
                "y": [row[first] for row in crosses],
                "marker": {"symbol": "x", "size": 9, "color": SERIES[1]},
                "hovertemplate": "step %{x}: rejected (%{customdata} in all)<extra></extra>",
                "customdata": [row["rejections"] for row in crosses],
            }
        )
    last = f"y{len(panels)}" if len(panels) > 1 else "y"
    figure = layout(
        axis("step", anchor=last, range=[rows[0]["step"], rows[-1]["step"]]),
        more.pop("yaxis"),
        **more,
        showlegend=False,
        annotations=notes,
    )
    return Chart(
        "steps",
        "The optimiser's own decisions",
        f"Line charts against steps: {'; '.join(said)}; {len(rejected)} records show rejected steps.",
        {"data": data, "layout": figure},
        60 + 150 * len(panels),
    )


def _rejected(rows: Sequence[Row]) -> list[Row]:
    """The rows at which the running count of rejections has grown."""
    found, count = [], 0
    for row in present(rows, "rejections"):
        if row["rejections"] > count:
            found.append(row)
        count = row["rejections"]
    return found


def _robust(values: Sequence[float]) -> Figure:
    """A linear axis around 1, where the model and the loss agree: single ratios may be anything."""
    low, high = (float(q) for q in np.quantile(values, (0.02, 0.98)))
    low, high = max(-2.0, min(0.0, low)), min(4.0, max(1.2, high))
    return {"type": "linear", "range": [low - 0.1, high + 0.1]}
