"""The command line: exit codes, one line of JSON on stdout, sentences on stderr, and no traceback."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import typer
from typer.testing import CliRunner

from hesse import training
from hesse.cli import app as cli
from hesse.cli.train import train as train_command
from hesse.files import read_json, read_lines
from hesse.multimodal.balance import CURES
from hesse.multimodal.columns import KINDS
from hesse.multimodal.fusion import FUSIONS
from hesse.training import call
from hesse.training.optimizers import OPTIMIZERS
from training_tables import CLASSES, TARGET, numbers_csv, pets, write_csv

HESSE = [sys.executable, "-c", "from hesse.cli import main; main()"]
FAST = ["--epochs", "1", "--optimizer", "adamw"]


def hesse(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, run in this process."""
    words = [str(argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["hesse", *words])

    result = CliRunner().invoke(cli.app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return numbers_csv(tmp_path / "data.csv")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table of files and, in ``run``, a run on it."""
    folder = tmp_path_factory.mktemp("zoo")
    path = pets(folder / "動物")
    result = CliRunner().invoke(
        cli.app, ["train", str(path), "--target", TARGET, "--out", str(folder / "run"), "--epochs", "2", "-q"]
    )
    assert result.exit_code == 0, result.stderr
    return folder


def test_train_prints_one_line_of_json(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = hesse(monkeypatch, "train", table, "--target", "species", "--out", tmp_path / "r", *FAST, "--json")
    assert code == 0
    (line,) = out.splitlines()
    result = json.loads(line)
    assert result["ok"] and result["status"] == "finished"
    assert result["evaluation"] == read_json(tmp_path / "r" / "evaluation.json")
    assert Path(result["report"]).exists()
    assert "epoch" in err and "\x1b" not in err
    code, out, err = hesse(monkeypatch, "train", table, "--target", "species", "--out", tmp_path / "q", *FAST, "-q")
    assert (code, out, err) == (0, "", "")


def test_predict_to_every_kind_of_file(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = zoo / "動物" / "pets.csv"
    code, csv_text, _ = hesse(monkeypatch, "predict", zoo / "run", table)
    assert code == 0 and csv_text.count("\n") == 61
    for ending in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"予測.{ending}"
        code, line, err = hesse(monkeypatch, "predict", zoo / "run", table, "--out", out, "--json")
        told = {"ok": True, "out": str(out), "rows": 60, "empty": 0, "failures": [], "findings": []}
        assert code == 0 and json.loads(line) == told
        assert "60 predictions" in err
    assert (tmp_path / "予測.csv").read_text(encoding="utf-8") == csv_text
    names = [row[TARGET] for row in read_lines(tmp_path / "予測.jsonl")]
    assert set(names) <= set(CLASSES) and len(names) == 60
    assert pyarrow.parquet.read_table(tmp_path / "予測.parquet")[TARGET].to_pylist() == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["予測.csv", "予測.jsonl", "予測.parquet"]


def test_report_rebuilds_the_page(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = zoo / "run" / "report.html"
    page.unlink()
    assert hesse(monkeypatch, "report", zoo / "run") == (0, f"{page}\n", "")
    code, line, _ = hesse(monkeypatch, "report", zoo / "run", "--json")
    assert json.loads(line) == {"ok": True, "report": str(page), "card": str(zoo / "run" / "card.md")} and code == 0


BAD_TABLES: dict[str, bytes] = {
    "empty.csv": b"",
    "header.csv": b"x,species\n",
    "one_row.csv": b"x,species\n1,a\n",
    "one_class.csv": b"x,species\n1,a\n2,a\n3,a\n",
    "duplicate.csv": b"x,x,species\n1,2,a\n2,3,b\n",
    "unnamed.csv": b",species\n1,a\n2,b\n",
    "latin.csv": "x,species\nä,a\nö,b\n".encode("latin-1"),
    "other.csv": b"x,kind\n1,a\n2,b\n",
    "mixed.csv": b"x,species\n" + b"".join(b"%d.5,a\n%d.7,b\n" % (i, i) for i in range(50)) + b"three,a\n",
    "ragged.csv": b"x,species\n1,a\n2,b,c\n",
    "table.xlsx": b"PK\x03\x04",
    "bad.parquet": b"PAR1nothing",
    "bad.jsonl": b'{"x": 1, "species": "a"}\n{"x": \n',
}


@pytest.mark.parametrize("name", [*BAD_TABLES, "absent.csv", "folder"])
def test_bad_tables_are_refused_with_a_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    if name in BAD_TABLES:
        (tmp_path / name).write_bytes(BAD_TABLES[name])
    before = sorted(tmp_path.rglob("*"))
    code, out, err = hesse(
        monkeypatch, "train", tmp_path / name, "--target", "species", "--out", tmp_path / "run", "--json"
    )
    assert code == 1
    error = json.loads(out)["error"]
    assert out.count("\n") == 1 and error["kind"] and error["where"] and error["message"]
    assert err.startswith("hesse: ") and error["message"] in err and "Traceback" not in err
    assert name in error["where"]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("cell", "kind"),
    [("broken.png", ""), ("absent.png", ""), ("../secret.png", "outside"), ("/etc/passwd", "outside")],
)
def test_bad_files_name_their_row(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell: str, kind: str
) -> None:
    from PIL import Image

    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(20):
        Image.new("L", (8, 8), 10 * i).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    rows = [[f"{i}.png", "ab"[i % 2]] for i in range(20)]
    rows[7][0] = cell
    path = write_csv(folder / "table.csv", ["photo", "kind"], rows)
    arguments = ("train", path, "--target", "kind", "--out", tmp_path / "run", "--column", "photo=image", *FAST)
    code, out, err = hesse(monkeypatch, *arguments)
    assert (code, out) == (1, "")
    assert "row 8" in err and "'photo'" in err and "Traceback" not in err and kind in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--epochs", "0"], 2, "--epochs"),
        (["--epochs", "many"], 2, "--epochs"),
        (["--batch-size", "-1"], 2, "--batch-size"),
        (["--nonsense"], 2, "--nonsense"),
        (["--column", "photo"], 2, "NAME=KIND"),
        (["--optimizer", "newton"], 1, "Choose from kfac"),
        (["--lr", "0.1"], 1, "kfac finds its own"),
        (["--optimizer", "sgd", "--lr", "-1"], 1, "positive"),
        (["--seconds", "0"], 1, "more than 0"),
        (["--seed", "-1"], 1, "seed"),
        (["--resume"], 1, "no such folder"),
        (["--resume", "--overwrite"], 1, "Choose one"),
    ],
)
def test_bad_arguments(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, says: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    got, out, err = hesse(monkeypatch, "train", table, "--target", "species", "--out", tmp_path / "run", *options)
    assert (got, out) == (code, "")
    assert says in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_predict_refuses(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = zoo / "動物" / "pets.csv"
    before = table.read_bytes()
    (tmp_path / "empty").mkdir()
    cases: list[tuple[tuple[Any, ...], int, str]] = [
        ((tmp_path / "nowhere", table), 1, "no such folder"),
        ((tmp_path / "empty", table), 1, "holds no config.json"),
        ((zoo / "run", tmp_path / "absent.csv"), 1, "no such file"),
        ((zoo / "run", table, "--out", tmp_path / "p.xlsx"), 1, "Use .csv, .jsonl or .parquet"),
        ((zoo / "run", table, "--out", tmp_path / "p"), 1, "Use .csv, .jsonl or .parquet"),
        ((zoo / "run", table, "--out", table), 1, "would replace the table"),
        ((zoo / "run", table, "--out", tmp_path / "f.csv" / "p.csv"), 1, "Check the path"),
        ((zoo / "run", table, "--json"), 2, "need --out"),
    ]
    (tmp_path / "f.csv").write_text("", encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "200")
    for arguments, code, says in cases:
        got, out, err = hesse(monkeypatch, "predict", *arguments)
        assert (got, out) == (code, ""), arguments
        assert says in err, err
    assert table.read_bytes() == before


@pytest.mark.parametrize("damage", ["no model", "cut", "rubbish", "foreign", "config", "columns", "list"])
def test_damaged_runs_are_refused(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, trained: Path
) -> None:
    import shutil

    import torch
    from safetensors.torch import save_file

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    model = run / "model.safetensors"
    match damage:
        case "no model":
            model.unlink()
        case "cut":
            model.write_bytes(model.read_bytes()[:-10])
        case "rubbish":
            model.write_bytes(b"\x80\x04pickle?" * 9)
        case "foreign":
            save_file({"weight": torch.zeros(3)}, model)
        case "config":
            (run / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
        case "columns":
            (run / "columns.json").write_text('{"columns": [', encoding="utf-8")
        case "list":
            (run / "config.json").write_text("[1, 2]", encoding="utf-8")
    code, out, err = hesse(monkeypatch, "predict", run, table, "--out", tmp_path / "p.csv", "--json")
    assert code == 1 and json.loads(out)["ok"] is False
    assert str(run) in err and "Traceback" not in err
    assert not (tmp_path / "p.csv").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    table = numbers_csv(folder / "data.csv")
    arguments = ["train", str(table), "--target", "species", "--out", str(folder / "run"), *FAST, "-q"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    return folder / "run"


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "0", **more}


def test_usage_errors_have_their_line_of_json() -> None:
    done = subprocess.run(
        [*HESSE, "train", "--json"], capture_output=True, text=True, encoding="utf-8", env=environment(), check=False
    )
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["kind"] == "usage" and "Missing argument" in done.stderr


def test_ctrl_c_saves_and_the_command_it_names_goes_on(tmp_path: Path) -> None:
    """In a real process, in an ASCII locale, with a second Ctrl-C that comes too late to matter."""
    table = numbers_csv(tmp_path / "daten ü.csv")
    command = [*HESSE, "train", table.name, "--target", "species", "--out", "run", "--epochs", "100000", "--json"]
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment(LC_ALL="C")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err and b"--resume" in err
    error = json.loads(out.decode("utf-8"))["error"]
    assert error["kind"] == "interrupted" and error["message"].endswith("--epochs 100000 --resume")
    assert read_json(tmp_path / "run" / "config.json")["status"] == "interrupted"
    epochs = len(read_lines(tmp_path / "run" / "metrics.jsonl"))
    done = subprocess.run(
        [*HESSE, "train", table.name, "--target", "species", "--out", "run", "--resume", "--epochs", str(epochs + 2)],
        capture_output=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == epochs + 2


@pytest.mark.parametrize("command", ["train", "tune"])
def test_help_tells_every_name_and_what_is_done_by_default(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = hesse(monkeypatch, command, "--help")[1].translate(dict.fromkeys(map(ord, "│\n"), " "))
    words = set(text.replace(",", " ").replace(";", " ").replace(":", " ").replace(".", " ").split())
    for names in (KINDS, ("ignore", "labels"), FUSIONS, CURES, set(OPTIMIZERS) - {command == "tune" and "kfac"}):
        assert set(names) <= words
    for default in ("runs/TABLE-TARGET", "at most 40", "80/10/10 by class", "the table's"):
        assert default in " ".join(text.split())


def test_no_help_has_square_brackets_of_its_own() -> None:
    """They would be taken for markup, and not be shown."""
    for command in typer.main.get_command(cli.app).commands.values():  # type: ignore[attr-defined]
        texts = [command.help, *(getattr(option, "help", "") for option in command.params)]
        assert not any("[" in (text or "") for text in texts), command.name


def test_the_command_the_function_and_the_record_have_the_same_arguments_in_the_same_order() -> None:
    words = [*inspect.signature(train_command).parameters]
    names = [*inspect.signature(training.train).parameters]
    several = {"column": "columns", "encoder": "encoders"}
    assert [several.get(word, word) for word in words if word not in ("as_json", "quiet")] == [
        name for name in names if name not in ("notes", "verbose", "on_epoch")
    ]
    assert [name for name in names if name in call.DEFAULTS] == list(call.DEFAULTS)
    described = re.findall(r"^ {8}(\w+): ", training.train.__doc__ or "", re.MULTILINE)
    assert [name for name in described if name in names] == names


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from hesse.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'pyarrow', 'rich.progress'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment())
