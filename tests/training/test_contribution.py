"""What each modality brings: the game against closed forms, shares against dense matrices, rows against the eye."""

from __future__ import annotations

import math
import wave
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor
from torch.nn import functional as F

import hesse
import oracles
from hesse.multimodal import Dataset, FusedModel, Schema, encode, make_schema, read_table
from hesse.multimodal.columns import Column
from hesse.multimodal.target import Target
from hesse.objective.function import objective
from hesse.training.answers import answer
from hesse.training.build import build_model
from hesse.training.contribution.coalitions import Coalitions, by_class, hidden, presence, shapley
from hesse.training.contribution.disagreements import disagreements, divergence
from hesse.training.contribution.probes import fit_linear, probes
from hesse.training.contribution.samples import copy_samples
from hesse.training.contribution.shares import shares
from hesse.training.evaluate import mean_score, outputs
from training_tables import CLASSES, TARGET, pets

Set = frozenset[str]


def subsets(players: str | list[str]) -> list[Set]:
    return [frozenset(s) for n in range(len(players) + 1) for s in combinations(players, n)]


# -- the game ----------------------------------------------------------------------------------------------------------


def test_in_an_additive_game_everybody_gets_what_he_brings() -> None:
    brings = {"a": 0.25, "b": -1.5, "c": 0.0, "d": 3.0}
    found = shapley({s: 7.0 + sum(brings[p] for p in s) for s in subsets("abcd")}, "abcd")
    assert found == pytest.approx(brings)


@pytest.mark.parametrize("players", ["a", "ab", "abc", "abcde"])
def test_the_value_is_the_mean_over_all_orders(players: str) -> None:
    g = torch.Generator().manual_seed(0)
    worths = {s: torch.randn(3, generator=g, dtype=torch.float64) for s in subsets(players)}
    gains = {p: torch.zeros(3, dtype=torch.float64) for p in players}
    for order in permutations(players):
        for i, player in enumerate(order):
            gains[player] += worths[frozenset(order[: i + 1])] - worths[frozenset(order[:i])]
    found = shapley(worths, players)
    for player in players:
        torch.testing.assert_close(found[player], gains[player] / math.factorial(len(players)))
    whole = worths[frozenset(players)] - worths[frozenset()]
    torch.testing.assert_close(sum(found.values(), start=torch.zeros(3)), whole, check_dtype=False)


# -- masked models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Schema, Dataset, dict[str, Tensor], FusedModel]:
    """A table of four modalities with gaps, and a model that has learnt a little."""
    table = pets(tmp_path_factory.mktemp("zoo"))
    run = hesse.train(
        table, TARGET, out=table.parent / "run", epochs=6, lr=3e-3, optimizer="adamw", balance="none", verbose=False
    )
    source = read_table(table)
    schema, parts = make_schema(source, TARGET, root=table.parent)
    data = encode(schema, source, root=table.parent)
    return table, schema, data, {name: data.positions(rows) for name, rows in parts.items()}, run.model()


def test_features_are_computed_once_and_every_set_is_as_if_masked(zoo: Any) -> None:
    _, schema, data, positions, model = zoo
    at = positions["train"]
    found = hidden(model, data, at)
    assert len(found.outputs) == 16 and found.complete
    for one, out in found.outputs.items():
        torch.testing.assert_close(out, outputs(model, data, at, set(schema.modalities) - one))
    for key, here in found.present.items():
        assert torch.equal(here, data.inputs[key][1][at]) and not here.all()


def test_models_with_a_cure_are_seen_through_their_answer(zoo: Any, tmp_path: Path) -> None:
    table, schema, data, positions, _ = zoo
    run = hesse.train(table, TARGET, out=tmp_path / "run", epochs=1, optimizer="adamw", balance="pool", verbose=False)
    at = positions["train"]
    for one, out in hidden(run.model(), data, at).outputs.items():
        torch.testing.assert_close(out, outputs(run.model(), data, at, set(schema.modalities) - one))
    for brings in run.evaluation["modalities"].values():
        assert brings["speed"][0] > 0 and brings["curvature_share"] >= 0


def test_values_by_class_and_of_the_score_are_one_account(zoo: Any) -> None:
    _, schema, data, positions, model = zoo
    found = hidden(model, data, positions["train"])
    worths = found.worths(lambda out: mean_score(schema, out, found.targets))
    values = shapley(worths, tuple(found.present))
    assert sum(values.values()) == pytest.approx(worths[found.everything] - worths[frozenset()])
    counts = torch.bincount(found.targets, minlength=4).double()
    for key, classes in by_class(schema, found).items():
        assert list(classes) == list(schema.targets[0].classes)
        mean = (torch.tensor(list(classes.values())) * counts).sum() / counts.sum()
        assert float(mean) == pytest.approx(values[key])


