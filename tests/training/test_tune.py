"""A search finds the valley, repeats itself, survives its workers and itself, and leaves runs that predict."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import hesse
from hesse import InputError
from hesse.files import read_json
from hesse.training.owned import locked
from hesse.training.tune import crew, search, tune, worker
from training_tables import numbers

StorageInternalError = pytest.importorskip(
    "optuna", reason="hesse[tune] is not installed"
).exceptions.StorageInternalError

FAKE = """
import json, math, os, signal, sys, time

def read():
    line = sys.stdin.readline()
    if not line:
        sys.exit()
    return json.loads(line)

def send(event, **values):
    print(json.dumps({"event": event, **values}), flush=True)

if "FAKE_REFUSES" in os.environ:
    send("refused", finding={"kind": "no such target", "where": "t.csv", "message": "None.", "severity": "error"})
    sys.exit()
read()
send("ready", train=200, schema="as it was", record={"task": "classification", "rows": 250})
while True:
    order = read()
    given = order["settings"]
    lr = given["lr"] or 0.01
    mark = os.path.join(os.path.dirname(order["folder"]), "died")
    if "FAKE_DIES" in os.environ and lr > float(os.environ["FAKE_DIES"]):
        if os.environ["FAKE_AGAIN"] == "yes" or not os.path.exists(mark):
            os.makedirs(os.path.dirname(mark), exist_ok=True)
            open(mark, "a").close()
            print("no memory for", lr, file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    loss = (math.log10(lr) + 2) ** 2
    value = None if lr > 0.04 else loss
    for epoch in range(1, 7):
        if order["asks"]:
            send("epoch", epochs=epoch, seconds=0.1 * epoch, value=value and value + 1 / epoch)
            if not read()["go on"]:
                send("pruned")
                break
    else:
        judged = {"score": "accuracy", "part": "test", "baseline": 0.5}
        send("done", value=value, seconds=0.6, epochs=6, score=1 - loss / 10, judged=judged)
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that do not train: the loss is (log10 lr + 2)^2, and above 0.04 there is none."""
    monkeypatch.setattr(worker, "START", FAKE)
    monkeypatch.setattr(search, "_page", lambda folder, result: folder / "tune.html")


def run(folder: Path, **options: Any) -> dict[str, Any]:
    return tune("t.csv", "kind", out=folder, **{"trials": 8, "verbose": False, **options})


def params(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [trial["params"] for trial in result["trials"]]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_finds_the_valley_and_repeats_itself(tmp_path: Path, sampler: str) -> None:
    first = run(tmp_path / "a", sampler=sampler, trials=14)
    assert [trial["number"] for trial in first["trials"]] == list(range(14))
    assert first == read_json(tmp_path / "a" / "tune.json")
    best = first["best"]
    complete = [trial for trial in first["trials"] if trial["state"] == "complete"]
    assert best["value"] == min(trial["value"] for trial in complete) < 0.1
    assert 10**-2.4 < best["params"]["lr"] < 10**-1.6
    so_far = [trial["best_so_far"] for trial in first["trials"] if trial["best_so_far"] is not None]
    assert so_far == sorted(so_far, reverse=True) and so_far[-1] == best["value"]
    assert first["kfac"] == {"value": 0.0, "score": 1.0, "seconds": 0.6, "folder": "kfac"}
    assert first["seconds"] == pytest.approx(sum(trial["seconds"] for trial in first["trials"]))
    assert run(tmp_path / "b", sampler=sampler, trials=14)["trials"] == first["trials"]
    assert params(run(tmp_path / "c", sampler=sampler, seed=1, trials=2)) != params(first)[:2]


@pytest.mark.usefixtures("fake")
def test_what_is_drawn_lies_in_the_space(tmp_path: Path) -> None:
    result = run(tmp_path / "a", sampler="random")
    for drawn in params(result):
        assert drawn.keys() == result["space"].keys() == {"lr", "weight_decay", "batch_size"}
        assert 1e-5 <= drawn["lr"] <= 0.1 and 1e-6 <= drawn["weight_decay"] <= 0.1
        assert drawn["batch_size"] in result["space"]["batch_size"]["values"] == [16, 32, 64, 128]
    assert params(run(tmp_path / "b", optimizer="lbfgs", trials=2))[0].keys() == {"lr"}


@pytest.mark.usefixtures("fake")
def test_what_looks_bad_is_ended_early_and_what_diverges_has_failed(tmp_path: Path) -> None:
    result = run(tmp_path / "a", sampler="random", trials=20)
    states = {trial["state"] for trial in result["trials"]}
    assert states == {"complete", "pruned", "failed"}
    for trial in result["trials"]:
        assert (trial["epochs"] < 6) == (trial["state"] == "pruned")
        assert (trial["value"] is None) == (trial["score"] is None or trial["state"] != "complete")
        assert (trial["state"] == "failed") == (trial["params"]["lr"] > 0.04) == ("diverged" in (trial["error"] or ""))
    pruned = [(trial["params"]["lr"] * 100) for trial in result["trials"] if trial["state"] == "pruned"]
    assert all(not 0.5 < ratio < 2 for ratio in pruned)


@pytest.mark.usefixtures("fake")
def test_several_jobs_share_the_trials(tmp_path: Path) -> None:
    result = run(tmp_path / "a", jobs=3)
    assert sorted(trial["number"] for trial in result["trials"]) == list(range(8))
    assert result["jobs"] == 3 and result["best"]["value"] < 0.5


@pytest.mark.usefixtures("fake")
def test_a_trial_whose_worker_died_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DIES", "0.001")
    monkeypatch.setenv("FAKE_AGAIN", "no")
    result = run(tmp_path / "a", sampler="random")
    (failed,) = [trial for trial in result["trials"] if trial["error"] and "signal 9" in trial["error"]]
    assert failed["error"].endswith(f"no memory for {failed['params']['lr']}") and failed["state"] == "failed"
    again = result["trials"][failed["number"] + 1]
    assert again["params"] == failed["params"] and again["state"] in ("complete", "pruned")
    assert len(result["trials"]) == 9


@pytest.mark.usefixtures("fake")
def test_settings_that_kill_every_worker_are_given_up_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DIES", "0.02")
    monkeypatch.setenv("FAKE_AGAIN", "yes")
    result = run(tmp_path / "a", sampler="random")
    deadly = [trial["params"] for trial in result["trials"] if trial["params"]["lr"] > 0.02]
    assert deadly and all(deadly.count(one) == 2 for one in deadly)
    assert len(result["trials"]) == 8 + len(deadly) // 2
    monkeypatch.setenv("FAKE_DIES", "0")
    with pytest.raises(InputError, match="workers ended one after the other") as error:
        run(tmp_path / "b")
    assert "no memory" in str(error.value)


class Interrupted:
    """Ctrl-C at the event of a number."""

    def __init__(self, at: int) -> None:
        self.left, self.next = at, crew.Crew._next

    def __call__(self, crew: crew.Crew) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.next(crew)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("at", [2, 9, 40])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop = Interrupted(at)
        patch.setattr(crew.Crew, "_next", lambda self: stop(self))
        with pytest.raises(KeyboardInterrupt, match=r"Go on with: hesse tune t.csv .* --resume"):
            run(tmp_path / "cut")
    before = read_json(tmp_path / "cut" / "tune.json")["trials"]
    after = run(tmp_path / "cut", resume=True)
    assert len(before) < 8 and after["trials"][: len(before)] == before
    first = len(before)
    assert params(after)[: first + 1] == params(whole)[: first + 1]  # the trial that was lost is drawn no second time
    assert len(after["trials"]) == 8 and after["kfac"] == whole["kfac"]
    more = run(tmp_path / "cut", resume=True, trials=9)
    assert more["trials"][:8] == after["trials"] and len(more["trials"]) == 9


@pytest.mark.usefixtures("fake")
def test_a_search_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    run(tmp_path / "a", trials=2)
    for other in ({"seed": 1}, {"optimizer": "sgd"}, {"epochs": 3}, {"sampler": "random"}, {"columns": {"x": "text"}}):
        with pytest.raises(InputError, match="which cannot become") as error:
            run(tmp_path / "a", resume=True, **other)
        assert error.value.finding.kind == "another search"
    with pytest.raises(InputError, match="There is a search in this folder already"):
        run(tmp_path / "a")
    assert len(run(tmp_path / "a", overwrite=True, trials=1, seed=5)["trials"]) == 1


@pytest.mark.usefixtures("fake")
def test_a_folder_belongs_to_one_search_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "a", trials=1)
    with locked(tmp_path / "a"), pytest.raises(InputError, match="is training in this folder"):
        run(tmp_path / "a", resume=True, trials=2)
    assert len(run(tmp_path / "a", resume=True, trials=2)["trials"]) == 2

    def full(*arguments: Any) -> None:
        raise StorageInternalError from OSError("disk full")

    monkeypatch.setattr(crew.Crew, "search", full)
    with pytest.raises(InputError, match=r"cannot be written: disk full\. Make room"):
        run(tmp_path / "a", resume=True, trials=3)


@pytest.mark.usefixtures("fake")
def test_no_trial_begins_after_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path / "a", timeout=1e-9, seconds_per_trial=2)
    assert result["trials"] == [] and result["best"] is None
    assert result["kfac"]["folder"] == "kfac"
    assert run(tmp_path / "b", timeout=1e-9, verbose=True)["kfac"] is None
    assert "no trial ended; none began after the timeout of 1e-09 s" in capsys.readouterr().err


@pytest.mark.usefixtures("fake")
def test_names_of_folders_do_not_matter(tmp_path: Path) -> None:
    assert len(run(tmp_path / "100% ?#&; ü's" / "b", trials=1)["trials"]) == 1


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"optimizer": "newton"}, "no such optimizer"),
        ({"optimizer": "kfac"}, "nothing to tune"),
        ({"sampler": "grid"}, "no such sampler"),
        ({"trials": 0}, "bad argument"),
        ({"jobs": 0}, "bad argument"),
        ({"timeout": 0}, "bad argument"),
        ({"epochs": 0}, "bad argument"),
        ({"seconds_per_trial": -1}, "bad argument"),
        ({"epochs": 3, "seconds_per_trial": 1}, "two wishes"),
        ({"resume": True, "overwrite": True}, "two wishes"),
        ({"resume": True}, "no search"),
    ],
)
def test_a_refused_argument_leaves_nothing(tmp_path: Path, options: dict[str, Any], kind: str) -> None:
    with pytest.raises(InputError) as error:
        run(tmp_path / "a", **options)
    assert error.value.finding.kind == kind and error.value.finding.remedy
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("fake")
def test_what_the_table_lacks_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_REFUSES", "yes")
    with pytest.raises(InputError, match=r"no such target at t\.csv"):
        run(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(TypeError, match="no argument 'lr'"):
        run(tmp_path / "a", lr=0.1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(InputError, match="other files"):
        run(tmp_path / "mine", overwrite=True)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        pytest.param({"balance": "nonsense"}, "no such cure", id="cure"),
        pytest.param({"balance": "pmr"}, "unsuitable cure", id="cure of classes for a quantity"),
        pytest.param({"fusion": "nonsense"}, "no such fusion", id="fusion"),
    ],
)
def test_what_no_trial_could_be_trained_with_is_refused_at_once(
    tmp_path: Path, options: dict[str, Any], kind: str
) -> None:
    table = pa.table({name: values for name, values in numbers(60).items() if name != "species"})
    with pytest.raises(InputError) as error:
        hesse.tune(table, "age", out=tmp_path / "s", trials=1, epochs=1, verbose=False, **options)
    assert error.value.finding.kind == kind
    assert not (tmp_path / "s").exists()


def test_trials_are_runs_and_the_best_one_predicts(tmp_path: Path) -> None:
    columns = numbers(120)
    del columns["age"]
    table = pa.table(columns)
    began = time.monotonic()
    result = hesse.tune(table, "species", out=tmp_path / "s", trials=3, epochs=3, verbose=False)
    assert time.monotonic() - began > result["seconds"] > 0
    assert read_json(tmp_path / "s" / "tune.json") == result
    assert (tmp_path / "s" / "tune.html").stat().st_size > 1000
    for trial in result["trials"]:
        run = hesse.Run(tmp_path / "s" / trial["folder"])
        asked = {name: run.config[name] for name in ("lr", "weight_decay", "batch_size")}
        assert asked == trial["params"] and run.config["optimizer"] == "adamw" and run.config["epochs"] == 3
        assert run.evaluation["value"] == trial["score"]
        assert f"--lr {trial['params']['lr']}" in run.config["command"]
    best = hesse.Run(tmp_path / "s" / result["best"]["folder"])
    assert best.predict(table).num_rows == 120 and (best.folder / "report.html").exists()
    kfac = hesse.Run(tmp_path / "s" / "kfac")
    assert kfac.config["optimizer"] == "kfac" and kfac.evaluation["value"] == result["kfac"]["score"]
    mean = sum(trial["seconds"] for trial in result["trials"]) / 3
    assert kfac.config["seconds"] == pytest.approx(mean)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
