"""What each modality brings, as charts: to the score, over the epochs, and class by class.

Each function takes numbers of the run's evaluation and returns a :class:`~hesse.report.figure.Chart`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hesse.report.figure import DASHES, SERIES, SYMBOLS, Chart, Figure, axis, heat, labels, layout, line, rounded
from hesse.report.numbers import is_share, plotly_format, score_name, signed, value

__all__ = ["by_class", "masked", "parts", "speed"]

ANNOTATED = 20  # classes up to which a number fits into its cell
CLASSES = 60  # rows of the heat map; of more, those for which the modalities matter most


def masked(
    rows: Sequence[tuple[str, float | None, float | None]], name: str, full: float, baseline: float | None
) -> Chart:
    """Score of each modality (label, alone, without) as bars, with the score of all together as a line."""
    names = labels([row[0] for row in rows], 32)
    what, form = score_name(name), plotly_format(name)
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
    lines = [line("x", full, "var(--ink)", showlegend=True, name=f"all together {value(full, name)}")]
    if baseline is not None:
        text = f"baseline {value(baseline, name)}"
        lines.append(line("x", baseline, "var(--muted)", "dot", showlegend=True, name=text))
    each = "; ".join(
        f"{row[0]}: "
        + ", ".join(
            f"{how} {value(number, name)}"
            for how, number in (("alone", row[1]), ("without it", row[2]))
            if number is not None
        )
        for row in rows
    )
    return Chart(
        "modalities",
        f"{what[0].upper()}{what[1:]} by modality",
        f"Bar chart. All together {value(full, name)}. {each}.",
        {
            "data": data,
            "layout": layout(
                _score_axis(name),
                axis(type="category", autorange="reversed", showgrid=False),
                barmode="group",
                bargap=0.3,
                bargroupgap=0.08,
                showlegend=True,
                shapes=lines,
            ),
            "narrow": _narrow([row[0] for row in rows], names),
        },
        150 + 74 * len(rows),
    )


def parts(rows: Sequence[tuple[str, float]], name: str, full: float, nothing: float) -> Chart:
    """Shapley values (label, value) as steps that lead from the score of no modality to that of all."""
    rows = sorted(rows, key=lambda row: -row[1])
    ends = [("no modality", nothing), ("all together", full)]
    titles = labels([ends[0][0], *(row[0] for row in rows), ends[1][0]], 32)
    at = nothing + np.cumsum([0.0, *(row[1] for row in rows)])
    low, high = float(min(0.0, full, *at)), float(max(0.0, full, *at))
    gain = [row[1] >= 0 for row in rows]
    form = plotly_format(name)
    data: list[Figure] = [
        {
            "type": "bar",
            "orientation": "h",
            "y": [titles[0], titles[-1]],
            "x": [nothing, full],
            "text": [value(nothing, name), value(full, name)],
            "textposition": "auto",
            "insidetextanchor": "end",
            "insidetextfont": {"color": "var(--page)"},
            "marker": {"color": "var(--muted)"},
            "hovertemplate": f"<b>%{{y}}</b>: %{{x:{form}}}<extra></extra>",
        },
        {
            "type": "bar",
            "orientation": "h",
            "y": titles[1:-1],
            "base": [round(float(start), 6) for start in at[:-1]],
            "x": [row[1] for row in rows],
            "text": [signed(row[1], name) for row in rows],
            "textposition": "auto",
            "insidetextfont": {"color": "var(--page)"},
            "marker": {"color": [SERIES[0] if up else SERIES[1] for up in gain]},
            "hovertemplate": "<b>%{y}</b> adds %{text}<extra></extra>",
        },
    ]
    each = "; ".join(f"{row[0]} {signed(row[1], name)}" for row in rows)
    return Chart(
        "parts",
        f"What the {score_name(name)} is made of (Shapley values)",
        f"Bar chart of steps from {value(nothing, name)} with no modality to {value(full, name)} with all: {each}.",
        {
            "data": data,
            "layout": layout(
                _score_axis(name, range=_roomy(low, high, 0.4)),
                axis(
                    type="category",
                    autorange="reversed",
                    showgrid=False,
                    categoryorder="array",
                    categoryarray=titles,
                ),
                barmode="overlay",
                bargap=0.35,
                showlegend=False,
            ),
            "narrow": _narrow([ends[0][0], *(row[0] for row in rows), ends[1][0]], titles)
            | {"xaxis": {"range": _roomy(low, high, 0.5)}},
        },
        150 + 40 * len(titles),
    )


def speed(rows: Sequence[tuple[str, Sequence[float | None]]]) -> Chart | None:
    """How far a step moved the weights of each encoder (label, one number an epoch), relative to their norm."""
    shown = [(title, values) for title, values in rows if any(number is not None for number in values)]
    if not shown:
        return None
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": title,
            "x": list(range(1, len(values) + 1)),
            "y": list(values),
            "connectgaps": True,  # an epoch of which no step was sampled
            "line": {"color": SERIES[i % 6], "width": 2, "dash": DASHES[i // 6 % 4]},
            "marker": {"symbol": SYMBOLS[i % 6], "size": 6},
            "hovertemplate": "<b>%{fullData.name}</b><br>epoch %{x}: %{y:.3g}<extra></extra>",
        }
        for i, (title, (_, values)) in enumerate(zip(labels([row[0] for row in shown], 32), shown, strict=True))
    ]
    epochs = max(len(values) for _, values in shown)
    across = axis("epoch", range=[0.5, epochs + 0.5], **({"dtick": 1} if epochs <= 10 else {}))
    ends = "; ".join(
        f"{title} from {known[0]:.3g} to {known[-1]:.3g}"
        for title, values in shown
        for known in ([number for number in values if number is not None],)
    )
    return Chart(
        "speed",
        "Learning speed: a step, relative to the encoder's weights",
        f"Line chart of the learning speed of {len(shown)} modalities over epochs: {ends}.",
        {"data": data, "layout": layout(across, axis(rangemode="tozero"), showlegend=True)},
        340,
    )


def by_class(rows: Sequence[tuple[str, Mapping[str, float | None]]]) -> Chart | None:
    """What each modality adds to the recall of each class (label, Shapley values): a row is a class."""
    classes = list(dict.fromkeys(label for _, values in rows for label in values))
    if not classes:
        return None
    parts = np.array([[values.get(label) for _, values in rows] for label in classes], float)
    known = np.isfinite(parts)
    if not known.any():
        return None
    of = len(classes)
    if of > CLASSES:
        matter = np.where(known, np.abs(parts), 0).max(axis=1)
        kept = np.sort(np.argsort(-matter, kind="stable")[:CLASSES])
        classes, parts, known = [classes[i] for i in kept], parts[kept], known[kept]
    most = float(np.abs(parts[known]).max()) or 1.0
    titles, names = labels([row[0] for row in rows], 18), labels(classes, 24)
    trace: Figure = {
        "type": "heatmap",
        "x": titles,
        "y": names,
        "z": rounded(parts),
        "zmin": -most,
        "zmax": most,
        "colorscale": heat("var(--series-2)", "var(--page)", "var(--matrix-3)"),
        "showscale": False,
        "hoverongaps": False,
        "xgap": 1.5,
        "ygap": 1.5 if len(classes) <= ANNOTATED else 0,
        "hovertemplate": "rows of <b>%{y}</b><br><b>%{x}</b> adds %{z:+.1%}<extra></extra>",
    }
    if len(classes) <= ANNOTATED:
        trace["texttemplate"] = "%{z:+.0%}"
    common: Figure = {"type": "category", "showgrid": False, "ticks": ""}
    top = [titles[int(np.nanargmax(row))] for row, any_ in zip(parts, known.any(axis=1), strict=True) if any_]
    leads = "; ".join(f"{title} most in {top.count(title)}" for title in dict.fromkeys(top))
    return Chart(
        "shapley-classes",
        "What each adds to the recall of a class"
        + (f": the {CLASSES} of {of:,} with the largest values" if of > CLASSES else ""),
        f"Heat map of Shapley values, {len(classes)} classes by {len(rows)} modalities. {leads} of the classes.",
        {
            "data": [trace],
            "layout": layout(axis(side="top", **common), axis(autorange="reversed", **common)),
            "narrow": {"font": {"size": 11}},
        },
        max(260, min(900, 70 + (30 if len(classes) <= ANNOTATED else 18) * len(classes))),
        wide=len(classes) > ANNOTATED,  # beside another chart, so tall a one would leave a hole
    )


def _score_axis(name: str, **more: Any) -> Figure:
    return axis(tickformat=".0%" if is_share(name) else ".2~f", **({"rangemode": "tozero"} | more))


def _roomy(low: float, high: float, share: float) -> list[float]:
    """A range with room for the number beside a bar that is too short for it."""
    room = share * (high - low)
    return [low - room * (low < 0), high + room]


def _narrow(names: Sequence[str], shown: Sequence[str]) -> Figure:
    """On a phone, shorter names."""
    return {
        "yaxis": {"tickmode": "array", "tickvals": list(shown), "ticktext": labels(names, 18)},
        "font": {"size": 11},
    }