def test_presence_scores_the_rows_that_have_what_is_shown(zoo: Any) -> None:
    _, schema, data, positions, model = zoo
    at = positions["train"]
    rows = presence(schema, hidden(model, data, at))
    assert len({tuple(row["present"]) for row in rows}) == len(rows) == 16
    for row in rows:
        have = (
            at[torch.stack([data.inputs[key][1][at] for key in schema.modalities if key in row["present"]]).all(0)]
            if row["present"]
            else at
        )
        out = outputs(model, data, have, set(schema.modalities) - set(row["present"]))
        assert row["n"] == len(have)
        assert row["value"] == pytest.approx(float((out.argmax(1) == data.targets[have]).double().mean()))
    assert {row["n"] for row in rows} != {len(at)}


def test_many_modalities_get_singles_and_what_leaves_one_out() -> None:
    settings = {f"text_{i}": {"kind": "text", "length": 3, "alphabet": "ab"} for i in range(6)}
    torch.manual_seed(0)
    model = FusedModel(settings, 2)
    inputs = {key: (torch.randint(0, 4, (5, 3)), torch.ones(5, dtype=torch.bool)) for key in settings}
    data = Dataset(inputs, torch.tensor([0, 1, 0, 1, 0]), torch.arange(5))
    found = hidden(model, data, torch.arange(5))
    assert sorted(map(len, found.outputs)) == [0, *[1] * 6, *[5] * 6, 6]
    assert not found.complete
    schema = Schema((), (Target("y", "classification", ("a", "b")),))
    assert not any(by_class(schema, found).values())
    assert len(disagreements(schema, data, found, {})) == 5


# -- probes ------------------------------------------------------------------------------------------------------------


def test_probes_are_those_of_scikit_learn() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 6, generator=g), torch.randint(0, 3, (200,), generator=g)
    x[:, 0] += y
    weight = fit_linear(Schema((), (Target("y", "classification", ("a", "b", "c")),)), x, y)
    known = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(x.numpy(), y.numpy())
    centred = weight - weight.mean(1, keepdim=True)
    expected = np.vstack([known.coef_.T, known.intercept_])
    torch.testing.assert_close(
        centred, torch.from_numpy(expected - expected.mean(1, keepdims=True)).float(), rtol=1e-2, atol=2e-3
    )

    quantity = x @ torch.randn(6, 1, generator=g) + 2
    weight = fit_linear(Schema((), (Target("y", "regression"),)), x, quantity)
    ridge = Ridge(alpha=0.5).fit(x.numpy(), quantity.numpy())  # |residual|^2 / n + |w|^2 / 2n
    torch.testing.assert_close(weight[:-1, 0], torch.from_numpy(ridge.coef_).flatten(), rtol=1e-3, atol=1e-3)


def test_a_probe_finds_what_an_encoder_knows_and_nothing_where_it_was_destroyed(zoo: Any) -> None:
    _, schema, data, positions, model = zoo
    train = positions["train"]
    found = probes(schema, model, data, train, train)
    assert found.keys() == schema.modalities.keys()
    assert min(found.values()) > 0.5
    spoiled = FusedModel(schema.model_settings(), schema.outputs)
    spoiled.load_state_dict(model.state_dict())
    torch.nn.init.zeros_(spoiled.encoders["columns"].features.weight)
    after = probes(schema, spoiled, data, train, train)
    assert after["columns"] < 0.4 < found["columns"]
    assert {key: after[key] for key in after if key != "columns"} == {k: v for k, v in found.items() if k != "columns"}


def test_a_modality_that_no_row_has_has_no_probe(zoo: Any) -> None:
    _, schema, data, positions, model = zoo
    inputs = dict(data.inputs)
    sounds, here = inputs["audio_sound"]
    inputs["audio_sound"] = sounds, torch.zeros_like(here)
    empty = Dataset(inputs, data.targets, data.rows)
    found = probes(schema, model, empty, positions["train"], positions["test"])
    assert math.isnan(found["audio_sound"]) and not math.isnan(found["columns"])


# -- shares ------------------------------------------------------------------------------------------------------------


