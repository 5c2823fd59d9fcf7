"""The page says what the records hold, says what they lack, and never repeats a name as markup."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from report_records import CLASSES, make_run

pytest.importorskip("jinja2", reason="the report needs hesse[train]")
go = pytest.importorskip("plotly.graph_objects", reason="the report needs hesse[train]")

from hesse.files import read_json, write_json  # noqa: E402
from hesse.finding import Finding, InputError  # noqa: E402
from hesse.report import build  # noqa: E402
from report_modalities import deepen, several_targets  # noqa: E402
from report_page import HOSTILE, Page  # noqa: E402

CHARTS = {
    "score-seconds",
    "score-epoch",
    "loss-seconds",
    "loss-epoch",
    "modalities",
    "gradients",
    "layer",
    "updates",
    "steps",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("digits"), epochs=6)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(build(run))


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "run"))


def test_build_returns_the_path_and_is_deterministic(run: Path, page: Page) -> None:
    path = run / "report.html"
    first = path.read_bytes()
    assert build(run) == path
    assert path.read_bytes() == first


def test_headline_findings_and_repetition(run: Path, page: Page) -> None:
    value = read_json(run / "evaluation.json")["value"]
    assert f"{100 * value:.1f}%" in page.text
    assert "accuracy on 180 test rows" in page.text
    assert "Baseline 10.0%" in page.text
    assert "share only their class" in page.text
    assert page.text.index("unreadable image") < page.text.index("vanishing") < page.text.index("dead units")
    assert "Weigh the text up" in page.text
    assert "hesse train digits.csv --target digit --optimizer kfac --seed 0" in page.text
    assert "2.13.0+cpu" in page.text


def test_findings_say_their_severity_in_words(page: Page) -> None:
    assert all(word in page.text for word in ("Error", "Warning", "Note"))


def test_every_chart_has_a_container_with_a_description(page: Page) -> None:
    holders = {a["data-figure"]: a for _, a in page.elements if "data-figure" in a}
    assert set(holders) == set(page.figures) == {*CHARTS, "confusion"}
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 30 for a in holders.values())


def test_sections_are_in_the_order_of_reading(page: Page) -> None:
    sections = [a["id"] for tag, a in page.elements if tag == "section"]
    assert sections == [
        "findings",
        "curves-section",
        "errors-section",
        "modalities-section",
        "gradients-section",
        "updates-section",
        "steps-section",
        "data",
        "repeat",
    ]
    targets = [(a["href"] or "")[1:] for tag, a in page.elements if tag == "a" and (a["href"] or "").startswith("#")]
    ids = {a.get("id") for _, a in page.elements}
    assert set(targets) <= ids
    assert [t for t in targets if t in sections][-len(sections) :] == sections


def test_comparison_runs_are_overlaid_and_named_by_optimiser(page: Page) -> None:
    for chart in ("score-seconds", "score-epoch"):
        assert [trace["name"] for trace in page.figures[chart]["data"]] == ["K-FAC", "AdamW, lr 0.001"]
    curves = page.figures["loss-seconds"]["data"]
    assert [(t["name"], t["line"]["dash"]) for t in curves if t["showlegend"]] == [
        ("K-FAC", "solid"),
        ("AdamW, lr 0.001", "solid"),
    ]
    assert "The runs beside each other" in page.text


def test_the_confusion_matrix_shows_counts_and_shares(run: Path, page: Page) -> None:
    matrix = read_json(run / "evaluation.json")["confusion"]
    trace = page.figures["confusion"]["data"][0]
    assert trace["x"] == trace["y"] == list(CLASSES)
    assert trace["customdata"] == matrix
    assert trace["z"][3] == pytest.approx([count / sum(matrix[3]) for count in matrix[3]], abs=1e-4)
    assert [[int(cell or 0) for cell in row] for row in trace["text"]] == matrix


def test_the_table_of_classes_holds_recall_and_precision(run: Path, page: Page) -> None:
    matrix = read_json(run / "evaluation.json")["confusion"]
    recall = matrix[3][3] / sum(matrix[3])
    precision = matrix[3][3] / sum(row[3] for row in matrix)
    assert f"3 {sum(matrix[3])} {100 * recall:.1f}% {100 * precision:.1f}%" in page.text


def test_the_heat_map_is_the_ratio_of_gradient_to_weight(run: Path, page: Page) -> None:
    trace = page.figures["gradients"]["data"][0]
    rows = [json.loads(line) for line in (run / "layers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert trace["y"] == list(rows[0]["layers"])
    name = trace["y"][4]
    for k, row in enumerate(rows):
        seen = row["layers"][name]
        assert 10 ** trace["z"][4][k] == pytest.approx(seen["grad_norm"] / seen["weight_norm"], rel=1e-3)
    starved = trace["z"][trace["y"].index("encoders.text_word.embedding")]
    assert starved[-1] is None, "a gradient of zero has no logarithm"


def test_rejected_steps_are_marked_on_the_damping(page: Page) -> None:
    crosses = page.figures["steps"]["data"][-1]
    assert (crosses["name"], crosses["x"], crosses["customdata"]) == ("rejected", [4], [1])
    titles = [note["text"] for note in page.figures["steps"]["layout"]["annotations"]]
    assert titles[0].startswith("<b>damping</b>")
    assert len(titles) == 4


@pytest.mark.parametrize("what", ["classification", "regression", "deep"])
def test_plotly_itself_accepts_every_figure(tmp_path: Path, what: str) -> None:
    folder = make_run(tmp_path, "regression" if what == "regression" else "classification", epochs=3)
    if what == "deep":
        deepen(folder)
        several_targets(folder)
    page = Page(build(folder))
    for name, figure in page.figures.items():
        plain = json.loads(re.sub(r'"var\(--sans\)"', '"Arial"', json.dumps(figure)))
        plain = json.loads(re.sub(r'"var\(--[\w-]+\)"', '"#123456"', json.dumps(plain)))
        go.Figure(data=plain["data"], layout=plain["layout"])  # raises on an unknown key or an impossible value
        for key in plain.get("narrow", {}):
            assert key in plain["layout"], f"{name} changes {key} on phones, which it does not have"


def test_regression(tmp_path: Path) -> None:
    page = Page(build(make_run(tmp_path, "regression", target="price", epochs=4)))
    assert {*CHARTS, "predictions", "residuals"} == set(page.figures)
    assert "R² on 180 test rows" in page.text
    record = read_json(tmp_path / "evaluation.json")
    diagonal, rows = page.figures["predictions"]["data"]
    assert diagonal["x"] == diagonal["y"]
    assert (rows["x"], rows["y"]) == (record["actual"], record["predicted"])
    assert sum(page.figures["residuals"]["data"][0]["y"]) == 180


def test_names_are_text_everywhere(tmp_path: Path) -> None:
    names = (HOSTILE, HOSTILE + "2", "var(--page)")
    run = make_run(
        tmp_path,
        classes=names,
        target=HOSTILE,
        modalities=(("image", HOSTILE), ("text", "字" * 90)),
        layers=(f"encoders.{HOSTILE}.conv1", f"encoders.{HOSTILE}.conv2", "head.0"),
        findings=[Finding(HOSTILE, HOSTILE, HOSTILE, HOSTILE, value=HOSTILE, limit=1)],
        epochs=3,
    )
    plain = Page(
        build(make_run(tmp_path / "plain", classes=("a", "b", "c"), layers=("x.y.a", "x.y.b", "head.0"), epochs=3))
    )
    page = Page(build(run))
    assert not [attrs for _, attrs in page.elements if any(key.startswith("on") for key in attrs)]
    assert len(page.scripts) == len(plain.scripts) == 3
    assert page.tags.count("b") < 20
    assert page.text.count("<b onmouseover=alert(1)>") > 8, "names are shown as they are"
    assert "49" not in re.findall(r"\{\{.*?\}\}", page.text)
    labels = page.figures["confusion"]["data"][0]["x"]
    assert len(set(labels)) == 3
    for figure in page.figures.values():
        texts = json.dumps([{k: v for k, v in trace.items() if k != "hovertemplate"} for trace in figure["data"]])
        assert "<b" not in texts, "plotly would read this as markup"
        for trace in figure["data"]:
            assert re.sub(r"</?(b|br|extra|sup)>", "", trace.get("hovertemplate", "")).count("<") == 0


RECORDS = ("columns.json", "metrics.jsonl", "steps.jsonl", "layers.jsonl", "findings.json", "evaluation.json")


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_record_that_is_not_there(run: Path, tmp_path: Path, record: str, how: str) -> None:
    folder = copy(run, tmp_path)
    (folder / record).unlink()
    if how == "empty":
        (folder / record).touch()
    page = Page(build(folder))
    assert (record in page.text) != (record in ("findings.json", "metrics.jsonl"))
    assert page.tags.count("section") == 9


def test_a_run_interrupted_before_its_first_epoch(run: Path, tmp_path: Path) -> None:
    config = read_json(run / "config.json")
    write_json(tmp_path / "config.json", config | {"status": "interrupted", "notes": []})
    page = Page(build(tmp_path))
    assert page.figures == {}
    for words in (
        "Interrupted.",
        "--resume",
        "No score yet",
        "no epoch completed",
        "metrics.jsonl is missing or empty",
    ):
        assert words in page.text


def test_a_config_with_the_required_keys_alone(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path)
    keys = ("hesse", "target", "task", "classes", "optimizer", "modalities", "split", "command")
    write_json(folder / "config.json", {key: read_json(run / "config.json")[key] for key in keys})
    assert "Predicting digit" in Page(build(folder)).text


def test_without_evaluation_the_best_validation_score_leads(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path)
    (folder / "evaluation.json").unlink()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    page = Page(build(folder))
    assert f"{100 * max(row['valid_score'] for row in rows):.1f}%" in page.text
    assert "on the validation rows, at best" in page.text


def test_numbers_that_training_lost_are_gaps(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "regression", epochs=3)
    record = read_json(folder / "evaluation.json")
    write_json(folder / "evaluation.json", record | {"value": None, "predicted": [None] * 180, "modalities": {}})
    for name in ("metrics.jsonl", "steps.jsonl", "layers.jsonl"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        lost = re.sub(
            r'("(?:valid_loss|valid_score|train_loss|damping|lr|grad_norm|update_ratio)": )[-\d.e]+',
            r"\1null",
            lines[-1],
        )
        (folder / name).write_text("\n".join([*lines[:-1], lost]) + "\n", encoding="utf-8")
    page = Page(build(folder))
    assert "holds no predictions" in page.text
    assert len(page.figures["score-epoch"]["data"][0]["x"]) == 2


def test_many_classes_and_many_findings(tmp_path: Path) -> None:
    classes = tuple(f"species {i} of the family Chrysomelidae" for i in range(60))
    findings = [Finding("unreadable image", f"row {i}", "It ends early.") for i in range(40)]
    page = Page(build(make_run(tmp_path, classes=classes, findings=findings, epochs=3)))
    trace = page.figures["confusion"]["data"][0]
    assert "text" not in trace
    assert len(set(trace["x"])) == 60
    assert all(len(label) <= 24 for label in trace["x"])
    assert page.text.count("unreadable image") == 40
    assert "28 more" in page.text


def test_nothing_is_asked_of_the_network(run: Path, page: Page) -> None:
    for tag, attrs in page.elements:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert not re.match(r"(?!#|data:,)", attrs.get(key) or "#"), f"<{tag} {key}={attrs[key]}>"
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    style = (run / "report.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize("what", ["absent", "file", "bare", "foreign"])
def test_a_run_folder_that_is_not_one(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run"
    if what == "file":
        folder.write_text("x", encoding="utf-8")
    elif what != "absent":
        folder.mkdir()
    if what == "foreign":
        write_json(folder / "config.json", {"model_type": "bert"})
    with pytest.raises(InputError, match="not a run folder") as caught:
        build(folder)
    assert caught.value.finding.where == str(folder)
    assert "hesse train" in caught.value.finding.remedy
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("record", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[1]"),
        ("evaluation.json", "\x80"),
        ("metrics.jsonl", "{\n{}\n"),
    ],
)
def test_a_damaged_record_is_named(run: Path, tmp_path: Path, record: str, content: str) -> None:
    folder = copy(run, tmp_path)
    before = (folder / "report.html").read_bytes() if (folder / "report.html").exists() else None
    (folder / record).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="damaged record") as caught:
        build(folder)
    assert caught.value.finding.where.endswith(record)
    assert before is None or (folder / "report.html").read_bytes() == before
