"""The main job: what it leaves, what it refuses, and that refusing leaves nothing."""

from __future__ import annotations

import inspect
import math
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

import hesse
from hesse import InputError
from hesse.files import read_json, read_lines
from hesse.training import call, loop
from hesse.training.loop import MOST_STEPS_KEPT, _keep
from training_tables import CLASSES, TARGET, numbers, numbers_csv, pets, write_csv


def train(table: Any, target: str = "species", **options: Any) -> hesse.Run:
    return hesse.train(table, target, **{"epochs": 2, "optimizer": "adamw", "verbose": False, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, hesse.Run]:
    """A table of pictures, sounds, texts and columns, and a run on it."""
    table = pets(tmp_path_factory.mktemp("zoo"))
    return table, train(table, TARGET, out=table.parent / "run", epochs=6, optimizer="kfac")


def test_every_modality_in_every_script_end_to_end(zoo: tuple[Path, hesse.Run]) -> None:
    _, run = zoo
    kinds = {modality["name"]: modality["kind"] for modality in run.config["modalities"]}
    assert kinds == {"写真.png": "image", "sound": "audio", "self": "text", "columns": "columns"}
    assert set(run.config["classes"]) == set(CLASSES)
    assert run.config["status"] == "finished"
    assert run.evaluation["value"] > 0.6 > 2 * run.evaluation["baseline"]
    assert run.evaluation["modalities"].keys() == {modality["key"] for modality in run.config["modalities"]}
    assert np.sum(run.evaluation["confusion"]) == run.evaluation["n"] == run.config["split"]["test"]
    assert (run.folder / "report.html").stat().st_size > 10_000


def test_predictions_on_the_test_rows_are_those_that_were_judged(zoo: tuple[Path, hesse.Run]) -> None:
    table, run = zoo
    truth = pd.read_csv(table)[TARGET]
    predictions = run.predict(table).to_pandas()
    _, parts = hesse.multimodal.make_schema(hesse.multimodal.read_table(table), TARGET, root=table.parent)
    right = (predictions[TARGET] == truth)[parts["test"]]
    assert right.mean() == pytest.approx(run.evaluation["value"])
    assert len(predictions) == len(truth)
    shares = predictions[[f"probability of {name}" for name in CLASSES]]
    assert np.allclose(shares.sum(axis=1), 1)
    assert np.allclose(shares.max(axis=1), predictions["confidence"])


def test_predictions_keep_the_order_and_take_what_is_new(zoo: tuple[Path, hesse.Run]) -> None:
    table, run = zoo
    rows = pd.read_csv(table).drop(columns=TARGET)
    whole = run.predict(pa.Table.from_pandas(rows), data_root=table.parent)
    back = run.predict(pa.Table.from_pandas(rows[::-1].reset_index(drop=True)), data_root=table.parent)
    assert whole[TARGET].to_pylist() == back[TARGET].to_pylist()[::-1]
    rows.loc[0] = [None] * rows.shape[1]
    rows.loc[1, 'co"lour 🎂'] = "never seen"
    rows["extra"] = 1
    with pytest.warns(UserWarning, match="never seen"):
        new = run.predict(pa.Table.from_pandas(rows), data_root=table.parent)
    assert new[TARGET].null_count == 0
    assert new[TARGET].to_pylist()[2:] == whole[TARGET].to_pylist()[2:]
    rows.loc[1, 'co"lour 🎂'] = "red"
    with pytest.warns(UserWarning, match="column 'sound': The table lacks this column"):
        deaf = run.predict(pa.Table.from_pandas(rows.drop(columns="sound")), data_root=table.parent)
    assert deaf[TARGET].null_count == 0


def test_unreadable_rows_stop_or_are_left_empty(zoo: tuple[Path, hesse.Run], tmp_path: Path) -> None:
    table, run = zoo
    rows = pd.read_csv(table)
    (table.parent / "broken.png").write_bytes(b"no picture")
    rows.loc[3, "写真.png"] = "broken.png"
    frame = pa.Table.from_pandas(rows)
    with pytest.raises(InputError, match="row 4"):
        run.predict(frame, data_root=table.parent, strict=True)
    with pytest.warns(UserWarning, match=r"1 of 60 rows cannot be read.*row 4"):
        predictions = run.predict(frame, data_root=table.parent)
    assert [i for i, value in enumerate(predictions[TARGET].to_pylist()) if value is None] == [3]
    with pytest.raises(InputError, match="row 4"):
        train(frame, TARGET, data_root=table.parent, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    skipping = train(frame, TARGET, data_root=table.parent, out=tmp_path / "run", skip_bad_rows=True, epochs=1)
    assert skipping.findings[0]["kind"] == "skipped rows"
    assert sum(skipping.config["split"].values()) == len(rows) - 1


def test_regression(tmp_path: Path) -> None:
    run = train(pa.table(numbers(200)), "age", out=tmp_path / "run", epochs=15, optimizer="kfac")
    assert run.config["task"] == "regression"
    assert run.evaluation["score"] == "r2"
    assert run.evaluation["value"] > 0.9 > run.evaluation["baseline"]
    predicted = run.predict(pa.table(numbers(200)))
    assert predicted.column_names == ["age"]
    assert np.corrcoef(predicted["age"].to_numpy(), numbers(200)["age"])[0, 1] > 0.95
    assert min(run.evaluation["actual"]) > 0  # in the target's own units


@pytest.mark.parametrize("rows", [4, 9, 20])
def test_tiny_tables(tmp_path: Path, rows: int) -> None:
    columns = {"x": [float(i % 2) + i / 100 for i in range(rows)], "kind": ["ab"[i % 2] for i in range(rows)]}
    run = train(pa.table(columns), "kind", out=tmp_path / "run")
    empty = run.config["split"]["test"] == 0
    assert empty == (rows < 8)
    assert run.evaluation["part"] == ("valid" if empty else "test")
    assert ("no test rows" in [finding["kind"] for finding in run.findings]) == empty


def test_a_class_that_is_absent_from_validation(tmp_path: Path) -> None:
    columns = {"x": [i / 7 for i in range(30)], "kind": ["a"] * 14 + ["b"] * 15 + ["rare"]}
    run = train(pa.table(columns), "kind", out=tmp_path / "run")
    assert len(run.evaluation["confusion"]) == 3


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame, pa.table])
def test_data_frames(tmp_path: Path, frame: Any) -> None:
    columns = {name: values for name, values in numbers().items() if name != "age"}
    run = train(frame(columns), out=tmp_path / "run", epochs=1)
    other = train(numbers_csv(tmp_path / "data.csv"), out=tmp_path / "file", epochs=1)
    assert (run.folder / "model.safetensors").read_bytes() == (other.folder / "model.safetensors").read_bytes()
    predicted = run.predict(frame(columns))
    assert predicted.equals(other.predict(tmp_path / "data.csv"))
    assert run.config["command"].startswith("hesse train TABLE --target species")
    assert run.config["python_call"].startswith("hesse.train(table, target='species'")