def test_shares_are_those_of_the_dense_gradient_and_matrix() -> None:
    settings: dict[str, dict[str, Any]] = {
        "columns": {"kind": "columns", "numbers": 2, "categories": []},
        "text_t": {"kind": "text", "length": 3, "alphabet": "ab"},
    }
    torch.manual_seed(0)
    model = FusedModel(settings, 2)
    g = torch.Generator().manual_seed(0)
    numbers, none = torch.randn(40, 2, generator=g), torch.zeros(40, 0, dtype=torch.int64)
    here = torch.ones(40, dtype=torch.bool)
    inputs: dict[str, Any] = {
        "columns": ((numbers, none), here),
        "text_t": (torch.randint(0, 4, (40, 3), generator=g), here),
    }
    data = Dataset(inputs, torch.randint(0, 2, (40,), generator=g), torch.arange(40))
    schema = Schema((), (Target("y", "classification", ("a", "b")),))
    found = shares(schema, model, data, torch.arange(40), 40, seed=0)

    o = objective(model, F.cross_entropy, data.batch(slice(None)))
    j, h = oracles.jacobian(o), oracles.loss_hessian(o)
    diagonal = ((h @ j) * j).sum(0)
    gradient = oracles.gradient(o)
    traces, norms = {}, {}
    for key in settings:
        mine = [name for name in o.params if name.startswith(f"encoders.{key}.")]
        traces[key] = float(sum(diagonal[oracles.rows_of(o, name)].sum() for name in mine))
        norms[key] = math.sqrt(sum(float(gradient[name].square().sum()) for name in mine))
    for key in settings:
        assert found[key]["gradient_share"] == pytest.approx(norms[key] / sum(norms.values()), rel=1e-4)
        assert found[key]["curvature_share"] == pytest.approx(traces[key] / sum(traces.values()), abs=0.08)
    assert sum(each["curvature_share"] for each in found.values()) == pytest.approx(1)


def test_frozen_encoders_have_no_share(zoo: Any) -> None:
    _, schema, data, positions, _ = zoo
    frozen = FusedModel(schema.model_settings(), schema.outputs)
    frozen.encoders.requires_grad_(False)
    found = shares(schema, frozen, data, positions["train"], 32, seed=0)
    assert all(math.isnan(value) for each in found.values() for value in each.values())
    frozen.encoders["columns"].requires_grad_(True)
    found = shares(schema, frozen, data, positions["train"], 32, seed=0)
    assert found["columns"] == {"gradient_share": 1.0, "curvature_share": 1.0}


# -- rows that disagree ------------------------------------------------------------------------------------------------


def test_divergence_is_that_of_its_definition() -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.rand(3, 20, 4, generator=g, dtype=torch.float64)
    p = p / p.sum(2, keepdim=True)
    here = torch.rand(3, 20, generator=g) < 0.7
    found = divergence(p, here)
    for row in range(20):
        mine = [p[m, row] for m in range(3) if here[m, row]]
        if len(mine) < 2:
            assert found[row] == 0
            continue
        mean = sum(mine[1:], start=mine[0]) / len(mine)
        kl = sum(float((q * (q / mean).log()).sum()) for q in mine) / len(mine)
        assert float(found[row]) == pytest.approx(kl / math.log(len(mine)))


def contradiction(task: str = "classification") -> tuple[Schema, Dataset, Coalitions]:
    """Two modalities: they agree in row 0, contradict each other in 1 (half) and 2 (wholly); 3 has only one."""
    here = {"a": torch.ones(4, dtype=torch.bool), "b": torch.tensor([True, True, True, False])}
    if task == "regression":
        a, b = torch.tensor([[1.0], [1.0], [2.0], [9.0]]), torch.tensor([[1.0], [0.0], [-2.0], [0.0]])
        targets, both = torch.tensor([[1.0], [0.0], [2.0], [0.0]]), (a + b) / 2
        goal = Target("y", "regression", mean=10.0, scale=2.0)
    else:
        a = torch.tensor([[4.0, 0.0], [2.0, 0.0], [6.0, 0.0], [9.0, 0.0]])
        b = torch.tensor([[4.0, 0.0], [0.0, 1.0], [0.0, 8.0], [0.0, 0.0]])
        targets, both = torch.tensor([0, 1, 1, 0]), a + b
        goal = Target("y", "classification", ("yes", "no"))
    nothing, alone = torch.zeros_like(a), torch.where(here["b"][:, None], both, a)
    outputs = {frozenset(): nothing, frozenset("a"): a, frozenset("b"): b, frozenset("ab"): alone}
    data = Dataset({}, targets, torch.tensor([10, 20, 30, 40]))
    return Schema((), (goal,)), data, Coalitions(torch.arange(4), targets, here, outputs)


