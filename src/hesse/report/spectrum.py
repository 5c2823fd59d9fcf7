"""The page of ``hesse spectrum``: how a trained run's loss curves, how the curvature is spread, and whose it is.

Curvatures of one matrix differ by powers of ten, and some are negative. So the axis of the density is ``asinh(x / s)``:
linear near zero and logarithmic far from it. On it each node of the quadrature becomes a bell as high as the number of
eigenvalues that it stands for. Where the curve is 1 high, there is a single eigenvalue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hesse.files import write_text
from hesse.report.figure import SERIES, Chart, Figure, axis, digits, labels, layout, percent
from hesse.report.page import render
from hesse.report.records import optimizer_label, read_spectrum

__all__ = ["build_spectrum", "measured", "short"]

LINEAR = 0.01  # of the largest eigenvalue: up to here the axis of the density is about linear
WIDTH = 0.1  # of a bell on that axis, where a power of ten is 2.3 long
LOWEST = 0.2  # eigenvalues, at the foot of the density

Found = Mapping[str, Any]


def build_spectrum(folder: Path) -> Path:
    """Write ``spectrum.html`` beside a ``spectrum.json``, from that record alone.

    Returns:
        The path of the page: one file that opens without network, in light and dark, on screens and on paper.

    Raises:
        InputError: there is no such record, or it is damaged.
    """
    record = read_spectrum(Path(folder))
    matrices = [("Gauss-Newton", record["gauss_newton"]), ("Hessian", record["hessian"])]
    found = [pair for _, matrix in matrices for pair in (*matrix["eigenvalues"], matrix["trace"])]
    found += [record["hessian"]["lowest"], *(block[key] for block in record["blocks"] for key in ("trace", "largest"))]
    bars = _bars(record["blocks"])
    curve = density(matrices, record["parameters"])
    text = render(
        "spectrum.html.j2",
        [*bars, curve],
        record=record,
        optimizer=optimizer_label(record),
        bars=bars,
        density=curve,
        matrices=matrices,
        measured=measured,
        short=short,
        incomplete=not all(one["converged"] for one in found),
    )
    path = Path(folder) / "spectrum.html"
    write_text(path, text)
    return path


def measured(found: Found) -> str:
    """A number and its error, with as many digits as the error leaves, four at the most; a star if not converged.

    Example:
        >>> [measured({"value": x, "error": e, "converged": True}) for x, e in ((57.9213, 1e-4), (612.34, 18.2))]
        ['57.92', '612 ± 18']
        >>> measured({"value": -3.25e-7, "error": 4e-9, "converged": False})
        '(-3.250 ± 0.040)e-07 *'
    """
    value, error = found["value"], found["error"]
    size = max(abs(value), error)
    power = math.floor(math.log10(size)) if size else 0
    if size == 0:
        text = "0"
    elif -4 < power < 6:
        text = _rounded(value, error, 3 - power)
    else:
        text = _rounded(value / 10.0**power, error / 10.0**power, 3)
        text = f"({text})e{power:+03d}" if "±" in text else f"{text}e{power:+03d}"
    return text if found["converged"] else f"{text} *"


def _rounded(value: float, error: float, places: int) -> str:
    """``value`` to so many decimal places, or to the two digits of the error that count."""
    if error < 0.5 * 10.0**-places:
        return f"{round(value, places):,.{max(places, 0)}f}"
    places = min(places, 1 - math.floor(math.log10(error)))
    return " ± ".join(f"{round(x, places):,.{max(places, 0)}f}" for x in (value, error))


def short(value: float | None) -> str:
    """Three digits, or a dash."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == 0 or abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _bars(blocks: Sequence[Found]) -> list[Chart]:
    return [
        bar_chart(
            "shares", "Share of the trace", blocks, [block["share"] for block in blocks], percent, tickformat=".0%"
        ),
        bar_chart("largest", "Largest eigenvalue", blocks, [block["largest"]["value"] for block in blocks], short),
    ]


def bar_chart(
    name: str, title: str, blocks: Sequence[Found], values: Sequence[float | None], say: Any, **more: Any
) -> Chart:
    """One number of each block as bars."""
    names = labels([block["name"] for block in blocks], 32)
    texts = ["" if value is None else say(value) for value in values]
    each = "; ".join(f"{block['name']}: {text or 'none'}" for block, text in zip(blocks, texts, strict=True))
    return Chart(
        name,
        title,
        f"Bar chart. {title} of each block of the Gauss-Newton matrix. {each}.",
        {
            "data": [
                {
                    "type": "bar",
                    "orientation": "h",
                    "y": names,
                    "x": list(values),
                    "text": texts,
                    "textposition": "auto",
                    "insidetextanchor": "end",
                    "insidetextfont": {"color": "var(--page)"},
                    "marker": {"color": ["var(--muted)" if b["kind"] == "head" else SERIES[0] for b in blocks]},
                    "hovertemplate": "<b>%{y}</b>: %{text}<extra></extra>",
                }
            ],
            "layout": layout(
                axis(rangemode="tozero", **more),
                axis(type="category", autorange="reversed", showgrid=False),
                bargap=0.35,
                showlegend=False,
            ),
            "narrow": {
                "yaxis": {
                    "tickmode": "array",
                    "tickvals": names,
                    "ticktext": labels([block["name"] for block in blocks], 18),
                },
                "font": {"size": 11},
            },
        },
        70 + 44 * len(blocks),
    )


