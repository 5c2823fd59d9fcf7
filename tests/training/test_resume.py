"""A run that was cut off and resumed must end where an uninterrupted one ends, to the last bit."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import hesse
from hesse import InputError
from hesse.files import read_json, read_lines
from hesse.training import course, loop
from training_runs import at_step, ctrl_c, records
from training_tables import numbers, numbers_csv

EPOCHS = 3


@pytest.fixture(autouse=True)
def every_epoch_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "SAVED", 0.0)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return numbers_csv(tmp_path / "data.csv")


def train(table: Any, out: Path, **options: Any) -> hesse.Run:
    return hesse.train(
        table, "species", **{"out": out, "epochs": EPOCHS, "verbose": False, "batch_size": 16, **options}
    )


@pytest.mark.parametrize("optimizer", ["kfac", "shampoo", "soap", "adamw", "lbfgs", "sgd"])
@pytest.mark.parametrize("step", [2, 4])
def test_interrupted_within_an_epoch_and_resumed_is_uninterrupted(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, step: int
) -> None:
    whole = train(table, tmp_path / "whole", optimizer=optimizer)
    with monkeypatch.context() as patched:
        at_step(patched, 4 + step, ctrl_c)  # four steps an epoch: in the middle of the second, and at its end
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            train(table, tmp_path / "cut", optimizer=optimizer)
    config = read_json(tmp_path / "cut" / "config.json")
    assert config["status"] == "interrupted"
    assert not (tmp_path / "cut" / "evaluation.json").exists()
    assert len(read_lines(tmp_path / "cut" / "steps.jsonl")) == 4 + step
    assert len(read_lines(tmp_path / "cut" / "metrics.jsonl")) == 1
    assert hesse.Run(tmp_path / "cut").report().exists()
    train(table, tmp_path / "cut", resume=True)
    assert records(tmp_path / "cut") == records(whole.folder)
    assert len(records(whole.folder)["metrics"]) == EPOCHS


@pytest.mark.parametrize("options", [{"optimizer": "kfac"}, {"optimizer": "lbfgs", "batch_size": 52, "lr": 0.01}])
def test_a_finished_run_goes_on_with_more_epochs(table: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    train(table, tmp_path / "longer", epochs=2, **options)
    run = train(table, tmp_path / "longer", epochs=4, resume=True, **options)
    assert records(run.folder) == records(train(table, tmp_path / "whole", epochs=4, **options).folder)
    assert all(row["valid_loss"] is not None for row in read_lines(run.folder / "metrics.jsonl"))
    assert "--epochs 4" in run.config["command"] and "--epochs 2" not in run.config["command"]


def test_resuming_a_finished_run_changes_nothing(table: Path, tmp_path: Path) -> None:
    run = train(table, tmp_path / "run")
    before = records(run.folder)
    (run.folder / "model.safetensors").unlink()  # and mends what is missing
    train(table, run.folder, resume=True)
    assert records(run.folder) == before


def test_records_newer_than_the_checkpoint_do_not_matter(table: Path, tmp_path: Path) -> None:
    """A crash between the writing of two files leaves them at different epochs."""
    train(table, tmp_path / "run", epochs=1)
    shutil.copy(tmp_path / "run" / "checkpoint.pt", tmp_path / "older.pt")
    whole = records(train(table, tmp_path / "run", resume=True).folder)
    shutil.copy(tmp_path / "older.pt", tmp_path / "run" / "checkpoint.pt")
    assert records(train(table, tmp_path / "run", resume=True).folder) == whole


def test_a_crash_before_the_first_checkpoint_loses_only_its_steps(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        at_step(patched, 2, crash)
        with pytest.raises(ZeroDivisionError):
            train(table, tmp_path / "cut")
    assert read_json(tmp_path / "cut" / "config.json")["status"] == "running"
    train(table, tmp_path / "cut", resume=True)
    assert records(tmp_path / "cut") == records(train(table, tmp_path / "whole").folder)


def test_a_second_ctrl_c_stops_at_once(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient() -> None:
        ctrl_c()
        ctrl_c()

    at_step(monkeypatch, 6, impatient)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        train(table, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert len(read_lines(tmp_path / "run" / "steps.jsonl")) == 4  # the epoch that was saved, not the step under way
    assert read_json(tmp_path / "run" / "config.json")["status"] == "interrupted"


def test_an_interrupted_comparison_is_taken_up_where_it_stopped(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        at_step(patched, 4 * EPOCHS + 1, ctrl_c)
        with pytest.raises(KeyboardInterrupt, match="--compare adamw --resume"):
            train(table, tmp_path / "run", compare=["adamw"])
    beside = tmp_path / "run" / "compare" / "adamw"
    assert [read_json(folder / "config.json")["status"] for folder in (tmp_path / "run", beside)] == ["interrupted"] * 2
    first = read_lines(beside / "steps.jsonl")
    model = (tmp_path / "run" / "model.safetensors").read_bytes()

    run = train(table, tmp_path / "run", compare=["adamw"], resume=True)
    assert run.config["status"] == hesse.Run(beside).config["status"] == "finished"
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model
    steps = read_lines(beside / "steps.jsonl")
    assert (
        steps[: len(first)] == first and steps[-1]["seconds"] >= read_lines(run.folder / "steps.jsonl")[-1]["seconds"]
    )
    assert hesse.Run(beside).evaluation["n"] == run.evaluation["n"]


def test_a_comparison_can_be_asked_for_later(table: Path, tmp_path: Path) -> None:
    train(table, tmp_path / "run", epochs=1)
    run = train(table, tmp_path / "run", epochs=1, resume=True, compare=["sgd"])
    assert (run.folder / "compare" / "sgd" / "evaluation.json").exists()
    assert "--compare sgd" in run.config["command"]


def test_both_optimizers_start_from_the_same_weights(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, take_step = [], loop.take_step

    def step(plan: Any, state: Any, *batch: Any) -> float:
        if state.step == 0:
            seen.append([p.detach().clone() for p in state.model.parameters()])
        return take_step(plan, state, *batch)

    monkeypatch.setattr(loop, "take_step", step)
    train(table, tmp_path / "run", epochs=1, compare=["adamw"])
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


def test_the_callers_random_numbers_are_left_alone(table: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(table, tmp_path / "run", epochs=1).predict(table)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"optimizer": "adamw"}, "another setting"),
        ({"seed": 3}, "another setting"),
        ({"batch_size": 8}, "another setting"),
        ({"columns": {"x": "category"}}, "another setting"),
        ({"overwrite": True}, "two wishes"),
    ],
)
def test_what_would_make_it_another_run_is_refused(
    table: Path, tmp_path: Path, change: dict[str, Any], kind: str
) -> None:
    run = train(table, tmp_path / "run", epochs=1)
    before = records(run.folder)
    with pytest.raises(InputError) as error:
        train(table, tmp_path / "run", resume=True, **change)
    assert error.value.finding.kind == kind
    assert records(run.folder) == before


def test_another_table_is_refused(tmp_path: Path) -> None:
    columns = numbers()
    train(pa.table(columns), tmp_path / "run", epochs=1)
    columns["x"][5] += 1.0
    with pytest.raises(InputError, match=r"columns have changed \(x\)"):
        train(pa.table(columns), tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="it had 64 rows and has 40"):
        train(pa.table(numbers(40)), tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="the target was 'species' and is 'kind'"):
        hesse.train(pa.table(numbers()), "kind", out=tmp_path / "run", resume=True, verbose=False)


def test_resume_without_a_run(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        train(table, tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()