def test_rows_that_contradict_themselves_come_first_and_those_that_agree_do_not_come() -> None:
    schema, data, found = contradiction()
    first, second = disagreements(schema, data, found, {})
    assert (first["row"], second["row"]) == (30, 20)
    assert first["actual"] == first["predicted"] == "no"
    assert [first["by_modality"][key]["predicted"] for key in "ab"] == ["yes", "no"]
    assert first["by_modality"]["a"]["confidence"] == pytest.approx(1 / (1 + math.exp(-6)))
    cooler = disagreements(schema, data, found, {"y": {"temperature": 2.0}})
    assert cooler[0]["by_modality"]["a"]["confidence"] == pytest.approx(1 / (1 + math.exp(-3)))
    gain = F.log_softmax(torch.tensor([6.0, 8.0]), 0)[1] - math.log(0.5)
    assert sum(each["shapley"] for each in first["by_modality"].values()) == pytest.approx(float(gain))


def test_quantities_disagree_by_their_spread() -> None:
    schema, data, found = contradiction("regression")
    first, second = disagreements(schema, data, found, {})
    assert (first["row"], second["row"]) == (30, 20)
    assert (first["actual"], first["predicted"], first["confidence"]) == (14.0, 10.0, None)
    assert [first["by_modality"][key]["predicted"] for key in "ab"] == [14.0, 6.0]
    assert [first["by_modality"][key]["shapley"] for key in "ab"] == [4.0, -4.0]
    assert first["score"] == 2.0


def test_labels_are_those_that_predictions_give() -> None:
    """By the thresholds of the calibration; one half is not always where F1 is best."""
    target = Target("y", "multilabel", ("red", "round"))
    a, b = torch.tensor([[2.0, 2.0]]), torch.tensor([[-2.0, -2.0]])
    whole = torch.tensor([[0.5, 0.5]])  # 62 %
    outputs = {frozenset(): whole, frozenset("a"): a, frozenset("b"): b, frozenset("ab"): whole}
    here = {key: torch.tensor([True]) for key in "ab"}
    schema, targets = Schema((), (target,)), torch.tensor([[1.0, 0.0]])
    data = Dataset({}, targets, torch.tensor([10]))
    found = Coalitions(torch.arange(1), targets, here, outputs)
    calibration = {"y": {"temperature": 1.0, "threshold": {"red": 0.6, "round": 0.7}}}
    (row,) = disagreements(schema, data, found, calibration)
    assert row["predicted"] == "red" == answer(schema, whole, calibration)["y"].to_pylist()[0][0]
    assert disagreements(schema, data, found, {})[0]["predicted"] == "red, round"


def test_rows_without_the_target_and_models_without_numbers_are_left_out() -> None:
    schema, data, found = contradiction()
    found.targets[2] = -100
    assert [row["row"] for row in disagreements(schema, data, found, {})] == [20]
    found.outputs[frozenset("a")][0] = torch.nan
    assert disagreements(schema, data, found, {}) == []


# -- samples -----------------------------------------------------------------------------------------------------------


def test_samples_are_small_and_their_names_say_nothing_of_the_cells(tmp_path: Path) -> None:
    table = pets(tmp_path / "data", rows=20)
    source = read_table(table)
    schema, _ = make_schema(source, TARGET, root=table.parent)
    keys = list(schema.modalities)
    rows = [{"row": row, "by_modality": dict.fromkeys(keys)} for row in range(20)]
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "samples" / "old.png").write_bytes(b"of an earlier run")
    gone = table.parent / source.column("写真.png")[3].as_py()
    gone.unlink()
    copy_samples(tmp_path / "run", schema, source, table.parent, rows)
    files = {path.name for path in (tmp_path / "run" / "samples").iterdir()}
    named = {Path(one["file"]).name for row in rows for one in row.get("samples", {}).values() if "file" in one}
    assert files == named and all(name[:2].isdigit() and name.isascii() for name in files)
    assert "image_写真_png" not in rows[3]["samples"]
    for row in rows:
        for key, sample in row["samples"].items():
            assert sample["kind"] == key.partition("_")[0]
            if sample["kind"] == "image":
                with Image.open(tmp_path / "run" / sample["file"]) as picture:
                    assert max(picture.size) <= 200
            elif sample["kind"] == "audio":
                with wave.open(str(tmp_path / "run" / sample["file"])) as sound:
                    assert (sound.getsampwidth(), sound.getnchannels()) == (2, 1)
                    assert sound.getframerate() <= 16000 and sound.getnframes() <= 10 * sound.getframerate()
            elif sample["kind"] == "text":
                assert sample["text"] == source.column("self")[row["row"]].as_py()
            else:
                assert sample["text"].keys() == {"weight (kg)", 'co"lour 🎂'}


