"""The main job on every kind of target, from the command line: trained, judged, predicted, resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

pytest.importorskip("typer", reason="the hesse command needs the extra 'train'")

from sklearn.metrics import accuracy_score, f1_score
from typer.testing import CliRunner

import hesse
from hesse import InputError
from hesse.cli.app import app
from hesse.files import read_json, read_lines
from hesse.multimodal import make_schema, read_table

N = 300
LABELS = ("big", "red", "round")


def columns() -> dict[str, list[Any]]:
    random = np.random.default_rng(0)
    x = random.normal(size=(N, 3))
    noisy = x + 0.3 * random.normal(size=x.shape)
    return {
        "x": x[:, 0].tolist(),
        "y": x[:, 1].tolist(),
        "z": x[:, 2].tolist(),
        "tags": [[name for name, value in zip(LABELS, row, strict=True) if value > 0.3] for row in noisy],
        "sick": ["yes" if value > 0.8 else "no" for value in noisy[:, 0]],
        "size": [
            None if i % 7 == 0 else "SML"[int(value > -0.5) + int(value > 0.5)] for i, value in enumerate(noisy[:, 1])
        ],
        "age": [None if i % 9 == 0 else float(10 + 3 * row[0] - row[2]) for i, row in enumerate(noisy)],
    }


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.parquet"
    pa.parquet.write_table(pa.table(columns()), path)
    return path


def invoke(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def train(table: Path, out: Path, targets: list[str], *options: object) -> dict[str, Any]:
    others = [
        word
        for name in ("tags", "sick", "size", "age")
        if name not in targets
        for word in ("--column", f"{name}=ignore")
    ]
    wanted = [word for name in targets for word in ("--target", name)]
    common = ["--out", out, "--optimizer", "adamw", "--lr", 0.02, "--json", "--quiet"]
    return json.loads(invoke("train", table, *wanted, *others, *common, *options))["evaluation"]


def predicted(run: Path, table: Path, *options: object) -> dict[str, list[Any]]:
    out = run / "p.parquet"
    invoke("predict", run, table, "--out", out, *options)
    return pa.parquet.read_table(out).to_pydict()


def test_rows(run: Path, table: Path, targets: list[str]) -> list[int]:
    """The rows that tested, dealt anew."""
    ignored = {name: "ignore" for name in ("tags", "sick", "size", "age") if name not in targets}
    _, parts = make_schema(read_table(table), targets, overrides=ignored, root=run)
    return parts["test"].tolist()


test_rows.__test__ = False  # type: ignore[attr-defined]


def test_labels_from_lists_to_predicted_lists(table: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluation = train(table, run, ["tags"], "--epochs", 6, "--class-weights", "balanced")
    assert evaluation["score"] == "mAP"
    assert evaluation["value"] > evaluation["baseline"] + 0.3
    rows = predicted(run, table)
    actual, at = columns()["tags"], test_rows(run, table, ["tags"])
    matrix = [[[name in cells[i] for name in LABELS] for i in at] for cells in (actual, rows["tags"])]
    found = evaluation["targets"]["tags"]["metrics"]["f1_micro"]
    assert f1_score(*matrix, average="micro") == pytest.approx(found)
    assert read_json(run / "calibration.json")["tags"]["threshold"].keys() == set(LABELS)
    # A text in a CSV file is the same to the run.
    csv = tmp_path / "data.csv"
    lines = (f"{x},{y},{z}" for x, y, z in zip(*(columns()[c] for c in "xyz"), strict=True))
    csv.write_text("x,y,z\n" + "\n".join(lines) + "\n")
    cells = invoke("predict", run, csv).splitlines()
    assert cells[0].startswith('"tags","probability of big"')
    assert cells[1].split(",")[0].strip('"').split("|") == (rows["tags"][0] or [""])


def test_two_classes_with_weights_and_a_threshold(table: Path, tmp_path: Path) -> None:
    run, even = tmp_path / "run", tmp_path / "even"
    evaluation = train(table, run, ["sick"], "--epochs", 6, "--class-weights", "balanced")
    record = evaluation["targets"]["sick"]
    plain, best, all_of_them = (
        predicted(run, table, *o)["sick"] for o in ((), ("--threshold", "best"), ("--threshold", 0))
    )
    at, actual = test_rows(run, table, ["sick"]), columns()["sick"]
    assert accuracy_score([actual[i] for i in at], [plain[i] for i in at]) == pytest.approx(evaluation["value"])
    f1 = f1_score([actual[i] for i in at], [best[i] for i in at], pos_label="yes")
    assert f1 == pytest.approx(record["metrics"]["f1_at_threshold"])
    assert set(all_of_them) == {"yes"}
    # The rare class weighs more, so that more rows are said to be of it.
    train(table, even, ["sick"], "--epochs", 6)
    assert plain.count("yes") > predicted(even, table)["sick"].count("yes")
    with pytest.raises(InputError, match="has class_weights None, which cannot become 'balanced'"):
        hesse.train(table, "sick", out=even, class_weights="balanced", resume=True, epochs=7, verbose=False)


def test_several_targets_and_going_on(table: Path, tmp_path: Path) -> None:
    """Trained in two goes it is what it is in one."""
    targets = ["age", "size", "tags"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    evaluation = train(table, whole, targets, "--epochs", 4, "--class-weights", "balanced")
    train(table, halves, targets, "--epochs", 2, "--class-weights", "balanced")
    again = train(table, halves, targets, "--epochs", 4, "--class-weights", "balanced", "--resume")
    assert again == evaluation
    assert evaluation["score"] == "mean score"
    each = evaluation["targets"]
    assert list(each) == targets
    assert evaluation["value"] == pytest.approx(sum(one["value"] for one in each.values()) / 3)
    assert all(one["value"] > one["baseline"] + 0.2 for one in each.values())
    assert each["age"]["n"] < evaluation["n"]
    metrics = read_lines(whole / "metrics.jsonl")
    assert all(math.isfinite(row["train_loss"]) and 0 < row["valid_score"] < 1 for row in metrics)
    assert read_json(whole / "config.json")["target"] == "age, size, tags"
    rows = predicted(whole, table)
    assert list(rows)[:4] == ["age", "size", "tags", "size confidence"]
    at = [i for i in test_rows(whole, table, targets) if columns()["size"][i] is not None]
    right = [rows["size"][i] == columns()["size"][i] for i in at]
    assert np.mean(right) == pytest.approx(each["size"]["value"])
    command = read_json(whole / "config.json")["command"]
    assert command.startswith(f"hesse train {table} --target age --target size --target tags ")
    with pytest.raises(InputError, match="the target was 'age, size, tags' and is 'size'"):
        hesse.train(table, "size", out=whole, resume=True, epochs=5, optimizer="adamw", lr=0.02, verbose=False)


def test_kfac_trains_several_targets(table: Path, tmp_path: Path) -> None:
    ignored = {"tags": "ignore", "sick": "ignore"}
    run = hesse.train(
        table, ["age", "size"], out=tmp_path / "r", epochs=3, columns=ignored, batch_size=64, verbose=False
    )
    losses = [row["train_loss"] for row in read_lines(run.folder / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert run.evaluation["targets"]["age"]["value"] > 0.5
    assert not [finding for finding in run.findings if finding["severity"] == "error"]


def test_the_screen_shows_each_target(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ignored = {"tags": "ignore", "sick": "ignore"}
    hesse.train(table, ["age", "size"], out=tmp_path / "r", epochs=1, optimizer="adamw", columns=ignored)
    shown = capsys.readouterr().err
    assert "test mean score" in shown
    assert "age r2" in shown
    assert "size accuracy" in shown


def test_classes_that_no_training_row_has_are_named(tmp_path: Path) -> None:
    rows = columns()
    part = ["train"] * 200 + ["valid"] * 50 + ["test"] * 50
    size = [("new" if i in (201, 260, 280) else "S" if i % 2 else "M") for i in range(N)]
    data = pa.table({"x": rows["x"], "size": size, "age": rows["age"], "part": part})
    run = hesse.train(
        data, ["size", "age"], out=tmp_path / "r", split_column="part", optimizer="adamw", epochs=1, verbose=False
    )
    (finding,) = [finding for finding in run.findings if finding["kind"] == "unseen class"]
    assert finding["message"].startswith("'new' is in 3 rows that validate or test (row 202, 261, 281) and in none")
    record = run.evaluation["targets"]["size"]
    assert record["by_class"]["new"] == {"precision": None, "recall": 0.0, "f1": 0.0, "n": 2}