@pytest.mark.parametrize("target", ["confidence", "probability of a", "self", "a,b\n\"c'", "🙂"])
def test_names_of_predictions_never_collide(tmp_path: Path, target: str) -> None:
    frame = pa.table({"x": [0.0, 1.0] * 10, target: ["a", "b"] * 10})
    predictions = train(frame, target, out=tmp_path / "run", epochs=1).predict(frame)
    assert predictions.column_names[0] == target
    assert len(set(predictions.column_names)) == 4


@pytest.mark.parametrize(
    "target", ["../../up", "/etc", "..", "a/b", "a\\b", "~", "x" * 300, "種" * 200, "🙂", "con:aux"]
)
def test_no_name_leads_out_of_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.chdir(tmp_path)
    frame = pa.table({"x": [0.0, 1.0] * 10, target: ["a", "b"] * 10})
    run = train(frame, target, epochs=1)
    assert run.folder.parent == Path("runs")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_the_command_and_the_python_call_repeat_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hesse.cli.app import app

    numbers_csv(tmp_path / "one" / "my data.csv")
    options = {"columns": {"kind": "ignore"}, "batch_size": 8, "seed": 7, "lr": 0.01, "compare": ["sgd"]}
    monkeypatch.chdir(tmp_path / "one")
    run = train("my data.csv", out="a run", **options)
    config, metrics, model = run.config, read_lines(run.folder / "metrics.jsonl"), contents(run.folder)
    for repeat in ("command", "python_call"):
        (tmp_path / "one" / "a run").rename(tmp_path / f"before {repeat}")
        if repeat == "command":
            program, *arguments = shlex.split(config["command"])
            assert program == "hesse"
            app(arguments, standalone_mode=False)
        else:
            eval(config["python_call"], {"hesse": hesse})
        again = hesse.Run("a run")
        same = [{**row, "seconds": 0, "waited": 0} for row in metrics]
        assert [{**row, "seconds": 0, "waited": 0} for row in read_lines(again.folder / "metrics.jsonl")] == same
        assert contents(again.folder)["model.safetensors"] == model["model.safetensors"]
        assert again.config["arguments"] == config["arguments"]


