"""One layer at a time: what was recorded of it over the steps, with its findings.

The chart holds the curves of every layer and shows those of one. The page's script exchanges them when a row of the
heat map is clicked, or a name is chosen from the list above the chart, which the keyboard reaches too.

What is shown has no unit: gradient and update are shares of the weight, and most of the rest are shares of units or
of elements. Only the sizes of the signals are as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hesse.finding import Finding
from hesse.report.figure import DASHES, SERIES, Chart, Figure, Row, axis, digits, labels, layout, scale, thin
from hesse.report.marks import GRAVITY, WHOLE, Mark, called, marks, trace

__all__ = ["curves"]

MOMENTS = 300  # over time that are told apart on a screen
NUMBERS = 200_000  # in all that a page takes before it gets slow to open
GAP, TALL, STRIP = 34, 170, 34  # pixels: between panels, of a panel, of the strip of findings

# Panels: title, whether its axis is logarithmic, and for each curve its name and its key in the records.
PANELS: tuple[tuple[str, bool, tuple[tuple[str, str], ...]], ...] = (
    ("relative to the weight", True, (("gradient", "gradient"), ("update", "update_ratio"))),
    (
        "shares that are not always zero",
        False,
        (
            ("units that are dead", "dead"),
            ("elements saturated", "saturated"),
            ("gradient exactly zero", "grad_zero"),
            ("gradient below the number format", "grad_tiny"),
            ("weights held by rounding", "stuck"),
            ("units that are twins", "twins"),
            ("spread over the batch", "spread"),
            ("entropy of the attention", "entropy"),
        ),
    ),
    (
        "size of the signal",
        True,
        (("inputs", "in_rms"), ("outputs", "out_rms"), ("gradient at the outputs", "out_grad_rms")),
    ),
)


def curves(rows: Sequence[Row], findings: Sequence[Finding] = ()) -> Chart | None:
    """A chart of one layer's numbers against steps, and in ``figure["choices"]`` what makes it that of another.

    A choice is the layer's ``name``, its ``row`` as the heat map labels it, and what is to be exchanged: ``traces``,
    for each trace of the figure, and ``layout``. ``figure["chosen"]`` is the index of the one shown: the layer of the
    gravest finding, or the first.
    """
    rows = [row for row in rows if row.get("layers")]
    panels = [
        (title, log, [line for line in lines if any(_known(row, line[1], log) for row in rows)])
        for title, log, lines in PANELS
    ]
    panels = [panel for panel in panels if panel[2]]
    keys = [(key, log) for _, log, lines in panels for _, key in lines]
    names = [
        name
        for name in dict.fromkeys(name for row in rows for name in row["layers"])
        if any(_value(row["layers"].get(name, {}), key, log) is not None for row in rows for key, log in keys)
    ]
    if not names:
        return None
    found = marks(findings, names, called(rows))
    rows = thin(rows, max(40, min(MOMENTS, NUMBERS // (len(names) * len(keys)))))
    data, figure = _frame([row["step"] for row in rows], panels, [mark.step for mark in found])
    titles = labels(names, 40)
    choices = []
    for name, title in zip(names, titles, strict=True):
        values = [np.array([_value(row["layers"].get(name, {}), *key) for row in rows], float) for key in keys]
        for y, (_, log) in zip(values, keys, strict=True):
            if not log and not np.nan_to_num(y).any():
                y[:] = np.nan  # a share that stays zero says nothing, and many lie on top of each other
        exchanged: list[Figure] = [{"y": digits(y), "showlegend": bool(np.isfinite(y).any())} for y in values]
        if found:
            own = [mark for mark in found if mark.row in (name, WHOLE)]
            exchanged.append(trace(own, [0.5] * len(own)))
        choices.append({"name": name, "row": title, "traces": exchanged, "layout": _scales(panels, exchanged)})
    chosen = _gravest(found, names)
    first = choices[chosen]
    return Chart(
        "layer",
        "One layer's own curves",
        f"Line charts against steps of one of {len(names)} layers, chosen in the list above: "
        + "; ".join(f"{title}: {', '.join(name for name, _ in lines)}" for title, _, lines in panels)
        + ".",
        {
            "data": [{**old, **new} for old, new in zip(data, first["traces"], strict=True)],
            "layout": figure | {key: figure[key] | changes for key, changes in first["layout"].items()},
            "choices": choices,
            "chosen": chosen,
        },
        70 + (STRIP + GAP if found else 0) + (TALL + GAP) * len(panels),
        wide=True,
    )


def _value(seen: Mapping[str, Any], key: str, log: bool) -> float | None:
    """One number of a layer; on a logarithmic axis there is no place for zero."""
    if key == "gradient":
        grad, weight = seen.get("grad_norm"), seen.get("weight_norm")
        value = grad / weight if grad is not None and weight else None
    else:
        value = seen.get(key)
    return None if value is None or (log and not value > 0) else float(value)


def _known(row: Row, key: str, log: bool) -> bool:
    return any(_value(seen, key, log) is not None for seen in row["layers"].values())


def _gravest(found: Sequence[Mark], names: Sequence[str]) -> int:
    own = [mark for mark in found if mark.row in names]
    if not own:
        return 0
    return names.index(min(own, key=lambda mark: (GRAVITY.index(mark.severity), mark.step)).row)


def _scales(panels: Sequence[tuple[str, bool, Sequence[tuple[str, str]]]], traces: Sequence[Figure]) -> Figure:
    """The axis of each panel, for the values of one layer."""
    axes: Figure = {}
    start = 0
    for i, (_, log, lines) in enumerate(panels):
        values = [value for trace in traces[start : start + len(lines)] for value in trace["y"]]
        kind = {"dtick": None, "tickformat": None} | scale(values) if log else {}
        axes[f"yaxis{i + 1}" if i else "yaxis"] = kind | {"showticklabels": any(v is not None for v in values)}
        start += len(lines)
    return axes


def _frame(
    steps: Sequence[int], panels: Sequence[tuple[str, bool, Sequence[tuple[str, str]]]], marked: Sequence[int]
) -> tuple[list[Figure], Figure]:
    """The traces without their values, and the layout: panels below each other, over one axis of steps."""
    height = (STRIP + GAP if marked else 0) + (TALL + GAP) * len(panels)
    data: list[Figure] = []
    more: dict[str, Any] = {}
    notes: list[Figure] = []
    top = height
    if marked:
        more["yaxis9"] = axis(
            domain=[(top - GAP - STRIP) / height, (top - GAP) / height],
            range=[0, 1],
            showgrid=False,
            showticklabels=False,
            fixedrange=True,
        )
        notes.append(_note("findings", (top - GAP) / height))
        top -= STRIP + GAP
    for i, (title, log, lines) in enumerate(panels):
        suffix = str(i + 1) if i else ""
        domain = [(top - GAP - TALL) / height, (top - GAP) / height]
        more[f"yaxis{suffix}"] = axis(
            domain=domain, nticks=5, exponentformat="power", **({} if log else {"rangemode": "tozero"})
        )
        notes.append(_note(title, domain[1]))
        data += [
            {
                "type": "scatter",
                "mode": "lines+markers" if len(steps) < 30 else "lines",
                "name": name,
                "x": list(steps),
                "yaxis": f"y{suffix}",
                "line": {"color": SERIES[j % 6], "width": 1.75, "dash": DASHES[j // 6 % 4]},
                "hovertemplate": f"step %{{x}}<br>{name} %{{y:.3g}}<extra></extra>",
            }
            for j, (name, _) in enumerate(lines, len(data))
        ]
        top -= TALL + GAP
    last = f"y{len(panels)}" if len(panels) > 1 else "y"
    ends = [min(*steps, *marked, steps[0]), max(*steps, *marked, steps[0])]
    if marked:
        data.append({"yaxis": "y9"})
    return data, layout(
        axis("step", anchor=last, range=ends if ends[0] < ends[1] else None),
        more.pop("yaxis"),
        **more,
        showlegend=True,
        annotations=notes,
    )


def _note(text: str, at: float) -> Figure:
    return {
        "text": f"<b>{text}</b>",
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "y": at,
        "yref": "paper",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"color": "var(--ink)"},
    }
