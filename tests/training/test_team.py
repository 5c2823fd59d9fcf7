"""The main job started by torchrun: the processes share each batch, and come to what one comes to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

pytest.importorskip("typer", reason="the hesse command needs the extra 'train'")

import hesse
from hesse.files import read_json, read_lines
from hesse.multimodal.balance import Pool
from hesse.training.team import Team
from training_tables import numbers_csv

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train_in_two(table: Path, out: Path, *options: object) -> tuple[str, str]:
    """What the command says on stdout and stderr."""
    words = ["-m", "hesse", "train", table, "--target", "species", "--out", out, "--batch-size", 32, "--json", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TORCHRUN, *map(str, words)], capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def train(table: Path, out: Path, optimizer: str, **options: Any) -> hesse.Run:
    settings = {"optimizer": optimizer, "epochs": 3, "batch_size": 32, "verbose": False, **options}
    return hesse.train(table, "species", out=out, **settings)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 240 rows 192 are trained on: six batches of 32, which two processes halve."""
    return numbers_csv(tmp_path_factory.mktemp("data") / "data.csv", rows=240)


def test_two_processes_train_by_kfac_what_one_trains_and_one_of_them_speaks(table: Path, tmp_path: Path) -> None:
    one, two = train(table, tmp_path / "one", "kfac"), tmp_path / "two"
    out, err = train_in_two(table, two, "--epochs", 3)
    (line,) = out.splitlines()
    assert json.loads(line)["evaluation"] == read_json(two / "evaluation.json")
    assert err.count("gradient check") == 1
    assert {path.name for path in two.iterdir()} == {path.name for path in one.folder.iterdir()}
    assert read_json(two / "config.json")["status"] == "finished"
    found, wanted = ([row["loss"] for row in read_lines(run / "steps.jsonl")] for run in (two, one.folder))
    assert len(found) == len(wanted) == 3 * 6
    assert found[:4] == pytest.approx(wanted[:4], rel=1e-3)  # later float32 and noisy batches lead apart
    assert read_json(two / "evaluation.json")["value"] == pytest.approx(one.evaluation["value"], abs=0.1)


@pytest.fixture
def mixed(table: Path, tmp_path: Path) -> Path:
    """Texts beside the numbers, not in all rows, and one row that cannot be halved in the last batch."""
    rows = pd.read_csv(table)[:-1]
    rows["said"] = [f"it is number {i % 7} of {i}" if i % 5 else None for i in range(len(rows))]
    rows.to_csv(tmp_path / "mixed.csv", index=False)
    return tmp_path / "mixed.csv"


def test_two_processes_resume_and_compare(mixed: Path, tmp_path: Path) -> None:
    """With what counts rows: a loss for each modality over those that have it, weights of the classes, uneven parts."""
    one, two = train(mixed, tmp_path / "one", "adamw", class_weights="balanced"), tmp_path / "two"
    assert isinstance(one.model(), Pool)
    train_in_two(mixed, two, "--optimizer", "adamw", "--class-weights", "balanced", "--epochs", 1)
    train_in_two(mixed, two, "--epochs", 3, "--resume", "--compare", "sgd")
    for key in ("train_loss", "valid_loss"):
        found, wanted = ([row[key] for row in read_lines(run / "metrics.jsonl")] for run in (two, one.folder))
        assert found == pytest.approx(wanted, rel=1e-5)  # float32
    assert (two / "compare" / "sgd" / "evaluation.json").exists()


def test_shares_are_the_whole_and_none_is_empty() -> None:
    for size in (1, 2, 3):
        for rows in (1, 2, 3, 7, 8):
            x = torch.arange(rows)
            shares = [Team(rank, size).share(x) for rank in range(size)]
            assert all(len(share) for share in shares)
            assert torch.equal(torch.cat(shares), x) or (rows < size and all(torch.equal(s, x) for s in shares))


def test_alone_nothing_is_waited_for() -> None:
    model = torch.nn.Linear(1, 1)
    Team().wait()
    assert Team.present() == Team()
    assert Team().replica(model) is model
