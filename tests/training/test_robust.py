"""What a run folder survives: two processes, a kill, a full disk, a caller who has seen enough."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hesse
from hesse import InputError
from hesse.cli.app import app
from hesse.files import read_json, read_lines, write_text
from hesse.training import course, job, owned
from training_runs import at_step, records
from training_tables import numbers_csv, write_csv


@pytest.fixture(autouse=True)
def every_epoch_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "SAVED", 0.0)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return numbers_csv(tmp_path / "data.csv")


def train(table: Path, out: Path, **options: Any) -> hesse.Run:
    settings = {"epochs": 3, "verbose": False, "batch_size": 16, "optimizer": "adamw"}
    return hesse.train(table, "species", out=out, **{**settings, **options})


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes: as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_is_trained_in_is_refused_and_can_be_read(table: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def meanwhile(row: dict[str, Any]) -> None:
        if row["epoch"] != 2:
            return
        assert hesse.Run(tmp_path / "run").predict(table).num_rows == 64
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError) as error:
                train(table, tmp_path / "run", **how)
            seen.append(str(error.value))

    run = train(table, tmp_path / "run", on_epoch=meanwhile)
    whole = train(table, tmp_path / "whole")
    assert len(seen) == 2
    assert all(f"run in use at {run.folder}: Process {os.getpid()} on" in sentence for sentence in seen)
    assert records(run.folder) == records(whole.folder)
    assert left(run.folder) == left(whole.folder)
    assert ".lock" not in left(run.folder)
    train(table, run.folder, resume=True, epochs=4)


def test_of_two_that_begin_at_once_one_is_refused(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have looked at the folder before either owns it."""
    run = train(table, tmp_path / "run", epochs=1)

    def other_goes_first(options: dict[str, Any]) -> None:
        def refuse(folder: Path) -> None:
            monkeypatch.undo()
            train(table, folder, **options)

        monkeypatch.setattr(job, "refuse_owned", refuse)

    other_goes_first({"epochs": 2, "resume": True})
    with pytest.raises(InputError, match="Another process has gone on with this run meanwhile"):
        train(table, run.folder, resume=True, epochs=5)
    other_goes_first({"epochs": 2})
    with pytest.raises(InputError, match="There is a run in this folder already"):
        train(table, tmp_path / "new", epochs=1)
    assert len(read_lines(tmp_path / "new" / "metrics.jsonl")) == 2


def test_a_lock_file_that_vanishes_while_it_is_locked_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, take = tmp_path / ".lock", owned._take
    turns = iter((lambda: path.unlink(), lambda: (path.unlink(), path.touch()), lambda: None))

    def late(*arguments: Any) -> None:
        take(*arguments)
        next(turns)()

    monkeypatch.setattr(owned, "_take", late)
    with owned.owned(tmp_path, None, False):
        monkeypatch.undo()
        assert path.read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(InputError, match="run in use"):
            owned.refuse_owned(tmp_path)
    owned.refuse_owned(tmp_path)
    assert not list(tmp_path.iterdir())


def _lives(pid: str) -> bool:
    """Whether there is such a process, and it is no zombie that nobody has asked for its end."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("stream", [True, False])
def test_after_a_kill_the_run_goes_on_at_once(table: Path, tmp_path: Path, stream: bool) -> None:
    """Workers that decode end with a killed parent, and do not keep its lock."""
    code = (
        f"import hesse, time; hesse.train({str(table)!r}, 'species', out={str(tmp_path / 'run')!r}, epochs=100000, "
        f"optimizer='adamw', batch_size=16, stream={stream}, workers=1, on_epoch=lambda row: time.sleep(0.02))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(InputError, match=f"Process {process.pid} on"):
            train(table, tmp_path / "run", resume=True, stream=stream, workers=0)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = workers.read_text(encoding="utf-8").split() if workers.exists() else []
        assert len(children) == stream or not workers.exists()
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(_lives, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_lives, children))
    assert ".lock" in left(tmp_path / "run")
    done = len(read_lines(tmp_path / "run" / "metrics.jsonl"))
    run = train(table, tmp_path / "run", resume=True, epochs=done + 2, workers=0)
    assert run.config["status"] == "finished"
    assert ".lock" not in left(run.folder)


def test_a_full_disk_is_said_and_what_was_saved_is_whole(table: Path, tmp_path: Path) -> None:
    whole = train(table, tmp_path / "whole")
    size = (whole.folder / "checkpoint.pt").stat().st_size

    def fill(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))

    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(InputError, match="no space") as error:
            train(table, tmp_path / "run", on_epoch=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finding = error.value.finding
    assert finding.where == str(tmp_path / "run" / "checkpoint.pt")
    assert "What was saved before is whole" in finding.message and "--resume" in finding.remedy
    assert not [name for name in left(tmp_path / "run") if name.startswith(".")]
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1
    train(table, tmp_path / "run", resume=True)
    assert records(tmp_path / "run") == records(whole.folder)


def test_a_disk_that_is_full_from_the_start_is_said(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Nothing was saved yet") as error, largest_file(20_000):
        train(table, tmp_path / "run")
    assert "--overwrite" in error.value.finding.remedy
    assert train(table, tmp_path / "run", overwrite=True).config["status"] == "finished"


def test_a_full_disk_while_predictions_are_written_leaves_the_old_ones(table: Path, tmp_path: Path) -> None:
    run = train(table, tmp_path / "run", epochs=1)
    many = write_csv(tmp_path / "many.csv", ["x", "y", "kind"], [["1", "2", "a"]] * 5000)
    for ending in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"p.{ending}"
        out.write_text("before")
        with largest_file(1000):
            done = CliRunner().invoke(app, ["predict", str(run.folder), str(many), "--out", str(out)])
        assert done.exit_code == 1
        assert "File too large" in done.stderr and str(out) in done.stderr
        assert out.read_text() == "before"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_error_while_writing_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large") as error, largest_file(10):
        write_text(tmp_path / "report.html", "x" * 100)
    assert error.value.filename == str(tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_the_caller_is_told_of_each_epoch_and_can_end_the_training(table: Path, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    rows: list[dict[str, Any]] = []

    def look(row: dict[str, Any]) -> None:
        rows.append(row)
        if row["epoch"] == 2:
            raise Enough

    with pytest.raises(Enough):
        train(table, tmp_path / "run", on_epoch=look)
    assert rows == read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert read_json(tmp_path / "run" / "config.json")["status"] == "interrupted"
    train(table, tmp_path / "run", resume=True)
    assert records(tmp_path / "run") == records(train(table, tmp_path / "whole").folder)


@pytest.fixture
def crashed(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that an error of ours ended in its second step, before anything was saved."""

    def crash() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        at_step(patched, 2, crash)
        with pytest.raises(ZeroDivisionError):
            train(table, tmp_path / "run")
    return tmp_path / "run"


def test_a_crash_in_the_middle_leaves_no_lock(table: Path, crashed: Path) -> None:
    assert ".lock" not in left(crashed)
    train(table, crashed, resume=True)


def test_a_run_that_came_to_nothing_gives_way_to_the_next(table: Path, crashed: Path) -> None:
    assert (crashed / "config.json").exists()
    assert train(table, crashed).config["status"] == "finished"
    with pytest.raises(InputError, match="There is a run in this folder already"):
        train(table, crashed)