def density(matrices: Sequence[tuple[str, Found]], n: int) -> Chart:
    """How many of the n eigenvalues of each matrix lie where, with those that are known one by one."""
    nodes = [np.array(matrix["density"]["nodes"], float) for _, matrix in matrices]
    largest = max(float(np.abs(x).max()) for x in nodes) or 1.0
    unit = LINEAR * largest
    ends = np.arcsinh([min(float(x.min()) for x in nodes) / unit, max(float(x.max()) for x in nodes) / unit])
    grid = np.linspace(min(ends[0], 0.0) - 4 * WIDTH, ends[1] + 4 * WIDTH, 400)
    data: list[Figure] = []
    for i, (title, matrix) in enumerate(matrices):
        count = n * bells(np.arcsinh(nodes[i] / unit), np.array(matrix["density"]["weights"], float), grid)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": title,
                "legendgroup": str(i),
                "x": digits(grid),
                "y": digits(np.maximum(count, LOWEST / 10)),
                "customdata": digits(unit * np.sinh(grid)),
                "line": {"color": SERIES[i], "width": 2, "dash": ("solid", "dot")[i]},
                "hovertemplate": "<b>%{fullData.name}</b><br>about %{y:.3g} near %{customdata:.3g}<extra></extra>",
            }
        )
        known = [pair["value"] for pair in (*matrix["eigenvalues"], *filter(None, [matrix.get("lowest")]))]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{title}, one by one",
                "legendgroup": str(i),
                "showlegend": False,
                "x": digits(np.arcsinh(np.array(known) / unit)),
                "y": [1.0] * len(known),
                "customdata": digits(np.array(known)),
                "marker": {"color": SERIES[i], "symbol": ("circle-open", "x-thin-open")[i], "size": 10},
                "hovertemplate": f"<b>{title}</b><br>%{{customdata:.4g}}<extra></extra>",
            }
        )
    ticks = _ticks(unit, float(unit * np.sinh(grid[0])), largest)
    decades = [tick for tick in ticks if tick == 0 or f"{abs(tick):e}"[0] == "1"]
    low, high = (unit * math.sinh(end) for end in ends)
    return Chart(
        "density",
        "How many eigenvalues lie where, both axes logarithmic",
        f"Line chart of the number of eigenvalues against their value, from {low:.3g} to {high:.3g}. "
        f"Most of the {n:,} are near zero.",
        {
            "data": data,
            "layout": layout(
                axis("eigenvalue", **_at(ticks, unit), range=[float(grid[0]), float(grid[-1])]),
                axis(
                    "eigenvalues",
                    type="log",
                    tickformat="~s",
                    dtick=1,
                    range=[math.log10(LOWEST), math.log10(2 * n)],
                ),
                showlegend=True,
            ),
            "narrow": {"xaxis": _at(decades, unit), "font": {"size": 11}},
        },
        400,
    )


def bells(places: NDArray[np.float64], weights: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over nodes [runs, m] of their weight, spread as a bell of height 1; the mean over the runs, at ``grid``.

    Example:
        >>> bells(np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[0.25, 0.75], [0.75, 0.25]]), np.array([0.0, 1.0]))
        array([0.5, 0.5])
    """
    spread = np.exp(-0.5 * ((grid[:, None, None] - places) / WIDTH) ** 2)
    return (spread * weights).sum(axis=2).mean(axis=1)


def _ticks(unit: float, low: float, high: float) -> list[float]:
    """Zero and 1, 2, 5 times powers of ten on both sides, where the axis has room for them."""
    powers = range(math.ceil(math.log10(unit)), math.floor(math.log10(high)) + 1)
    positive = [mantissa * 10.0**power for power in powers for mantissa in (1, 2, 5)]
    return sorted([-x for x in positive if -x >= low] + [0.0] + [x for x in positive if x <= high])


def _at(ticks: Sequence[float], unit: float) -> Figure:
    return {
        "tickmode": "array",
        "tickvals": [math.asinh(tick / unit) for tick in ticks],
        "ticktext": [f"{tick:g}".replace("-", "−") for tick in ticks],
    }