def test_columns_of_encoders_trained_elsewhere_are_copied_too(tmp_path: Path) -> None:
    """Their settings say nothing of sizes and rates."""
    table = pets(tmp_path / "data", rows=20)
    source = read_table(table)
    schema, _ = make_schema(source, TARGET, root=table.parent)
    bare = replace(schema, columns=tuple(replace(column, settings={}) for column in schema.columns))
    whole = next(i for i in range(20) if all(source.column(c.name)[i].is_valid for c in schema.inputs))
    row: dict[str, Any] = {"row": whole, "by_modality": dict.fromkeys(schema.modalities)}
    copy_samples(tmp_path / "run", bare, source, table.parent, [row])
    assert row["samples"].keys() == schema.modalities.keys()
    with Image.open(tmp_path / "run" / row["samples"]["image_写真_png"]["file"]) as picture:
        assert picture.size == (200, 200)


def test_a_row_with_nothing_is_answered_with_the_prior() -> None:
    """What the training rows say without looking: shares of classes and labels, the mean of a quantity."""
    columns = (Column("x", "number", "input", "", 0, 9, "", {"mean": 0.0, "std": 1.0}),)
    targets = (
        Target("a", "classification", ("x", "y"), prior=(0.75, 0.25)),
        Target("b", "regression", mean=5.0, scale=2.0),
        Target("c", "multilabel", ("p", "q"), prior=(0.9, 0.4)),
    )
    schema = Schema(columns, targets)
    for fusion in ("concat", "late"):
        model = build_model(schema, {"fusion": fusion})
        numbers, none = torch.full((1, 1), torch.nan), torch.zeros(1, 0, dtype=torch.int64)
        (out,) = model(columns=((numbers, none), torch.tensor([False])))
        assert out[:2].softmax(0).tolist() == pytest.approx([0.75, 0.25])
        assert out[2] == 0
        assert out[3:].sigmoid().tolist() == pytest.approx([0.9, 0.4])
    earlier = replace(schema, targets=(replace(targets[0], prior=()), *targets[1:]))
    assert build_model(earlier, {}).prior is None


def test_a_path_that_leads_outside_is_not_copied(tmp_path: Path) -> None:
    table = pets(tmp_path / "data", rows=20)
    source = read_table(table)
    schema, _ = make_schema(source, TARGET, root=table.parent)
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    names = ["../secret.png"] * 20
    moved = read_table(source.data.set_column(source.names.index("写真.png"), "写真.png", pa.array(names)))
    rows = [{"row": 0, "by_modality": {"image_写真_png": {}}}]
    copy_samples(tmp_path / "run", schema, moved, table.parent, rows)
    assert "samples" not in rows[0] and not list((tmp_path / "run" / "samples").iterdir())


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_a_run_tells_what_each_modality_brings(zoo: Any) -> None:
    table, *_ = zoo
    run = hesse.Run(table.parent / "run")
    record = run.evaluation
    for brings in record["modalities"].values():
        assert brings.keys() == {
            "alone",
            "without",
            "shapley",
            "by_class",
            "probe",
            "gradient_share",
            "curvature_share",
            "speed",
        }
        assert len(brings["speed"]) == 6 and any(speed is not None for speed in brings["speed"])
    for name in ("gradient_share", "curvature_share"):
        assert sum(brings[name] for brings in record["modalities"].values()) == pytest.approx(1)
    everything = next(row for row in record["presence"] if len(row["present"]) == 4)
    alone = {row["present"][0]: row for row in record["presence"] if len(row["present"]) == 1}
    assert everything["n"] <= record["n"] and alone.keys() == record["modalities"].keys()
    assert record["disagreements"]
    for row in record["disagreements"]:
        assert row["actual"] in CLASSES and row["actual"] == read_table(table).column(TARGET)[row["row"]].as_py()
        assert row["samples"].keys() <= row["by_modality"].keys()
        for sample in row["samples"].values():
            assert "text" in sample or (run.folder / sample["file"]).is_file()


def test_overwriting_takes_the_samples_away(zoo: Any, tmp_path: Path) -> None:
    table, *_ = zoo
    folder = tmp_path / "run"
    hesse.train(table, TARGET, out=folder, epochs=1, optimizer="adamw", verbose=False)
    assert list((folder / "samples").iterdir())
    numbers = pa.table({"x": [float(i % 7) for i in range(40)], "y": ["a", "b"] * 20})
    hesse.train(numbers, "y", out=folder, epochs=1, optimizer="adamw", overwrite=True, verbose=False)
    assert not (folder / "samples").exists()
