"""Marks say where and when; the curves of a layer are its records, and no name becomes markup."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from report_records import layer_rows, make_run

pytest.importorskip("jinja2", reason="the report needs hesse[train]")
go = pytest.importorskip("plotly.graph_objects", reason="the report needs hesse[train]")

import numpy as np  # noqa: E402

from hesse.finding import Finding  # noqa: E402
from hesse.report import build, layer_curves, layers  # noqa: E402
from hesse.report.figure import Chart  # noqa: E402
from hesse.report.marks import WHOLE, marks, row_of  # noqa: E402

NAMES = ("stem", "body.0", "body.2", "head")
HOSTILE = "</script><b onmouseover=alert(1)>x</b> %{y} & $x$ 型 🦊"


def rows(names: tuple[str, ...] = NAMES, count: int = 40) -> list[dict[str, Any]]:
    return layer_rows(np.random.default_rng(0), count, names)


def finding(where: str, step: int | None = 5, severity: Any = "warning", **more: Any) -> Finding:
    return Finding("vanishing", where, "Its gradient is a millionth.", "Add a skip.", severity, step=step, **more)


def heat_map(*findings: Finding, names: tuple[str, ...] = NAMES) -> Chart:
    chart = layers.gradients(rows(names), findings)
    assert chart is not None
    go.Figure(data=chart.figure["data"], layout=chart.figure["layout"])
    return chart


def curves(*findings: Finding, seen: list[dict[str, Any]] | None = None) -> Chart:
    chart = layer_curves.curves(seen or rows(), findings)
    assert chart is not None
    go.Figure(data=chart.figure["data"], layout=chart.figure["layout"])
    return chart


# ---------------------------------------------------------------------------------------------------- marks


@pytest.mark.parametrize(
    ("where", "row"),
    [
        ("body.2", "body.2"),
        ("head.weight", "head"),
        ("body", "body.0"),
        ("stem.softmax", "stem"),
        ("act", "body.0"),
        ("early", WHOLE),
        ("Net", WHOLE),
        ("optimizer", WHOLE),
        ("", WHOLE),
        ("bod", WHOLE),
    ],
)
def test_a_finding_is_marked_at_its_layer_or_at_the_whole_model(where: str, row: str) -> None:
    order = {"stem": 2, "body.0": 3, "act": 4, "body.2": 5, "head": 7, "early": 1}
    assert row_of(where, NAMES, order) == row


def test_findings_of_one_row_and_step_share_a_mark_with_the_gravest_sign() -> None:
    found = marks([finding("head", 5, "info"), finding("head.bias", 5, "error"), finding("head", 9)], NAMES, {})
    assert [(mark.row, mark.step, mark.severity) for mark in found] == [("head", 5, "error"), ("head", 9, "warning")]
    assert found[0].text.count("<b>vanishing</b>") == 2 and "What to do: Add a skip." in found[0].text


def test_hover_text_is_lines_that_plotly_cannot_take_for_markup() -> None:
    (mark,) = marks([Finding(HOSTILE, f"head.{HOSTILE}", "word " * 60, HOSTILE, step=1)], NAMES, {})
    assert mark.row == "head" and "<b onmouseover" not in mark.text and mark.text.count("<b>") == 1
    assert max(len(html.unescape(line)) for line in mark.text.split("<br>")[1:]) <= 64


def test_what_was_found_at_no_step_is_not_marked() -> None:
    assert marks([finding("photo.csv, row 3", None)], NAMES, {}) == []
    assert len(heat_map(finding("head", None)).figure["data"]) == 1


def test_marks_on_the_heat_map_are_at_their_layer_and_step() -> None:
    chart = heat_map(finding("body.2", 7, "error"), finding("body.0.weight", 11))
    cells, signs = chart.figure["data"]
    assert cells["y"] == list(NAMES)
    assert list(zip(signs["x"], signs["y"], strict=True)) == [(7, "body.2"), (11, "body.0")]
    assert signs["marker"]["symbol"] == ["x", "triangle-up"]
    assert "body.2 at step 7; body.0 at step 11" in chart.alt


def test_a_finding_about_the_whole_model_gets_a_row_without_colour() -> None:
    cells, signs = heat_map(finding("optimizer", 7)).figure["data"]
    assert cells["y"] == [WHOLE, *NAMES] and len(cells["z"]) == len(cells["y"])
    assert set(cells["z"][0]) == {None} and None not in cells["z"][1]
    assert signs["y"] == [WHOLE]


def test_cells_keep_their_places_whether_marked_or_not() -> None:
    plain = heat_map().figure["data"][0]
    marked = heat_map(finding("Net", 7)).figure["data"][0]
    assert marked["z"][1:] == plain["z"] and marked["x"] == plain["x"]


# ---------------------------------------------------------------------------------------------------- curves


def test_the_curves_of_a_layer_are_its_records() -> None:
    seen = rows()
    for row in seen:
        row["layers"]["head"] |= {"out_rms": 0.5 * row["step"], "saturated": 0.25}
    figure = curves(seen=seen).figure
    traces = {
        trace["name"]: new["y"] for trace, new in zip(figure["data"], figure["choices"][3]["traces"], strict=True)
    }
    assert figure["choices"][3]["name"] == "head"
    layer = [row["layers"]["head"] for row in seen]
    for name, expected in {
        "gradient": [each["grad_norm"] / each["weight_norm"] for each in layer],
        "update": [each["update_ratio"] for each in layer],
        "units that are dead": [each["dead"] for each in layer],
        "elements saturated": [0.25] * len(seen),
        "outputs": [0.5 * row["step"] for row in seen],
    }.items():
        assert traces[name] == pytest.approx(expected, rel=1e-3), name
    other = {t["name"]: new for t, new in zip(figure["data"], figure["choices"][0]["traces"], strict=True)}
    assert set(other["outputs"]["y"]) == {None} and not other["outputs"]["showlegend"]


def test_zero_is_a_gap_on_a_logarithmic_axis_and_a_share_that_stays_zero_is_left_out() -> None:
    seen = rows()
    for row in seen:
        row["layers"]["head"] |= {"grad_norm": 0.0 if row["step"] > 20 else 1e-6 * row["step"], "dead": 0.0}
    figure = curves(seen=seen).figure
    gradient, _, dead = figure["choices"][3]["traces"]
    assert [value is None for value in gradient["y"]] == [row["step"] > 20 for row in seen]
    assert set(dead["y"]) == {None} and not dead["showlegend"]


def test_the_layer_with_the_gravest_finding_is_shown_first() -> None:
    assert curves().figure["chosen"] == 0
    figure = curves(finding("body.0", 3), finding("head", 9, "error"), finding("Net", 1, "error")).figure
    assert figure["chosen"] == 3
    assert figure["data"][0]["y"] == figure["choices"][3]["traces"][0]["y"]
    shown = {choice["name"]: choice["traces"][-1]["x"] for choice in figure["choices"]}
    assert shown == {"stem": [1], "body.0": [3, 1], "body.2": [1], "head": [9, 1]}


def test_a_page_with_many_layers_stays_small() -> None:
    seen = rows(tuple(f"block.{i}" for i in range(400)), 800)
    figure = curves(seen=seen).figure
    assert len(figure["data"][0]["x"]) < 200 and len(figure["choices"]) == 400
    assert len(json.dumps(figure)) < 5e6


def test_no_records_make_no_chart() -> None:
    assert layer_curves.curves([]) is None
    assert layer_curves.curves([{"step": 1, "layers": {}}]) is None
    assert layer_curves.curves([{"step": 1, "layers": {"a": {"grad_norm": None, "weight_norm": 1.0}}}]) is None


def test_names_and_sentences_are_text(tmp_path: Path) -> None:
    found = [Finding(HOSTILE, f"{HOSTILE}.1", HOSTILE, HOSTILE, "error", step=3, function=HOSTILE, file="</p>", line=7)]
    page = build(make_run(tmp_path, layers=(f"{HOSTILE}.0", f"{HOSTILE}.1"), epochs=2, findings=found))
    text = page.read_text(encoding="utf-8")
    body = text[: text.index('<script type="application/json"')]
    assert "<b onmouseover" not in text and "</p>:7" not in body
    assert f"{html.escape(HOSTILE)}.1</option>" in body.replace("&#39;", "&#x27;")
    assert "&lt;/p&gt;:7" in body
