"""``hesse spectrum``: a table on stdout, progress on stderr, two files, and a sentence where there is no result."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from safetensors.torch import save_file
from typer.testing import CliRunner

from hesse.cli import app as cli
from hesse.cli.spectrum import _text
from hesse.files import read_json
from hesse.multimodal import model
from hesse.multimodal.encoders import columns
from training_tables import numbers_csv


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Networks of about a hundred parameters instead of thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "HIDDEN", 5)
        patch.setattr(model, "FEATURES", 4)
        patch.setattr(columns, "FEATURES", 4)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    table = numbers_csv(folder / "data.csv")
    arguments = ["train", str(table), "--target", "species", "--out", str(folder / "run"), "--epochs", "1", "-q"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    return folder / "run"


def hesse(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, run in this process."""
    words = [str(argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["hesse", *words])
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(cli.app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_table_two_files_and_progress(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = hesse(monkeypatch, "spectrum", trained, "-k", "3")
    assert code == 0
    record = read_json(trained / "spectrum.json")
    lines = out.splitlines()
    assert lines[0].startswith("cross-entropy 0.") and f"on 6 of 6 test rows, {record['parameters']} param" in lines[0]
    assert [line.split()[:2] for line in lines[3:6]] == [["eigenvalue", str(i)] for i in (1, 2, 3)]
    assert f"{record['hessian']['eigenvalues'][0]['value']:.4g}"[:4] in lines[3]
    assert lines[-1] == f"page: {trained / 'spectrum.html'}" and (trained / "spectrum.html").exists()
    assert all(name in out for name in ("most negative", "trace", "columns", "fusion and head", "whole model"))
    assert err.count("products") == 9 and "\x1b" not in err


def test_json(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--split", "valid", "--rows", "5", "--batch-size", "2", "-k", "1", "--seed", "7", "--out", tmp_path)
    code, out, _ = hesse(monkeypatch, "spectrum", trained, *arguments, "--json")
    assert code == 0
    (line,) = out.splitlines()
    result = json.loads(line)
    assert result["ok"] is True and result["page"] == str(tmp_path / "spectrum.html")
    assert result["spectrum"] == read_json(tmp_path / "spectrum.json")
    asked = {key: result["spectrum"][key] for key in ("part", "rows", "batch_size", "seed")}
    assert asked == {"part": "valid", "rows": 5, "batch_size": 2, "seed": 7}


def test_columns_are_aligned_whatever_the_names(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hesse(monkeypatch, "spectrum", trained)
    record = read_json(trained / "spectrum.json")
    record["blocks"][0] |= {"name": "写真\nの 列 🦊", "share": None, "effective_dimension": None}
    record["blocks"][0]["trace"]["converged"] = False
    text = _text(record)
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("block"))
    assert len({cell_len(line) for line in lines[head : head + 4]}) == 1
    assert "写真 の 列 🦊" in text and " *" in text


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--split", "testing"], 1, "Choose from train, valid, test"),
        (["--table", "absent.csv"], 1, "no such file"),
        (["--rows", "0"], 2, "--rows"),
        (["-k", "0"], 2, "-k"),
        (["--seed", "-1"], 2, "--seed"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_bad_arguments(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, says: str
) -> None:
    out_folder = tmp_path / "new"
    got, out, err = hesse(monkeypatch, "spectrum", trained, *options, "--out", out_folder)
    assert (got, out) == (code, "")
    assert says in err and "Traceback" not in err
    assert not out_folder.exists()


@pytest.mark.parametrize("damage", ["absent", "empty", "no model", "cut", "foreign", "nan", "config", "moved table"])
def test_damaged_runs_are_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    weights = run / "model.safetensors"
    for made in run.glob("spectrum.*"):
        made.unlink()
    where: Any = run
    match damage:
        case "absent":
            shutil.rmtree(run)
        case "empty":
            shutil.rmtree(run)
            run.mkdir()
        case "no model":
            weights.unlink()
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "foreign":
            save_file({"weight": torch.zeros(3)}, weights)
        case "nan":
            from safetensors.torch import load_file

            save_file({name: torch.full_like(t, torch.nan) for name, t in load_file(weights).items()}, weights)
        case "config":
            (run / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
        case "moved table":
            config = (run / "config.json").read_text(encoding="utf-8")
            (run / "config.json").write_text(config.replace("data.csv", "gone.csv"), encoding="utf-8")
            where = "gone.csv"
    code, out, err = hesse(monkeypatch, "spectrum", run, "--json")
    assert code == 1
    error = json.loads(out)["error"]
    assert error["remedy"] and str(where) in error["where"]
    assert err.splitlines()[-1].startswith("hesse: ") and "Traceback" not in err
    assert not list(tmp_path.rglob("spectrum.*"))
