"""Cures in the main job: trained, resumed to the bit, predicting like any model; who answers alone is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import hesse
from hesse import InputError
from hesse.files import read_json, read_lines
from hesse.multimodal import FusedModel
from hesse.multimodal.balance import Cure, Pool
from hesse.training import course
from hesse.training.build import build_model, plain
from training_runs import at_step, ctrl_c, records
from training_tables import TARGET, numbers_csv, pets


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pets(tmp_path_factory.mktemp("zoo") / "zoo")


def train(table: Any, out: Path, **options: Any) -> hesse.Run:
    settings = {"out": out, "epochs": 2, "verbose": False, "batch_size": 16, "optimizer": "adamw", **options}
    return hesse.train(table, settings.pop("target", TARGET), **settings)


@pytest.mark.parametrize("name", ["pool", "gblend", "ogm-ge", "pmr"])  # those that remember something
def test_interrupted_and_resumed_is_uninterrupted(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(course, "SAVED", 0.0)
    whole = train(table, tmp_path / "whole", balance=name)
    with monkeypatch.context() as patched:
        at_step(patched, 5, ctrl_c)  # in the second epoch
        with pytest.raises(KeyboardInterrupt):
            train(table, tmp_path / "cut", balance=name)
    train(table, tmp_path / "cut", balance=name, resume=True)
    assert records(tmp_path / "cut") == records(whole.folder)


@pytest.mark.parametrize("optimizer", ["kfac", "soap"])
def test_a_pooled_run_predicts_with_whatever_is_there(table: Path, tmp_path: Path, optimizer: str) -> None:
    run = train(table, tmp_path / "run", balance="pool", optimizer=optimizer)
    assert run.config["balance"] == "pool"
    model = run.model()
    assert isinstance(model, Pool)
    assert isinstance(plain(model), FusedModel)
    assert bool(model.v.isfinite().all()) and float(model.v[-1].sum()) > 0
    whole = run.predict(table)
    assert len(whole) == 60
    source = pa.csv.read_csv(table)
    names = [name for name in source.column_names if name not in ("写真.png", TARGET)]
    blind = source.set_column(0, "写真.png", pa.nulls(len(source), pa.string())).select(["写真.png", *names])
    probabilities = run.predict(blind, data_root=table.parent)
    assert len(probabilities) == 60
    assert set(run.evaluation["modalities"]) == set(model.modalities)


def test_the_answer_of_a_cure_is_the_models_in_eval_mode(table: Path, tmp_path: Path) -> None:
    run = train(table, tmp_path / "run", balance="heads", epochs=1)
    model = run.model()
    assert isinstance(model, Cure)
    assert not model.training


def test_one_modality_needs_no_cure(tmp_path: Path) -> None:
    run = train(numbers_csv(tmp_path / "data.csv"), tmp_path / "run", target="species", balance="pool", epochs=1)
    assert type(run.model()) is FusedModel


def test_a_cure_that_there_is_not_and_one_for_other_targets(tmp_path: Path, table: Path) -> None:
    with pytest.raises(InputError, match=r"There is no cure .vitamins.*Choose from pool, heads"):
        train(table, tmp_path / "run", balance="vitamins")
    with pytest.raises(InputError, match="pmr compares modalities by the probability of the right class"):
        train(table, tmp_path / "run", target="weight (kg)", balance="pmr")
    assert not (tmp_path / "run").exists()


def test_a_modality_that_answers_alone_is_named(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Pool.fit

    def alone(self: Pool, *args: Any) -> dict[str, float]:
        found = fit(self, *args)
        self.v.zero_()
        self.v[-1, 2] = 1.0
        self.alone.fill_(1)
        return found

    monkeypatch.setattr(Pool, "fit", alone)
    run = train(table, tmp_path / "run", balance="pool")
    key = run.model().modalities[1]  # type: ignore[attr-defined]
    assert run.evaluation["fallback"]["modality"] == key
    assert f"{key} alone" in run.evaluation["fallback"]["reason"]
    assert [f["where"] for f in run.findings if f["kind"] == "fallback"] == [key]
    train(table, tmp_path / "run", balance="pool", resume=True)
    assert len([f for f in read_json(run.folder / "findings.json") if f["kind"] == "fallback"]) == 1


def test_runs_from_before_there_were_cures_have_none(table: Path, tmp_path: Path) -> None:
    run = train(table, tmp_path / "run", epochs=1)
    settings = {name: value for name, value in run.config.items() if name != "balance"}
    with torch.random.fork_rng(devices=[]):
        assert type(build_model(run.schema, settings)) is FusedModel


def test_many_classes_train_by_k_fac_and_pmr_says_why_not(tmp_path: Path) -> None:
    """Of 80 classes three heads have more outputs than a dense Hessian of each row is formed for."""
    rows = {"said": [f"word {i % 80} of {i}" for i in range(400)], "size": [i % 7 / 7 for i in range(400)]}
    wide = pa.table({**rows, "kind": [f"class {i % 80}" for i in range(400)]})
    options: dict[str, Any] = {"epochs": 2, "columns": {"said": "text"}, "verbose": False}
    run = hesse.train(wide, "kind", out=tmp_path / "pool", **options)
    assert isinstance(run.model(), Pool)
    losses = [row["valid_loss"] for row in read_lines(run.folder / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    with pytest.raises(InputError, match="pmr with kfac is for up to 64 classes"):
        hesse.train(wide, "kind", out=tmp_path / "pmr", balance="pmr", **options)
