"""What all charts of the report share: the figure, its axes, its colours and the names on it.

A figure is a plain dictionary, as plotly.js takes it, with liberties that the page's script resolves in
the browser. A colour is a reference to the page's style sheet (``"var(--series-1)"``), so that one palette
serves light, dark and paper. And ``"narrow"`` holds what a phone needs to have different in the layout. A figure that
shows one of several things at a time has ``"choices"`` (see :mod:`hesse.report.layer_curves`).

Names of layers, classes and modalities come from people's data. Plotly reads its texts as a small HTML, so
each passes through :func:`labels` on its way into a figure.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DASHES",
    "SERIES",
    "SYMBOLS",
    "Chart",
    "Figure",
    "Row",
    "axis",
    "clock",
    "digits",
    "heat",
    "labels",
    "layout",
    "line",
    "percent",
    "present",
    "rounded",
    "scale",
    "thin",
]

Row = Mapping[str, Any]
Figure = dict[str, Any]

SERIES = tuple(f"var(--series-{i})" for i in range(1, 7))
# Lines are told apart without colour, too.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure of the page.

    Args:
        name: its id in the page.
        title: what is drawn, with the unit.
        alt: what it shows, in words.
        figure: ``data``, ``layout`` and, if a phone needs changes to the layout, ``narrow``.
        height: in pixels.
        wide: whether it takes the width of the page, also beside others.
    """

    name: str
    title: str
    alt: str
    figure: Figure
    height: int = 320
    wide: bool = False


def labels(names: Sequence[str], width: int = 40) -> list[str]:
    """Names fit for plotly: short, distinct, on one line and escaped.

    A long name loses its middle, because paths of modules differ at both ends.

    Example:
        >>> labels(["<b>", "encoders.left_eye.conv", "encoders.left_leg.conv", "encoders.his_eye.conv"], 14)
        ['&lt;b&gt;', 'encode…ye.conv', 'encode…eg.conv', 'encode…ye.conv (2)']
    """
    distinct: dict[str, None] = {}
    for name in names:
        text = " ".join(name.split()) or "(empty)"
        if len(text) > width:
            text = f"{text[: (width - 1) // 2]}…{text[-(width - 1 - (width - 1) // 2) :]}"
        candidate, count = text, 1
        while candidate in distinct:
            count += 1
            candidate = f"{text} ({count})"
        distinct[candidate] = None
    return [html.escape(text, quote=False) for text in distinct]


def percent(share: float) -> str:
    """``0.9137`` as ``91.4%``."""
    return f"{100 * share:.1f}%"


def axis(title: str = "", **more: Any) -> Figure:
    """An axis in the page's colours."""
    return {
        "title": {"text": title, "standoff": 10, "font": {"size": 13}},
        "gridcolor": "var(--grid)",
        "linecolor": "var(--rule)",
        "zeroline": False,
        "automargin": True,
        "exponentformat": "SI",
        **more,
    }


def layout(x: Figure, y: Figure, **more: Any) -> Figure:
    """A layout without title and background: both are the page's."""
    return {
        "xaxis": x,
        "yaxis": y,
        "font": {"family": "var(--sans)", "size": 13, "color": "var(--muted)"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "hoverlabel": {
            "bgcolor": "var(--card)",
            "bordercolor": "var(--rule)",
            "font": {"family": "var(--sans)", "color": "var(--ink)"},
            "align": "left",
            "namelength": -1,
        },
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "font": {"color": "var(--ink)"},
        },
        "hovermode": "closest",
        **more,
    }


def heat(*low_to_high: str) -> list[list[Any]]:
    """A colour scale through the given colours."""
    return [[i / (len(low_to_high) - 1), colour] for i, colour in enumerate(low_to_high)]


def scale(values: Sequence[float | None]) -> Figure:
    """A logarithmic axis where all values allow it and span a decade, a linear one elsewhere."""
    known = [value for value in values if value is not None]
    if known and min(known) > 0 and max(known) > 10 * min(known):
        decades = math.log10(max(known) / min(known))
        return {"type": "log", "tickformat": "~g", "dtick": "D2" if decades < 2 else math.ceil(decades / 5)}
    return {"type": "linear"}


def clock(seconds: float) -> tuple[float, str]:
    """How many seconds one unit of the time axis has, and its name."""
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds > 4 * size:
            return size, name
    return 1.0, "seconds"


def present(rows: Sequence[Row], *keys: str) -> list[Row]:
    """The rows that have a value for every key."""
    return [row for row in rows if all(row.get(key) is not None for key in keys)]


def thin(rows: Sequence[Row], limit: int) -> list[Row]:
    """At most ``limit`` rows, evenly spaced, first and last among them."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, limit).round().astype(int)]


def rounded(values: NDArray[np.float64]) -> list[Any]:
    """Nested lists of four digits, None where there is no number: a page is read, not computed with."""
    return [[round(value, 4) if math.isfinite(value) else None for value in row] for row in values.tolist()]


def digits(values: NDArray[np.float64]) -> list[float | None]:
    """Four significant digits, None where there is no number."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]


def line(direction: str, at: float, colour: str, dash: str = "dash", **more: Any) -> Figure:
    """A line across the whole chart at one value of its axis ``direction``."""
    other = "y" if direction == "x" else "x"
    return {
        "type": "line",
        f"{direction}0": at,
        f"{direction}1": at,
        f"{direction}ref": direction,
        f"{other}0": 0,
        f"{other}1": 1,
        f"{other}ref": "paper",
        "line": {"color": colour, "width": 1.5, "dash": dash},
        **more,
    }
