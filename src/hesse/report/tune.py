"""The page of ``hesse tune``: what a search found, what it cost, and K-FAC beside it, which was not searched for.

A search buys a better loss with the time of many trainings. So its history is drawn twice, by trial and by the seconds
of training that all trials took together; in the second, K-FAC is one point, with the time of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from hesse.files import write_text
from hesse.report.figure import SERIES, Chart, Figure, Row, axis, clock, labels, layout, line, scale
from hesse.report.numbers import score_name, value
from hesse.report.page import render
from hesse.report.records import OPTIMIZERS, read_tune

__all__ = ["build_tune"]

# Trials of a state: what they are called, and their marker. Only those that are complete have a value; the others
# stand on the upper edge of a chart.
STATES = (
    ("complete", "complete", {"symbol": "circle", "color": SERIES[0]}),
    (
        "pruned",
        "pruned: stopped early",
        {"symbol": "x-thin", "color": "var(--muted)", "line": {"color": "var(--muted)", "width": 1.5}},
    ),
    ("failed", "failed", {"symbol": "triangle-down", "color": "var(--error)"}),
)
EDGE: Figure = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
KFAC: Figure = {"symbol": "diamond", "size": 12, "color": SERIES[1]}


def build_tune(folder: Path) -> Path:
    """Write ``tune.html`` beside a ``tune.json``, from that record alone; also of a search under way.

    Returns:
        The path of the page: one file that opens without network, in light and dark, on screens and on paper.

    Raises:
        InputError: there is no such record, or it is damaged.
    """
    record = read_tune(Path(folder))
    trials = record["trials"]
    history = [chart for chart in (_by_trial(record), _by_seconds(record)) if chart is not None]
    each = [chart for i, name in enumerate(record["space"]) if (chart := _parameter(record, name, i)) is not None]
    shown = sorted(trials, key=lambda trial: (_rank(trial), trial["number"]))
    text = render(
        "tune.html.j2",
        [*history, *each],
        record=record,
        optimizer=_label(record["optimizer"]),
        kfac=record.get("kfac"),
        best=record.get("best"),
        history=history,
        each=each,
        trials=shown,
        counts={state: sum(trial["state"] == state for trial in trials) for state, _, _ in STATES},
        what=score_name(record.get("score") or "score"),
        score=record.get("score") or "",
        objective=record["objective"],
        part=record.get("part") or "test",
        setting=_setting,
    )
    path = Path(folder) / "tune.html"
    write_text(path, text)
    return path


def _label(optimizer: str) -> str:
    return OPTIMIZERS.get(optimizer, optimizer)


def _rank(trial: Mapping[str, Any]) -> tuple[bool, bool, float]:
    """The best first; what was pruned behind what was completed, what has no value at the end."""
    known = trial.get("value")
    return trial["state"] != "complete", known is None, 0.0 if known is None else known


def _setting(given: Any) -> str:
    """A setting that was tried."""
    return f"{given:.3g}" if isinstance(given, float) else str(given)


def _vertical(record: Mapping[str, Any]) -> Figure:
    """The axis of the objective, the same in all charts of trials."""
    beside = record.get("kfac") or {}
    return scale([*(trial["value"] for trial in record["trials"]), beside.get("value")])


def _by_trial(record: Mapping[str, Any]) -> Chart | None:
    """Every trial, the best so far, and K-FAC as a line."""
    trials = [trial for trial in record["trials"] if trial.get("value") is not None]
    if not trials:
        return None
    objective = record["objective"]
    best = [trial for trial in record["trials"] if trial.get("best_so_far") is not None]
    data = _marks(record["trials"], lambda trial: trial["number"])
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": [trial["number"] for trial in best],
            "y": [trial["best_so_far"] for trial in best],
            "line": {"color": SERIES[2], "width": 2, "shape": "hv"},
            "hovertemplate": "best up to trial %{x}: %{y:.4g}<extra></extra>",
        }
    )
    beside = record.get("kfac") or {}
    lines = []
    if beside.get("value") is not None:
        name = f"K-FAC without a search {value(beside['value'])}"
        lines = [line("y", beside["value"], KFAC["color"], showlegend=True, name=name)]
    vertical = _vertical(record)
    end = f" The best so far ends at {best[-1]['best_so_far']:.4g}." if best else ""
    return Chart(
        "history",
        f"{objective.capitalize()} of each trial" + (", log scale" if vertical["type"] == "log" else ""),
        f"Scatter plot of {len(trials)} trials with a value, of {len(record['trials'])}.{end}"
        + (f" K-FAC without a search: {beside['value']:.4g}." if lines else ""),
        {
            "data": data,
            "layout": layout(axis("trial"), axis(**vertical), yaxis2=EDGE, showlegend=True, shapes=lines),
        },
        380,
    )


def _by_seconds(record: Mapping[str, Any]) -> Chart | None:
    """The best so far against the seconds that all trials up to it trained; K-FAC is a point."""
    spent = list(accumulate(trial.get("seconds") or 0.0 for trial in record["trials"]))
    best = [
        (at, trial) for at, trial in zip(spent, record["trials"], strict=True) if trial.get("best_so_far") is not None
    ]
    if not best:
        return None
    beside = record.get("kfac") or {}
    size, unit = clock(max(spent[-1], beside.get("seconds") or 0.0))
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(best) < 30 else "lines",
            "name": f"{_label(record['optimizer'])}, best so far",
            "x": [at / size for at, _ in best],
            "y": [trial["best_so_far"] for _, trial in best],
            "customdata": [trial["number"] for _, trial in best],
            "line": {"color": SERIES[2], "width": 2, "shape": "hv"},
            "marker": {"size": 5},
            "hovertemplate": f"after trial %{{customdata}}, %{{x:.3g}} {unit}: %{{y:.4g}}<extra></extra>",
        }
    ]
    said = ""
    if beside.get("value") is not None and beside.get("seconds") is not None:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "K-FAC without a search",
                "x": [beside["seconds"] / size],
                "y": [beside["value"]],
                "marker": KFAC,
                "hovertemplate": f"K-FAC, %{{x:.3g}} {unit}: %{{y:.4g}}<extra></extra>",
            }
        )
        said = f" K-FAC without a search reaches {beside['value']:.4g} in {beside['seconds']:.3g} seconds."
    values = [y for trace in data for y in trace["y"]]
    vertical = scale(values)
    return Chart(
        "cost",
        f"Best {record['objective']} so far against training time"
        + (", log scale" if vertical["type"] == "log" else ""),
        f"Line chart from {values[0]:.4g} to {best[-1][1]['best_so_far']:.4g} in {spent[-1]:.3g} seconds.{said}",
        {
            "data": data,
            "layout": layout(
                axis(f"{unit} of training, all trials together", rangemode="tozero"), axis(**vertical), showlegend=True
            ),
        },
        380,
    )


def _parameter(record: Mapping[str, Any], name: str, number: int) -> Chart | None:
    """The objective against one parameter of the search."""
    trials = [trial for trial in record["trials"] if name in trial["params"]]
    if all(trial["value"] is None for trial in trials):
        return None
    choice = record["space"][name]["kind"] == "choice"
    log = record["space"][name]["kind"] == "log"
    shown = labels([name])[0]
    if choice:
        given = list(dict.fromkeys(str(one) for one in record["space"][name]["values"]))
        title = dict(zip(given, labels(given, 24), strict=True))
        across = axis(shown, type="category", categoryorder="array", categoryarray=list(title.values()))
        data = _marks(trials, lambda trial: title.get(str(trial["params"][name]), str(trial["params"][name])))
    else:
        across = _across(shown, record["space"][name])
        data = _marks(trials, lambda trial: trial["params"][name])
    best = record.get("best")
    said = ""
    if best and name in best["params"]:
        at = best["params"][name]
        said = f" The best trial has {_setting(at)}."
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "best",
                "x": [title.get(str(at), str(at)) if choice else at],
                "y": [best["value"]],
                "marker": {"symbol": "circle-open", "size": 16, "color": SERIES[2], "line": {"width": 2.5}},
                "hoverinfo": "skip",
            }
        )
    return Chart(
        f"parameter-{number}",
        name + (", log scale" if log else ""),
        f"Scatter plot of {record['objective']} against {name}, {len(trials)} trials.{said}",
        {
            "data": data,
            "layout": layout(
                across, axis(record["objective"], **_vertical(record)), yaxis2=EDGE, showlegend=number == 0
            ),
        },
        320,
    )


def _across(title: str, space: Mapping[str, Any]) -> Figure:
    """The axis of a quantity, as far as the search may go: a best trial at its end says that it should go further."""
    low, high = float(space["low"]), float(space["high"])
    if space["kind"] != "log":
        return axis(title, range=_padded(low, high))
    ends = _padded(math.log10(low), math.log10(high))
    return axis(title, type="log", range=ends, exponentformat="power", dtick=1 if high > 100 * low else "D2")


def _padded(low: float, high: float) -> list[float]:
    return [low - 0.04 * (high - low), high + 0.04 * (high - low)]


def _marks(trials: Sequence[Row], across: Callable[[Row], Any]) -> list[Figure]:
    """One trace a state, its trials at ``across(trial)``."""
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": title,
            "x": [across(trial) for trial in group],
            "y": [0.97 if trial["value"] is None else trial["value"] for trial in group],
            "yaxis": "y" if state == "complete" else "y2",
            "customdata": [trial["number"] for trial in group],
            "marker": {"size": 8, **marker},
            "hovertemplate": "trial %{customdata}"
            + (": %{y:.4g}" if state == "complete" else f", {title}")
            + "<extra></extra>",
        }
        for state, title, marker in STATES
        for group in ([trial for trial in trials if trial["state"] == state],)
        if group
    ]
