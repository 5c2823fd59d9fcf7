"""Fusion by name and by trial: the losses choose, and what follows is the run one would have asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hesse
from hesse import InputError
from hesse.files import read_json, write_json
from hesse.multimodal.fusion import FUSIONS, Bottleneck, Concatenate, Gated, Late, LowRank
from hesse.training import choose
from hesse.training.build import plain
from training_tables import TARGET, numbers_csv, pets

KINDS = {"concat": Concatenate, "gated": Gated, "bottleneck": Bottleneck, "tensor": LowRank, "late": Late}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pets(tmp_path_factory.mktemp("zoo"), rows=40)


def train(table: Path, out: Path, **options: Any) -> hesse.Run:
    return hesse.train(table, TARGET, **{"epochs": 1, "optimizer": "adamw", "verbose": False, "out": out, **options})


@pytest.mark.parametrize("name", FUSIONS)
def test_a_run_has_the_fusion_it_was_asked_for_and_predicts_with_it(name: str, table: Path, tmp_path: Path) -> None:
    run = train(table, tmp_path / "run", fusion=name)
    assert run.config["fusion"] == name
    assert type(plain(hesse.Run(run.folder).model()).fusion) is KINDS[name]
    assert run.predict(table)[TARGET].null_count == 0
    assert ("--fusion" in run.config["command"]) == (name != "concat")


@pytest.fixture(scope="module")
def chosen(table: Path, tmp_path_factory: pytest.TempPathFactory) -> hesse.Run:
    before = torch.get_rng_state()
    run = train(table, tmp_path_factory.mktemp("auto") / "run", fusion="auto")
    assert torch.equal(torch.get_rng_state(), before)  # the caller's
    return run


def test_the_lowest_validation_loss_goes_on(chosen: hesse.Run) -> None:
    tried = chosen.config["fusion_tried"]
    assert set(tried) == set(FUSIONS)
    assert chosen.config["fusion"] == min(tried, key=tried.get)
    assert type(plain(chosen.model()).fusion) is KINDS[chosen.config["fusion"]]
    assert "--fusion auto" in chosen.config["command"]


def test_the_tries_leave_no_trace_in_the_run(chosen: hesse.Run, table: Path, tmp_path: Path) -> None:
    """Bit for bit the run with that fusion; and a try of one epoch is that run's first."""
    asked = train(table, tmp_path / "run", fusion=chosen.config["fusion"])
    weights, expected = (load_file(run.folder / "model.safetensors") for run in (chosen, asked))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_resuming_keeps_the_choice_and_tries_nothing(
    chosen: hesse.Run, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr("hesse.training.job.choose_fusion", refuse)
    for asked in ({"fusion": "auto"}, {}, {"fusion": chosen.config["fusion"]}):
        again = train(table, chosen.folder, resume=True, **asked)
        assert again.config["fusion"] == chosen.config["fusion"]
        assert again.config["fusion_tried"] == chosen.config["fusion_tried"]
    other = next(name for name in FUSIONS if name not in ("concat", chosen.config["fusion"]))
    with pytest.raises(InputError, match="cannot become"):
        train(table, chosen.folder, resume=True, fusion=other)


def test_runs_that_know_of_no_fusion_are_concatenations(table: Path, tmp_path: Path) -> None:
    run = train(table, tmp_path / "run")
    config = read_json(run.folder / "config.json")
    del config["fusion"]
    write_json(run.folder / "config.json", config)
    assert hesse.Run(run.folder).predict(table).equals(run.predict(table))
    again = train(table, run.folder, resume=True, epochs=2)
    assert again.config["fusion"] == "concat"
    with pytest.raises(InputError, match="cannot become"):
        train(table, run.folder, resume=True, fusion="late")


def test_one_modality_has_nothing_to_fuse(tmp_path: Path) -> None:
    table = numbers_csv(tmp_path / "numbers.csv")
    run = hesse.train(table, "species", fusion="auto", out=tmp_path / "run", epochs=1, optimizer="adamw", verbose=False)
    assert (run.config["fusion"], run.config["fusion_tried"]) == ("concat", {})


def test_what_diverges_is_not_chosen(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"concat": float("inf"), "gated": 2.0, "bottleneck": 3.0, "tensor": 0.5, "late": 1.0}
    monkeypatch.setattr(choose, "_try", lambda plan, settings, name: losses[name])
    run = train(table, tmp_path / "run", fusion="auto")
    assert run.config["fusion"] == "tensor"
    assert run.config["fusion_tried"] == losses | {"concat": None}


def test_an_unknown_fusion_is_refused_and_nothing_written(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no fusion 'early'") as error:
        train(table, tmp_path / "run", fusion="early")
    assert "bottleneck" in str(error.value)
    assert not (tmp_path / "run").exists()
