"""What each modality brings is in numbers, in charts, and in a table of what remains when some are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from report_records import make_run

pytest.importorskip("jinja2", reason="the report needs hesse[train]")
pytest.importorskip("plotly", reason="the report needs hesse[train]")

from hesse.files import read_json, read_lines, write_json, write_lines
from hesse.report import build, modality_charts
from report_modalities import deepen
from report_page import HOSTILE, Page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any]]:
    folder = make_run(tmp_path_factory.mktemp("deep"), compare=())
    record = deepen(folder)
    return Page(build(folder)), record


def test_the_parts_lead_from_no_modality_to_all(run: tuple[Page, dict[str, Any]]) -> None:
    page, record = run
    ends, steps = page.figures["parts"]["data"]
    parts = sorted((each["shapley"] for each in record["modalities"].values()), reverse=True)
    assert steps["x"] == pytest.approx(parts)
    assert ends["x"] == pytest.approx([record["value"] - sum(parts), record["value"]])
    assert steps["base"] == pytest.approx([ends["x"][0], *(ends["x"][0] + np.cumsum(parts))][:-1], abs=1e-6)
    assert steps["base"][-1] + steps["x"][-1] == pytest.approx(record["value"], abs=1e-6)
    low, high = page.figures["parts"]["layout"]["xaxis"]["range"]
    assert low == 0 and high > record["value"]


def test_a_part_below_zero_goes_back(tmp_path: Path) -> None:
    chart = modality_charts.parts([("a", -0.1), ("b", 0.5)], "r2", 0.3, -0.1)
    _, steps = chart.figure["data"]
    assert steps["y"] == ["b", "a"] and steps["text"] == ["+0.500", "−0.100"]
    assert steps["base"] == pytest.approx([-0.1, 0.4])
    assert steps["marker"]["color"][0] != steps["marker"]["color"][1]
    low, high = chart.figure["layout"]["xaxis"]["range"]
    assert low < -0.1 and high > 0.4


def test_every_number_is_in_the_table_with_its_meaning(run: tuple[Page, dict[str, Any]]) -> None:
    page, record = run
    seen = record["modalities"].values()
    for key, word in (
        ("alone", "alone"),
        ("without", "without it"),
        ("probe", "probe"),
        ("gradient_share", "gradient"),
    ):
        row = " ".join(f"{100 * each[key]:.1f}%" for each in seen)
        assert row in page.text, key
        assert page.text.index(word) < page.text.index(row)
    assert "averaged over all orders of adding (Shapley) +45.0% +27.0% +6.0%" in page.text


def test_speed_is_a_line_for_each_modality(run: tuple[Page, dict[str, Any]]) -> None:
    page, record = run
    lines = page.figures["speed"]["data"]
    assert [line["name"] for line in lines] == ["photo (image)", "voice (audio)", "word (text)"]
    for line, each in zip(lines, record["modalities"].values(), strict=True):
        assert (line["x"], line["y"]) == ([1, 2, 3, 4, 5, 6], each["speed"])


def test_the_heat_map_has_a_row_for_each_class(run: tuple[Page, dict[str, Any]]) -> None:
    page, record = run
    trace = page.figures["shapley-classes"]["data"][0]
    assert trace["zmin"] == -trace["zmax"], "no contribution has the colour of the page"
    for j, each in enumerate(record["modalities"].values()):
        assert [row[j] for row in trace["z"]] == pytest.approx(list(each["by_class"].values()), abs=1e-4)


def test_of_many_classes_those_where_it_matters_are_drawn() -> None:
    values = {f"class {i}": (0.9 if i == 150 else 0.001 * i) for i in range(200)}
    chart = modality_charts.by_class([("a", values), ("b", dict.fromkeys(values, 0.0))])
    assert chart is not None and "the 60 of 200 with the largest" in chart.title
    trace = chart.figure["data"][0]
    assert len(trace["y"]) == len(trace["z"]) == 60 and "texttemplate" not in trace
    assert trace["y"][-1] == "class 199" and "class 150" in trace["y"]


def test_scores_by_presence_are_sorted(run: tuple[Page, dict[str, Any]]) -> None:
    page, record = run
    at = page.text.index("When some are missing")
    scores = [f"{100 * each['value']:.1f}%" for each in sorted(record["presence"], key=lambda each: -each["value"])]
    places = [page.text.index(score, at) for score in scores]
    assert places == sorted(places) and len(scores) == 7
    marks = [a["aria-label"] for tag, a in page.elements if tag == "span" and a.get("role") == "img"]
    assert marks.count("present") == 12 and marks.count("absent") == 9


def test_a_record_of_version_0_1_has_its_two_numbers(tmp_path: Path) -> None:
    page = Page(build(make_run(tmp_path, epochs=2, compare=())))
    assert {"modalities"} == set(page.figures) & {"parts", "modalities", "speed", "shapley-classes"}
    assert "When some are missing" not in page.text and "modalities disagree" not in page.text
    assert "the score with all others hidden" in page.text and "Shapley" not in page.text.split("Each modality")[1]


def test_numbers_that_are_not_there_are_dashes(tmp_path: Path) -> None:
    folder = make_run(tmp_path, epochs=2, compare=())
    record = deepen(folder)
    first, second, third = record["modalities"].values()
    first["shapley"], second["probe"], third["speed"], third["by_class"] = None, None, [None, None], {}
    record["presence"][0]["value"] = None
    write_json(folder / "evaluation.json", record)
    page = Page(build(folder))
    assert "parts" not in page.figures and len(page.figures["speed"]["data"]) == 2
    assert "– +27.0% +6.0%" in page.text


def test_fallback_fusion_and_waiting_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path, epochs=2, compare=())
    record = deepen(folder)
    fallback = {"modality": "audio_voice", "reason": "It alone was better on the validation rows, 95.0% over 91.2%."}
    write_json(folder / "evaluation.json", record | {"fallback": fallback})
    config = read_json(folder / "config.json")
    tried = {"concat": 0.52, "gated": None, "late": 0.41}
    write_json(folder / "config.json", config | {"fusion": "late", "fusion_tried": tried})
    rows = read_lines(folder / "metrics.jsonl")
    write_lines(folder / "metrics.jsonl", [row | {"waited": row["seconds"] * 0.125} for row in rows])
    text = Page(build(folder)).text
    assert "Fallback. voice (audio) answers alone. It alone was better" in text
    assert "late 0.410 yes concat 0.520 no gated – no" in text
    assert "Waiting for data 12.5% of the time" in text


def test_waiting_that_is_not_worth_a_word_is_not_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path, epochs=2, compare=())
    rows = read_lines(folder / "metrics.jsonl")
    write_lines(folder / "metrics.jsonl", [row | {"waited": row["seconds"] * 0.005} for row in rows])
    assert "Waiting for data" not in Page(build(folder)).text


def test_names_of_modalities_are_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path, modalities=(("image", HOSTILE), ("text", "<b>x</b>")), epochs=2, compare=())
    record = deepen(folder)
    write_json(folder / "evaluation.json", record | {"fallback": {"modality": f"image_{HOSTILE}", "reason": HOSTILE}})
    page = Page(build(folder))
    assert not [attrs for _, attrs in page.elements if any(key.startswith("on") for key in attrs)]
    assert len(page.scripts) == 3
