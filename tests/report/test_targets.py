"""Each target of a run has its own part of the page: metrics with their meaning, mistakes, calibration, thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from report_records import make_run

pytest.importorskip("jinja2", reason="the report needs hesse[train]")
pytest.importorskip("plotly", reason="the report needs hesse[train]")

from hesse.files import read_json, write_json
from hesse.report import build
from hesse.report.numbers import score_name, signed, value
from hesse.report.targets import meaning
from report_modalities import calibration, several_targets
from report_page import HOSTILE, Page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = make_run(tmp_path_factory.mktemp("several"), epochs=2, compare=())
    several_targets(folder)
    return Page(build(folder))


def change(folder: Path, **more: Any) -> None:
    """Records of the target, added to the only one of a run."""
    write_json(folder / "evaluation.json", read_json(folder / "evaluation.json") | more)


def test_several_targets_are_listed_and_linked_to_their_parts(page: Page) -> None:
    ids = [a.get("id") for tag, a in page.elements if tag == "h3"]
    assert [one for one in ids if (one or "").startswith("target-")] == [f"target-{i}" for i in (1, 2, 3, 4)]
    links = {a["href"] for tag, a in page.elements if tag == "a" and "target-" in (a["href"] or "")}
    assert links == {f"#target-{i}" for i in (1, 2, 3, 4)}
    assert "price in € regression R² 0.800 0.000 0.400 180" in page.text
    assert "mean score on 180 test rows" in page.text
    assert "Predicting digit, tags, price in €, sold" in page.text


def test_charts_of_every_target_have_names_of_their_own(page: Page) -> None:
    names = {"confusion", "reliability", "predictions-3", "residuals-3", "confusion-4", "reliability-4"}
    assert names <= set(page.figures)
    assert page.figures["confusion-4"]["data"][0]["customdata"] == [[80, 20], [16, 64]]


def test_metrics_say_what_they_mean(page: Page) -> None:
    assert (
        "balanced accuracy recall, averaged over the classes: a rare class counts as much as a frequent one 79.0%"
        in (page.text)
    )
    assert (
        "MAE distance from the actual value, on average, in the target's own unit; lower is better 8,123" in page.text
    )
    assert "house points 12.000" in page.text, "a metric that we do not know is shown all the same"


@pytest.mark.parametrize("key", ["F1_macro", "subset_accuracy", "roc_auc", "log_loss", "mean_absolute_error", "mAP"])
def test_metrics_of_scikit_learn_have_a_meaning(key: str) -> None:
    assert meaning(key)


def test_labels_have_thresholds(page: Page) -> None:
    assert "label test rows recall precision F1 threshold shiny 40 70.0% 90.0% 0.750 0.500" in page.text
    assert "<b>bold</b> 38 70.0% 70.0% 0.750 0.210" in page.text
    assert "a row counts as yes from a probability of 0.420 up" in page.text


def test_calibration_is_drawn_before_and_after(page: Page) -> None:
    honest, before, after = page.figures["reliability"]["data"]
    assert (before["name"], after["name"]) == ("as trained", "with temperature")
    bins = calibration()
    assert before["y"] == [one["accuracy"] for one in bins["bins_before"]]
    assert after["x"] == [one["confidence"] for one in bins["bins"]]
    area = [(size - 6) ** 2 / one["n"] for size, one in zip(after["marker"]["size"], bins["bins"], strict=True)]
    assert area == pytest.approx([area[0]] * len(area)), "the area of a marker grows with its rows"
    assert honest["x"] == honest["y"] == [0, 1]
    assert "expected calibration error" in page.text and "0.092 0.021" in page.text


@pytest.mark.parametrize(
    ("temperature", "says"),
    [
        (1.6, "too sure of itself"),
        (0.7, "less sure than it could be"),
        (1.01, "as sure as it should be"),
        (1.0, "answers are pooled"),
    ],
    ids=["sharp", "soft", "honest", "pooled"],
)
def test_a_temperature_is_put_into_words(tmp_path: Path, temperature: float, says: str) -> None:
    folder = make_run(tmp_path, epochs=2, compare=())
    change(folder, calibration=calibration(temperature))
    text = Page(build(folder)).text
    assert says in text and f"Temperature {temperature:.2f}" in text


def test_only_what_is_known_after_the_temperature_is_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path, epochs=2, compare=())
    record = calibration()
    del record["bins_before"]
    change(folder, calibration=record)
    assert [trace["name"] for trace in Page(build(folder)).figures["reliability"]["data"]] == ["honest", "confidence"]


def test_of_a_thousand_classes_the_worst_are_shown(tmp_path: Path) -> None:
    classes = tuple(f"species {i}" for i in range(1000))
    folder = make_run(tmp_path, classes=classes, epochs=2, compare=())
    by_class = {
        name: {"precision": 0.5, "recall": 0.5, "f1": i / 1000, "n": 5} for i, name in enumerate(reversed(classes))
    }
    change(
        folder,
        confusion=None,
        by_class=by_class,
        confused=[["species 3", "species 7", 9], ["a", "b", 4]] + [["c", "d", 2]] * 30,
    )
    page = Page(build(folder))
    assert "confusion" not in page.figures
    assert "too many classes for a picture" in page.text
    assert "the 100 with the lowest F1 of 1,000" in page.text
    assert "species 999 5 50.0% 50.0% 0.000" in page.text and "species 1 5" not in page.text
    assert "species 3 species 7 9" in page.text and page.text.count("c d 2") == 18
    assert len(page.text) < 20_000


def test_a_class_without_rows_has_no_recall(tmp_path: Path) -> None:
    folder = make_run(tmp_path, classes=("a", "b"), epochs=2, compare=())
    zero = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 0}
    change(folder, by_class={"a": zero | {"n": 9, "recall": 1.0}, "b": zero})
    assert "b 0 – 0.0% 0.000" in Page(build(folder)).text


def test_numbers_as_a_page_writes_them() -> None:
    assert [value(number) for number in (0.0, 1e-5, 0.5, 1234.4, 2e9, float("nan"))] == [
        "0.000",
        "1e-05",
        "0.500",
        "1,234",
        "2e+09",
        "–",
    ]
    assert value(0.5, "subset_accuracy") == "50.0%" and signed(None) == "–"
    assert score_name("mAP") == "mAP"


def test_names_of_many_classes_are_text(tmp_path: Path) -> None:
    names = tuple(f"{HOSTILE} {i}" for i in range(25))
    folder = make_run(tmp_path, classes=names, epochs=2, compare=())
    matrix = [[3 * (i == j) + 2 * (j == (i + 1) % 25) for j in range(25)] for i in range(25)]
    change(folder, confusion=matrix, by_class=None)
    page = Page(build(folder))
    assert page.text.count("Most often confused") == 1 and "taken for rows" in page.text
    assert not [attrs for _, attrs in page.elements if any(key.startswith("on") for key in attrs)]
    assert len(page.scripts) == 3
