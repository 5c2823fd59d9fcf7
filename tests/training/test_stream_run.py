"""Training on a table that is read while training: the same run by any number of workers and processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

import hesse
from hesse import InputError
from hesse.files import read_json, read_lines
from hesse.multimodal.stream import blocks, divide, open_source
from hesse.multimodal.stream.divide import TRAIN
from hesse.training import course, job, streamed
from training_runs import at_step, ctrl_c, records
from training_tables import TARGET, numbers, numbers_csv, pets, write_csv

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(autouse=True)
def every_epoch_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "SAVED", 0.0)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pets(tmp_path_factory.mktemp("zoo"), rows=150)


def train(table: Any, out: Path, target: str = TARGET, **options: Any) -> hesse.Run:
    settings = {"epochs": 2, "optimizer": "adamw", "verbose": False, "batch_size": 16, "workers": 0, "stream": True}
    return hesse.train(table, target, out=out, **{**settings, **options})


def without(found: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in names}


def test_a_streamed_run_learns_predicts_and_says_what_it_did(zoo: Path, tmp_path: Path) -> None:
    run = train(zoo, tmp_path / "run", optimizer="kfac", epochs=3)
    assert run.evaluation["value"] > 0.6
    assert run.config["streamed"] is True and run.config["rows"] == 150
    split = run.config["split"]
    assert sum(split.values()) == 150 and split["train"] > 100
    assert run.config["held"] == {"sample": split["train"], "valid": split["valid"], "test": split["test"]}
    assert run.findings[0]["kind"] == "streamed" and f"{split['train']} rows are read" in run.findings[0]["message"]
    assert "--stream --workers 0" in run.config["command"]
    assert run.predict(zoo)[TARGET].null_count == 0
    rows = read_lines(run.folder / "metrics.jsonl")
    assert all(0 < row["waited"] < row["seconds"] for row in rows)
    assert rows[-1]["step"] == 3 * -(-split["train"] // 16)


def test_workers_change_nothing(zoo: Path, tmp_path: Path) -> None:
    first, second = train(zoo, tmp_path / "a"), train(zoo, tmp_path / "b", workers=2)
    assert records(first.folder) == records(second.folder)


@pytest.mark.parametrize("step", [3, 8])
def test_interrupted_in_the_middle_of_an_epoch_and_resumed_is_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 300)
    monkeypatch.setattr(streamed, "FEWEST", 20)
    monkeypatch.setattr(streamed, "MOST", 20)
    table = numbers_csv(tmp_path / "data.csv", rows=120)
    options = {"target": "species", "optimizer": "kfac"}
    whole = train(table, tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        at_step(patched, step, ctrl_c)
        with pytest.raises(KeyboardInterrupt, match=r"--stream --workers 0 .*--resume"):
            train(table, tmp_path / "cut", **options)
    assert len(read_lines(tmp_path / "cut" / "steps.jsonl")) == step
    train(table, tmp_path / "cut", resume=True, **options)
    assert records(tmp_path / "cut") == records(whole.folder)


def test_what_is_hidden_is_hidden_again_after_an_interruption(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(zoo, tmp_path / "whole", epochs=1)
    with monkeypatch.context() as patched:
        at_step(patched, 4, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            train(zoo, tmp_path / "cut", epochs=1)
    assert records(train(zoo, tmp_path / "cut", epochs=1, resume=True).folder) == records(whole.folder)


def test_a_resumed_run_streams_as_it_did(tmp_path: Path) -> None:
    table = numbers_csv(tmp_path / "data.csv", rows=120)
    run = train(table, tmp_path / "run", "species", epochs=1)
    again = hesse.train(table, "species", out=run.folder, epochs=2, resume=True, verbose=False, workers=0)
    assert again.config["streamed"] is True
    assert records(again.folder) == records(train(table, tmp_path / "whole", "species").folder)
    with pytest.raises(InputError, match="stream"):
        hesse.train(table, "species", out=run.folder, resume=True, verbose=False, stream=False)
    numbers_csv(table, rows=130)
    with pytest.raises(InputError, match="it had 120 rows and has 130"):
        hesse.train(table, "species", out=run.folder, resume=True, verbose=False)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    columns = numbers(240)
    parts = ["train"] * 192 + ["valid"] * 24 + ["test"] * 24  # six batches of 32, which two processes halve
    rows = list(zip(columns["x"], columns["y"], columns["species"], parts, strict=True))
    table = write_csv(tmp_path / "data.csv", ["x", "y", "species", "part"], rows)
    two = tmp_path / "two"
    one = train(table, tmp_path / "one", "species", batch_size=32, split_column="part")
    words = ["train", table, "--target", "species", "--out", two, "--batch-size", 32, "--epochs", 2, "--json"]
    words += ["--optimizer", "adamw", "--stream", "--workers", 1, "--split-column", "part"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TORCHRUN, "-m", "hesse", *map(str, words)], capture_output=True, text=True, env=env, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["evaluation"] == read_json(two / "evaluation.json")
    found, wanted = ([row["loss"] for row in read_lines(run / "steps.jsonl")] for run in (two, one.folder))
    assert found == pytest.approx(wanted, rel=1e-4) and len(found) == 12
    found, wanted = ([row["valid_loss"] for row in read_lines(run / "metrics.jsonl")] for run in (two, one.folder))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_bad_row_stops_and_the_mended_table_goes_on_or_is_skipped(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "HELD", 10)
    monkeypatch.setattr(streamed, "SAMPLE", 10)
    division = divide(open_source(zoo), [TARGET], None, 0)
    held = {*division.sample(10).tolist(), *division.examples.tolist()}
    names = pd.read_csv(zoo, dtype=str)["写真.png"]
    bad = next(row for row in division.rows(TRAIN).tolist() if row not in held and isinstance(names[row], str))
    picture = zoo.parent / names[bad]
    content = picture.read_bytes()
    options: dict[str, Any] = {"data_root": zoo.parent, "target": TARGET}
    try:
        picture.write_bytes(b"no picture" * 10)
        with pytest.raises(InputError, match=f"row {bad + 1}.*--resume") as error:
            train(zoo, tmp_path / "bad", **options)
        assert read_json(tmp_path / "bad" / "config.json")["status"] == "interrupted"
        assert "--skip-bad-rows" in str(error.value)
        skipping = train(zoo, tmp_path / "skip", skip_bad_rows=True, **options)
    finally:
        picture.write_bytes(content)
    train(zoo, tmp_path / "bad", resume=True, **options)
    whole = train(zoo, tmp_path / "whole", **options)
    assert records(tmp_path / "bad") == records(whole.folder)
    kinds = [finding["kind"] for finding in skipping.findings]
    (count,) = (finding for finding in skipping.findings if finding["kind"] == "skipped rows")
    assert count["message"].startswith("1 training rows cannot be read")
    assert f"row {bad + 1}," in skipping.findings[kinds.index("skipped rows") + 1]["where"]


@pytest.mark.parametrize("folder", [True, False])
def test_what_memory_cannot_hold_is_streamed_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    table = numbers_csv(tmp_path / "data" / "data.csv", rows=120)
    options: dict[str, Any] = {"epochs": 1, "optimizer": "adamw", "verbose": False}
    assert not hesse.train(table, "species", out=tmp_path / "held", **options).config["streamed"]
    if not folder:
        monkeypatch.setattr(streamed, "free", lambda: 100)
    run = hesse.train(table.parent if folder else table, "species", out=tmp_path / "run", **options)
    assert run.config["streamed"]
    assert not hesse.train(table, "species", out=tmp_path / "no", stream=False, **options).config["streamed"]


def test_files_that_decode_to_more_than_memory_are_streamed(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "cells_are_many", lambda table: False)
    monkeypatch.setattr(streamed, "free", lambda: 200_000)
    assert hesse.train(zoo, TARGET, out=tmp_path / "run", epochs=1, optimizer="adamw", verbose=False).config["streamed"]


def test_free_memory_is_less_than_there_is() -> None:
    assert 1 << 20 < streamed.free() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_split_column_and_a_frame_stream_too(tmp_path: Path) -> None:
    columns = {**numbers(200), "part": (["train"] * 8 + ["valid", "test"]) * 20}
    run = train(pa.table(columns), tmp_path / "run", "species", split_column="part")
    assert run.config["split"] == {"train": 160, "valid": 20, "test": 20}
    assert [column.role for column in run.schema.columns if column.name == "part"] == ["split"]
    regression = train(
        pa.table(columns), tmp_path / "age", "age", epochs=6, optimizer="kfac", columns={"part": "ignore"}
    )
    assert regression.evaluation["score"] == "r2" and regression.evaluation["value"] > 0.8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": "nowhere"}, "no column 'nowhere'"),
        ({"split_column": "nowhere"}, "no column 'nowhere'"),
        ({"workers": -1}, "workers"),
    ],
)
def test_a_refused_argument_leaves_nothing(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        train(pa.table(numbers()), tmp_path / "run", **{"target": "species", **options})
    assert not (tmp_path / "run").exists()


def test_the_spectrum_of_a_streamed_run_is_of_rows_that_were_held_out(tmp_path: Path) -> None:
    table = numbers_csv(tmp_path / "data" / "data.csv", rows=200)
    run = train(table.parent, tmp_path / "run", "species", epochs=1)
    record = run.spectrum(rows=16, k=2, out=tmp_path / "spectrum")
    assert record["part"] == "test"
    numbers_csv(table, rows=210)
    with pytest.raises(InputError, match="it had 200 rows and has 210"):
        run.spectrum(rows=16, k=2, out=tmp_path / "spectrum")


def test_a_class_of_one_row_far_down_is_known(tmp_path: Path) -> None:
    rows = [[str(i), "ab"[i % 2]] for i in range(300)]
    rows[250][1] = "rare"
    run = train(
        write_csv(tmp_path / "t.csv", ["x", "y"], rows), tmp_path / "run", "y", epochs=1, columns={"x": "number"}
    )
    assert run.config["classes"] == ["a", "b", "rare"]
