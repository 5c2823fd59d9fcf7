"""The card says what the records say, survives any name, and is there beside the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from markdown_it import MarkdownIt

import hesse
from hesse.files import read_json, write_json
from hesse.training.card import build_card, escaped
from training_tables import CLASSES, TARGET, numbers, pets

NASTY = "a|b`c` *d* <script>alert(1)</script> [e](f) # g\n---"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> hesse.Run:
    table = pets(tmp_path_factory.mktemp("zoo"))
    return hesse.train(table, TARGET, out=table.parent / "run", epochs=2, optimizer="adamw", verbose=False)


def header(text: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="no YAML reader")
    return yaml.safe_load(text.split("---\n")[1])


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, as a reader of Markdown shows them."""
    tokens = MarkdownIt("commonmark", {"html": False}).enable("table").parse(text.split("---\n", 2)[2])
    found: list[list[list[str]]] = []
    for i, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("td_open", "th_open"):
            found[-1][-1].append("".join(child.content for child in tokens[i + 1].children or ()))
    return found


def test_it_is_beside_the_page_and_says_what_the_records_say(zoo: hesse.Run) -> None:
    text = (zoo.folder / "card.md").read_text(encoding="utf-8")
    said = zoo.evaluation["targets"][TARGET]
    (result,) = header(text)["model-index"][0]["results"]
    assert {one["type"]: one["value"] for one in result["metrics"]} == said["metrics"]
    assert result["task"]["type"] == "tabular-classification"
    measures, classes, modalities, columns = tables(text)
    assert measures[1] == ["accuracy", f"{100 * said['value']:.1f}%"]
    assert [row[0] for row in classes[1:]] == list(said["by_class"]) and len(classes) == 1 + len(CLASSES)
    assert [row[0] for row in modalities[1:]] == [one["name"] for one in zoo.config["modalities"]]
    assert [row[:3] for row in columns[1:]] == [[c["name"], c["kind"], c["role"]] for c in zoo.schema.rows()]
    split = zoo.config["split"]
    assert f"of 60 rows: {split['train']} train, {split['valid']} valid, {split['test']} test" in text
    assert zoo.config["command"] in text
    for limit in ("Fewer than 10 test rows", "drawn at random", "64 pixels", "ten seconds", "256 characters"):
        assert limit in text


def test_findings_and_notes_are_told(zoo: hesse.Run) -> None:
    finding = {"kind": "leak", "where": "column 'x'", "message": "It | is <b>the</b> target.", "severity": "warning"}
    config, findings = (zoo.folder / name for name in ("config.json", "findings.json"))
    before = config.read_text(encoding="utf-8"), findings.read_text(encoding="utf-8")
    try:
        write_json(findings, [finding] * 60)
        write_json(config, {**zoo.config, "notes": ["Made up."], "status": "interrupted"})
        text = build_card(zoo.folder).read_text(encoding="utf-8")
    finally:
        config.write_text(before[0], encoding="utf-8")
        findings.write_text(before[1], encoding="utf-8")
    assert "> Made up." in text and "**Training did not come to its end: the run is interrupted.**" in text
    assert text.count("- warning: leak at column 'x': It \\| is &lt;b&gt;the&lt;/b&gt; target.") == 50
    assert "10 more are in findings.json." in text
    assert "Made up" not in build_card(zoo.folder).read_text(encoding="utf-8")


def test_no_name_breaks_out_of_its_cell(tmp_path: Path) -> None:
    frame = pa.table({NASTY: [0.1 * i for i in range(40)], "```": ["u", "v"] * 20, "k|": [NASTY, "b"] * 20})
    run = hesse.train(frame, "k|", out=tmp_path / "run", epochs=1, optimizer="adamw", verbose=False)
    text = (run.folder / "card.md").read_text(encoding="utf-8")
    shown = " ".join(NASTY.split())
    measures, classes, columns = tables(text)
    assert [row[0] for row in columns[1:]] == [shown, "```", "k|"]
    assert shown in [row[0] for row in classes]
    assert {len(row) for table in (measures, classes, columns) for row in table} == {2, 5, 6}
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("---\n", 2)[2])
    assert not re.search(r"<(script|a|em) ?", html)
    assert header(text)["model-index"][0]["name"] == "k| from data frame"


def test_a_regression_without_test_rows(tmp_path: Path) -> None:
    columns = numbers(6)
    del columns["species"]
    run = hesse.train(pa.table(columns), "age", out=tmp_path / "run", epochs=1, optimizer="adamw", verbose=False)
    text = (run.folder / "card.md").read_text(encoding="utf-8")
    assert "There were no test rows" in text and "age (a number)" in text and "always the mean" in text
    assert header(text)["model-index"][0]["results"][0]["task"]["type"] == "tabular-regression"


def test_a_run_of_which_only_the_beginning_is_there(zoo: hesse.Run, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {**zoo.config, "status": "running"})
    text = build_card(tmp_path).read_text(encoding="utf-8")
    assert "The run has no evaluation" in text and "model-index" not in text
    assert header(text)["library_name"] == "hesse"


def test_it_goes_with_the_run_that_is_replaced(tmp_path: Path) -> None:
    frame = pa.table({"x": [0.1 * i for i in range(40)], "k": ["a", "b"] * 20})
    options: dict[str, Any] = {"out": tmp_path, "optimizer": "adamw", "verbose": False}
    hesse.train(frame, "k", epochs=1, **options)
    first = (tmp_path / "card.md").read_text(encoding="utf-8")
    hesse.train(frame, "k", epochs=2, overwrite=True, **options)
    assert "2 epochs" in (tmp_path / "card.md").read_text(encoding="utf-8") != first


@pytest.mark.parametrize("text", [NASTY, "\\|", "$x$ ![i](j)", "a\tb\u2028c", "~~x~~ _y_ &amp;"])
def test_escaped_text_reads_as_it_was(text: str) -> None:
    rendered = MarkdownIt("commonmark").enable("table").parseInline(f"x {escaped(text)}")[0].children or []
    assert "".join(child.content for child in rendered) == f"x {' '.join(text.split())}".strip()
    assert {child.type for child in rendered} <= {"text", "text_special"}


def test_the_records_are_only_read(zoo: hesse.Run) -> None:
    before = json.dumps(read_json(zoo.folder / "evaluation.json"))
    first = build_card(zoo.folder).read_bytes()
    assert build_card(zoo.folder).read_bytes() == first
    assert json.dumps(read_json(zoo.folder / "evaluation.json")) == before