def test_the_defaults_that_are_recorded_are_those_of_train() -> None:
    parameters = inspect.signature(hesse.train).parameters
    for name, value in call.DEFAULTS.items():
        default = parameters[name].default
        assert value == (type(value)() if default in (None, ()) and value is not None else default), name
    assert set(parameters) - set(call.DEFAULTS) == {
        "table",
        "target",
        "resume",
        "overwrite",
        "notes",
        "verbose",
        "on_epoch",
    }


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"optimizer": "newton"}, "no such optimizer"),
        ({"compare": ["newton"]}, "no such optimizer"),
        ({"optimizer": "kfac", "lr": 0.1}, "unused learning rate"),
        ({"lr": -1.0}, "bad learning rate"),
        ({"lr": math.nan}, "bad learning rate"),
        ({"lr": math.inf}, "bad learning rate"),
        ({"epochs": 0}, "bad argument"),
        ({"epochs": -3}, "bad argument"),
        ({"epochs": 2.5}, "bad argument"),
        ({"batch_size": 0}, "bad argument"),
        ({"seconds": 0}, "bad argument"),
        ({"seconds": math.nan}, "bad argument"),
        ({"seed": -1}, "bad argument"),
        ({"seed": 2**32}, "bad argument"),
        ({"columns": {"nowhere": "text"}}, "no such column"),
        ({"columns": {"x": "poem"}}, "unknown kind"),
        ({"split_column": "nowhere"}, "no such split column"),
        ({"target": "nowhere"}, "no such target"),
        ({"resume": True, "overwrite": True}, "two wishes"),
    ],
)
def test_a_refused_argument_leaves_nothing(tmp_path: Path, options: dict[str, Any], kind: str) -> None:
    with pytest.raises(InputError) as error:
        train(pa.table(numbers()), **{"target": "species", "out": tmp_path / "run", **options})
    assert error.value.finding.kind == kind
    assert error.value.finding.remedy
    assert not (tmp_path / "run").exists()


def test_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    run = train(pa.table(numbers()), out=tmp_path, epochs=np.int64(1), lr=np.float64(0.01), batch_size=np.int32(8))
    assert (run.config["epochs"], run.config["lr"], run.config["batch_size"]) == (1, 0.01, 8)


def test_the_summary_names_what_ran_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(pa.table(numbers()), out=tmp_path, epochs=1, compare=["sgd"], verbose=True)
    assert list(run.compared) == ["sgd"]
    assert f"sgd beside it  {run.compared['sgd']['value']:.4f}" in " ".join(capsys.readouterr().err.split("\n"))


