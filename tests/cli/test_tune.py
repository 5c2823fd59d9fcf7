"""``hesse tune``: a line a trial on stderr, a line of JSON on stdout, and every option reaches the search."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hesse.cli import app as cli
from hesse.training import call
from hesse.training.tune import search
from training_tables import numbers_csv

pytest.importorskip("optuna", reason="hesse[tune] is not installed")


def tune(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["tune", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_search_from_the_command_line_and_its_going_on(tmp_path: Path) -> None:
    table, out = numbers_csv(tmp_path / "data.csv"), tmp_path / "s"
    words = [table, "--target", "species", "--out", out, "--epochs", 1, "--sampler", "random", "--optimizer", "sgd"]
    code, line, err = tune(*words, "--trials", 2, "--json")
    result = json.loads(line)
    page = (out / "tune.html").read_bytes()
    (out / "tune.html").unlink()
    again = CliRunner().invoke(cli.app, ["report", str(out), "--json"])
    assert json.loads(again.stdout) == {"ok": True, "report": str(out / "tune.html")}
    assert (out / "tune.html").read_bytes() == page
    assert code == 0 and result["ok"] and [trial["number"] for trial in result["trials"]] == [0, 1]
    assert (
        err.startswith("trial   0  ") and "kfac, no search: valid loss" in err and f"page: {out / 'tune.html'}" in err
    )
    assert result["command"].startswith("hesse tune") and "--sampler random" in result["command"]
    code, line, err = tune(*words, "--trials", 3, "--resume", "--quiet")
    assert (code, line, err) == (0, "", "")
    code, line, err = tune(*words, "--json")
    assert code == 1 and json.loads(line)["error"]["kind"] == "search exists"


def test_every_option_reaches_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[str, Any] = {}

    def record(table: Any, target: Any, **given: Any) -> dict[str, Any]:
        got.update(given, table=table, target=target)
        return {}

    monkeypatch.setattr("hesse.training.tune.tune", record)
    options = "--target a --target b --out o --trials 3 --sampler random --optimizer sgd --seconds-per-trial 2 --jobs 2"
    options += " --timeout 9 --column x=text --encoder y=hf:z --trainable y=2 --split-column s --class-weights balanced"
    options += " --data-root d --delimiter ; --skip-bad-rows --fusion late --balance heads --stream"
    options += " --workers 3 --resume --seed 4"
    assert tune("t.csv", *options.split())[0] == 0
    expected = {
        "table": Path("t.csv"),
        "target": ["a", "b"],
        "out": Path("o"),
        "trials": 3,
        "sampler": "random",
        "optimizer": "sgd",
        "epochs": None,
        "seconds_per_trial": 2.0,
        "jobs": 2,
        "timeout": 9.0,
        "verbose": True,
        "columns": {"x": "text"},
        "encoders": {"y": "hf:z"},
        "trainable": {"y": "2"},
        "split_column": "s",
        "class_weights": "balanced",
        "data_root": Path("d"),
        "delimiter": ";",
        "skip_bad_rows": True,
        "fusion": "late",
        "balance": "heads",
        "stream": True,
        "workers": 3,
        "resume": True,
        "overwrite": False,
        "seed": 4,
    }
    assert got == expected
    assert set(inspect.signature(search.tune).parameters) - {"options"} <= set(expected)
    assert set(expected) - set(inspect.signature(search.tune).parameters) <= set(call.DEFAULTS)
    assert tune("t.csv", "--target", "a")[0] == 0
    shared = {
        "fusion",
        "balance",
        "skip_bad_rows",
        "stream",
        "workers",
    }  # with hesse train: what is not said is the same
    assert {name: got[name] for name in shared} == {name: call.DEFAULTS[name] for name in shared}


def test_help_states_the_space() -> None:
    text = " ".join(tune("--help")[1].split())
    for part in ("adamw, adam: 0.00001 to 0.1", "weight decay", "16 to 512"):
        assert part in text
