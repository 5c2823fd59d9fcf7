"""The page of a search shows its history, each parameter, every trial, and K-FAC without a search beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="the report needs hesse[train]")
go = pytest.importorskip("plotly.graph_objects", reason="the report needs hesse[train]")

from hesse.finding import InputError  # noqa: E402
from hesse.report import build_tune  # noqa: E402
from report_page import HOSTILE, Page  # noqa: E402
from report_tune import make_search  # noqa: E402


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("search")
    record = make_search(folder)
    return Page(build_tune(folder)), record


def test_the_history_holds_every_trial_and_the_best_so_far(search: tuple[Page, dict[str, Any]]) -> None:
    page, record = search
    traces = {trace["name"]: trace for trace in page.figures["history"]["data"]}
    complete = [trial for trial in record["trials"] if trial["state"] == "complete"]
    assert traces["complete"]["y"] == [trial["value"] for trial in complete]
    assert traces["complete"]["customdata"] == [trial["number"] for trial in complete]
    pruned = traces["pruned: stopped early"]
    assert pruned["customdata"] == [trial["number"] for trial in record["trials"] if trial["state"] == "pruned"]
    assert set(pruned["y"]) == {0.97} and pruned["yaxis"] == "y2", "what has no value stands on the upper edge"
    best = traces["best so far"]
    least = [trial["best_so_far"] for trial in record["trials"] if trial["best_so_far"] is not None]
    assert best["y"] == least and best["y"][-1] == record["best"]["value"]
    (line,) = page.figures["history"]["layout"]["shapes"]
    assert line["y0"] == line["y1"] == record["kfac"]["value"] and "K-FAC without a search 0.340" in line["name"]


def test_against_time_kfac_is_one_point(search: tuple[Page, dict[str, Any]]) -> None:
    page, record = search
    best, kfac = page.figures["cost"]["data"]
    spent = sum(trial["seconds"] or 0.0 for trial in record["trials"])
    assert 60 * best["x"][-1] == pytest.approx(spent), "in minutes, for it took more than four"
    assert (60 * kfac["x"][0], kfac["y"]) == (pytest.approx(record["kfac"]["seconds"]), [record["kfac"]["value"]])


def test_each_parameter_has_its_own_chart(search: tuple[Page, dict[str, Any]]) -> None:
    page, record = search
    kinds = [page.figures[f"parameter-{i}"]["layout"]["xaxis"].get("type") for i in range(4)]
    assert kinds == ["log", "log", "category", None]
    low, high = page.figures["parameter-0"]["layout"]["xaxis"]["range"]
    assert (low, high) == (pytest.approx(-5, abs=0.3), pytest.approx(-0.5, abs=0.3)), "the whole range of the search"
    low, high = page.figures["parameter-3"]["layout"]["xaxis"]["range"]
    assert -0.1 < low < 0 and 0.5 < high < 0.6
    for i, name in enumerate(record["space"]):
        complete = next(t for t in page.figures[f"parameter-{i}"]["data"] if t["name"] == "complete")
        by_number = {trial["number"]: trial for trial in record["trials"]}
        expected = [by_number[number]["params"][name] for number in complete["customdata"]]
        assert complete["x"] == (list(map(str, expected)) if name == "batch_size" else expected)
        ring = page.figures[f"parameter-{i}"]["data"][-1]
        assert ring["name"] == "best" and ring["y"] == [record["best"]["value"]]


def test_the_table_has_every_trial_the_best_first(search: tuple[Page, dict[str, Any]]) -> None:
    page, record = search
    rows = page.text[page.text.index("All trials") :]
    places = [rows.index(trial["folder"]) for trial in record["trials"]]
    order = [trial for _, trial in sorted(zip(places, record["trials"], strict=True), key=lambda pair: pair[0])]
    assert order[0]["number"] == record["best"]["number"]
    states = [trial["state"] for trial in order]
    assert states[: states.count("complete")] == ["complete"] * states.count("complete")
    values = [trial["value"] for trial in order if trial["state"] == "complete"]
    assert values == sorted(values)
    assert "failed: The validation loss was never a number." in rows


def test_with_and_without_a_search_are_side_by_side(search: tuple[Page, dict[str, Any]]) -> None:
    page, record = search
    assert (
        f"AdamW, best of 24 trials {record['best']['value']:.3f} {100 * record['best']['score']:.1f}% 12 s" in page.text
    )
    assert "K-FAC without a search 0.340 86.0% 12 s 12 s" in page.text
    assert record["command"] in page.text


@pytest.mark.parametrize("trials", [0, 1], ids=["none", "one"])
def test_a_search_that_has_hardly_begun(tmp_path: Path, trials: int) -> None:
    make_search(tmp_path, trials, kfac=None)
    page = Page(build_tune(tmp_path))
    assert (set(page.figures) == set()) == (trials == 0)
    assert ("No trial completed yet" in page.text) == (trials == 0)
    assert "K-FAC without" not in page.text and f"{trials} of 24 trials" in page.text


def test_names_and_choices_are_text(tmp_path: Path) -> None:
    record = make_search(tmp_path, 3, target=HOSTILE)
    for trial in record["trials"]:
        trial["params"][HOSTILE] = HOSTILE
        trial["error"] = HOSTILE
    record["best"]["params"][HOSTILE] = HOSTILE
    space = record["space"] | {HOSTILE: {"kind": "choice", "values": [HOSTILE, "plain"]}}
    (tmp_path / "tune.json").write_text(json.dumps(record | {"space": space}), encoding="utf-8")
    page = Page(build_tune(tmp_path))
    assert not [attrs for _, attrs in page.elements if any(key.startswith("on") for key in attrs)]
    assert len(page.scripts) == 3 and "parameter-4" in page.figures
    for figure in page.figures.values():
        assert "<b onmouse" not in json.dumps([trace["x"] for trace in figure["data"]] + [figure["layout"]["xaxis"]])


def test_plotly_itself_accepts_every_figure(search: tuple[Page, dict[str, Any]]) -> None:
    for figure in search[0].figures.values():
        plain = json.loads(re.sub(r'"var\(--sans\)"', '"Arial"', json.dumps(figure)))
        plain = json.loads(re.sub(r'"var\(--[\w-]+\)"', '"#123456"', json.dumps(plain)))
        go.Figure(data=plain["data"], layout=plain["layout"])


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no search"), ("{", "damaged record"), ('{"target": "x"}', "damaged record")],
    ids=["absent", "broken", "foreign"],
)
def test_a_record_that_cannot_be_used(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "tune.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=says) as caught:
        build_tune(tmp_path)
    assert "tune.json" in caught.value.finding.where and "hesse tune" in caught.value.finding.remedy