def test_an_old_run_is_kept_until_the_new_input_is_read(tmp_path: Path) -> None:
    table = numbers_csv(tmp_path / "data.csv")
    run = train(table, out=tmp_path / "run", compare=["sgd"])
    (run.folder / "notes of mine.txt").write_text("keep", encoding="utf-8")
    (run.folder / "model.onnx").write_text("as hesse export leaves it: of the old model", encoding="utf-8")
    before = contents(run.folder)
    with pytest.raises(InputError, match="There is a run in this folder already"):
        train(table, out=tmp_path / "run")
    bad = write_csv(tmp_path / "bad.csv", ["x", "species"], [["1", "a"], ["2", "a"]])
    for arguments in ((tmp_path / "absent.csv", "species"), (bad, "species"), (table, "nothing")):
        with pytest.raises(InputError):
            train(*arguments, out=tmp_path / "run", overwrite=True)
    assert contents(run.folder) == before
    train(table, out=tmp_path / "run", overwrite=True, seed=1, epochs=1)
    after = contents(run.folder)
    assert after["notes of mine.txt"] == b"keep"
    assert after["model.safetensors"] != before["model.safetensors"]
    assert not (run.folder / "compare").exists() and not (run.folder / "model.onnx").exists()


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    """A folder of another program may hold a config.json and a model.safetensors, too."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["Bert"]}', encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"years of work")
    (tmp_path / "file").write_text("", encoding="utf-8")
    before = contents(tmp_path)
    for place in (folder, tmp_path / "file"):
        with pytest.raises(InputError, match=r"other files|is a file"):
            train(pa.table(numbers()), out=place, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_a_run_that_diverges_says_so(tmp_path: Path, rate: float) -> None:
    with pytest.raises(InputError, match="lower --lr") as error:
        train(pa.table(numbers(200)), "age", out=tmp_path / "run", optimizer="sgd", lr=rate, epochs=5)
    assert error.value.finding.kind == "diverged"
    folder = tmp_path / "run"
    assert "non_finite" in {finding["kind"] for finding in read_json(folder / "findings.json")}
    assert (folder / "report.html").exists()
    assert not (folder / "model.safetensors").exists()
    assert len(read_lines(folder / "metrics.jsonl")) == 1  # it is not flogged on
    with pytest.raises(InputError, match="no model"):
        hesse.Run(folder).predict(pa.table(numbers()))


def test_the_last_good_weights_survive_a_late_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_step = loop.take_step

    def step(plan: Any, state: Any, *batch: Any) -> float:
        if state.epoch == 2:
            with torch.no_grad():
                next(state.model.parameters()).fill_(math.nan)
        return take_step(plan, state, *batch)

    monkeypatch.setattr(loop, "take_step", step)
    run = train(pa.table(numbers()), out=tmp_path / "run", epochs=9, verbose=True)
    assert [row["valid_loss"] is None for row in read_lines(run.folder / "metrics.jsonl")] == [False, False, True]
    assert 0 <= run.evaluation["value"] <= 1
    assert "best epoch     2 of 3, then it diverged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["写真.png", "sound", "self", "weight (kg)", 'co"lour 🎂'])
def test_one_modality_alone_is_a_table_too(name: str, tmp_path: Path) -> None:
    """With what is done by default against modalities that starve, for which there must be two."""
    table = pets(tmp_path / "zoo")
    alone = pa.csv.read_csv(table).select([name, TARGET])
    run = hesse.train(alone, TARGET, out=tmp_path / "run", data_root=table.parent, epochs=1, verbose=False)
    assert (run.config["balance"], run.config["optimizer"], len(run.schema.modalities)) == ("pool", "kfac", 1)
    assert math.isfinite(run.evaluation["loss"]) and 0 <= run.evaluation["value"] <= 1
    again = hesse.Run(run.folder).predict(alone, data_root=table.parent)
    assert again[TARGET].null_count == 0 and (run.folder / "report.html").exists()


@pytest.mark.parametrize("target", ["species", "age"])
def test_numbers_alone_are_a_table_too(target: str, tmp_path: Path) -> None:
    table = pa.table({name: column for name, column in numbers().items() if name in ("x", "y", target)})
    run = hesse.train(table, target, out=tmp_path / "run", epochs=5, verbose=False)
    assert run.config["balance"] == "pool" and [column.kind for column in run.schema.inputs] == ["number"] * 2
    assert run.evaluation["value"] > 0.5
    assert run.predict(table.drop([target]))[target].null_count == 0


def test_a_limit_of_seconds_ends_within_an_epoch(tmp_path: Path) -> None:
    run = train(pa.table(numbers()), out=tmp_path / "run", epochs=None, seconds=1e-6)
    assert len(read_lines(run.folder / "steps.jsonl")) == 1
    assert run.evaluation["n"] > 0
    longer = train(pa.table(numbers()), out=tmp_path / "run", epochs=None, seconds=0.1, resume=True)
    assert read_lines(longer.folder / "steps.jsonl")[-1]["seconds"] >= 0.1
    assert "--seconds 0.1" in longer.config["command"]


def test_training_stops_when_validation_gets_no_better(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = pa.table({"x": random.normal(size=60), "kind": random.choice(["a", "b"], size=60)})
    run = train(noise, "kind", out=tmp_path / "run", epochs=None, optimizer="adam", lr=0.05)
    metrics = read_lines(run.folder / "metrics.jsonl")
    best = max(row["epoch"] for row in metrics if row["best"])
    assert metrics[-1]["epoch"] == best + 8 < 40
    assert run.config["patience"] == 8


def test_bit_for_bit_repeatable(tmp_path: Path) -> None:
    runs = [train(pa.table(numbers()), out=tmp_path / name, optimizer="kfac") for name in "ab"]
    first, second = (contents(run.folder)["model.safetensors"] for run in runs)
    assert first == second
    other = train(pa.table(numbers()), out=tmp_path / "c", optimizer="kfac", seed=1)
    assert contents(other.folder)["model.safetensors"] != first


def test_kept_steps_are_few_and_evenly_spaced() -> None:
    rows: list[dict[str, Any]] = []
    for step in range(1, 9001):
        _keep(rows, {"step": step})
        assert len(rows) <= MOST_STEPS_KEPT
    gaps = {b["step"] - a["step"] for a, b in pairwise(rows)}
    assert len(gaps) == 1 and rows[0]["step"] == 1 and len(rows) > MOST_STEPS_KEPT / 2
