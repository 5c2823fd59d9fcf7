"""The spectrum of a run against the dense matrices of a model so small that they can be written down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map

import hesse
from hesse import InputError
from hesse.files import read_json
from hesse.multimodal import encode, encoders, make_schema, model, read_table
from hesse.multimodal.encoders import columns, text
from hesse.training import spectrum
from hesse.training.losses import loss_of
from hesse.training.run import clear
from tolerances import STANDARD_ERRORS
from training_tables import TARGET, numbers, numbers_csv, pets, write_csv


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Networks of about a hundred parameters instead of thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "HIDDEN", 5)
        patch.setattr(model, "FEATURES", 4)
        patch.setattr(columns, "FEATURES", 4)
        patch.setattr(text, "FEATURES", 4)
        patch.setattr(encoders, "FEATURES", 4)
        yield


def train(table: Any, folder: Path, target: str = "species", **options: Any) -> hesse.Run:
    return hesse.train(table, target, **{"out": folder, "epochs": 2, "verbose": False, **options})


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> hesse.Run:
    """Three classes, learnt for two epochs."""
    folder = tmp_path_factory.mktemp("classes")
    table = numbers(90, classes=3)
    path = write_csv(
        folder / "data.csv", ["x", "y", "kind", "species"], list(zip(*list(table.values())[:4], strict=True))
    )
    return train(path, folder / "run")


@pytest.fixture(scope="module")
def record(classes: hesse.Run) -> dict[str, Any]:
    return classes.spectrum()


def rows_of(run: hesse.Run, part: str) -> tuple[dict[str, Any], Tensor]:
    source = read_table(run.folder.parent / "data.csv")
    schema, parts = make_schema(source, run.schema.targets[0].name, root=run.folder, seed=run.config["seed"])
    data = encode(schema, source, root=run.folder)
    inputs, targets = data.batch(data.positions(parts[part]))
    assert targets is not None
    return inputs, targets


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)


def dense(run: hesse.Run, part: str = "test") -> tuple[Tensor, Tensor, dict[str, slice]]:
    """Gauss-Newton matrix and Hessian in float64, and where each parameter is."""
    network = run.model().double()
    inputs, targets = rows_of(run, part)
    inputs = in_float64(inputs)
    targets = targets.double() if targets.is_floating_point() else targets
    sizes = {name: p.shape for name, p in network.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in network.parameters()])
    places, begin = {}, 0
    for name, shape in sizes.items():
        places[name] = slice(begin, begin + shape.numel())
        begin += shape.numel()

    def out(w: Tensor) -> Tensor:
        return functional_call(network, {name: w[places[name]].view(sizes[name]) for name in sizes}, (), inputs)

    def loss_at(outputs: Tensor) -> Tensor:
        return loss_of(run.schema)(outputs, targets)

    jacobian = torch.autograd.functional.jacobian(out, flat).flatten(0, 1)
    outputs = out(flat)
    middle = torch.autograd.functional.hessian(loss_at, outputs).reshape(outputs.numel(), -1)
    G = jacobian.T @ middle @ jacobian
    H = torch.autograd.functional.hessian(lambda w: loss_at(out(w)), flat)
    return G, H, places


def close(found: dict[str, Any], expected: Tensor, rtol: float = 1e-3) -> bool:
    """Within what was asked for, and within what the record itself says of its error."""
    gap = abs(found["value"] - float(expected))
    rounding = 1e-5 * abs(float(expected))  # products are in float32
    return gap <= rtol * abs(float(expected)) + 1e-6 and gap <= STANDARD_ERRORS * found["error"] + rounding + 1e-6


def test_every_number_is_that_of_the_dense_matrices(classes: hesse.Run, record: dict[str, Any]) -> None:
    G, H, places = dense(classes)
    of_G, of_H = torch.linalg.eigvalsh(G).flip(0), torch.linalg.eigvalsh(H).flip(0)
    assert of_H[-1] < -1e-3 * of_H[0], "the Hessian of this run has something to find below zero"
    assert record["parameters"] == len(G)
    for matrix, exact in (("gauss_newton", of_G), ("hessian", of_H)):
        assert len(record[matrix]["eigenvalues"]) == 5
        for found, value in zip(record[matrix]["eigenvalues"], exact, strict=False):
            assert found["converged"] and close(found, value)
    assert close(record["hessian"]["lowest"], of_H[-1], rtol=1e-2)
    assert close(record["gauss_newton"]["trace"], G.trace(), rtol=1e-4)
    assert close(record["hessian"]["trace"], H.trace(), rtol=0.2)
    assert record["gauss_newton"]["effective_dimension"] == pytest.approx(float(G.trace() / of_G[0]), rel=2e-3)
    assert record["gauss_newton"]["share_of_largest"] == pytest.approx(float(of_G[:5].sum() / G.trace()), rel=2e-3)
    rank = int((of_G > 1e-12 * of_G[0]).sum())
    assert rank <= record["rank"] == min(len(G), 2 * record["rows"])

    for block in record["blocks"]:
        wanted = [name for name in places if name.startswith(f"encoders.{block['key']}.")]
        wanted = wanted or [name for name in places if name.startswith("head.")]
        at = torch.cat([torch.arange(places[name].start, places[name].stop) for name in wanted])
        part = G[at][:, at]
        assert block["parameters"] == len(at)
        assert close(block["trace"], part.trace(), rtol=1e-4)
        assert close(block["largest"], torch.linalg.eigvalsh(part)[-1])
        assert block["share"] == pytest.approx(float(part.trace() / G.trace()), rel=1e-4)
    assert sum(block["parameters"] for block in record["blocks"]) == len(G)
    assert sum(block["share"] for block in record["blocks"]) == pytest.approx(1)
    total = sum(block["trace"]["value"] for block in record["blocks"])
    assert record["gauss_newton"]["trace"]["value"] == pytest.approx(total)


def test_the_density_has_the_moments_of_the_matrix(classes: hesse.Run, record: dict[str, Any]) -> None:
    for key, exact in zip(("gauss_newton", "hessian"), dense(classes)[:2], strict=True):
        nodes = np.array(record[key]["density"]["nodes"])
        weights = np.array(record[key]["density"]["weights"])
        values = torch.linalg.eigvalsh(exact)
        assert weights.sum(1) == pytest.approx(1)
        assert (nodes.min(), nodes.max()) == pytest.approx((float(values[0]), float(values[-1])), rel=1e-2, abs=1e-4)
        means = (weights * nodes).sum(1) * len(exact)
        error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else 0.0
        assert abs(means.mean() - float(exact.trace())) <= STANDARD_ERRORS * error + 1e-3 * float(exact.trace())


def test_the_record_is_the_file_and_says_what_was_done(classes: hesse.Run, record: dict[str, Any]) -> None:
    assert read_json(classes.folder / "spectrum.json") == record
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (classes.folder / "spectrum.html").stat().st_size > 10_000
    assert (record["part"], record["rows"], record["available"]) == ("test", 9, classes.config["split"]["test"])
    assert record["loss"] == "cross-entropy"
    assert record["loss_value"] == pytest.approx(classes.evaluation["loss"]), "the averaged weights are looked at"
    assert [block["name"] for block in record["blocks"]] == ["columns", "fusion and head"]
    assert record["command"].startswith(f"hesse spectrum {classes.folder} --split test --rows 512")


def test_regression(tmp_path: Path) -> None:
    run = train(numbers_csv(tmp_path / "data.csv", "age"), tmp_path / "run", "age")
    record = run.spectrum(k=2)
    G, H, _ = dense(run)
    for matrix, exact in (("gauss_newton", G), ("hessian", H)):
        for found, value in zip(record[matrix]["eigenvalues"], torch.linalg.eigvalsh(exact).flip(0)[:2], strict=True):
            assert close(found, value)
    assert record["rank"] == record["rows"]
    assert "standardised target" in record["loss"]


def test_batches_are_summed_right(classes: hesse.Run, record: dict[str, Any], tmp_path: Path) -> None:
    cut = classes.spectrum(batch_size=4, out=tmp_path)  # 4, 4 and 1 of 9 rows
    for matrix in ("gauss_newton", "hessian"):
        whole = [pair["value"] for pair in record[matrix]["eigenvalues"]]
        assert [pair["value"] for pair in cut[matrix]["eigenvalues"]] == pytest.approx(whole, rel=2e-3)
    traces = [block["trace"]["value"] for block in record["blocks"]]
    assert [block["trace"]["value"] for block in cut["blocks"]] == pytest.approx(traces, rel=1e-3)


def test_the_same_seed_gives_the_same_files(
    classes: hesse.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectrum, "STEPS", 8)
    before = {path: path.read_bytes() for path in classes.folder.rglob("*") if path.is_file()}
    state = torch.get_rng_state()
    for name in ("a", "b"):
        classes.spectrum(split="train", rows=12, batch_size=7, k=2, seed=np.int64(3), out=tmp_path / name)
    for name in ("spectrum.json", "spectrum.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = classes.spectrum(split="train", rows=12, batch_size=7, k=2, seed=4, out=tmp_path / "c")
    same = read_json(tmp_path / "a" / "spectrum.json")
    assert (same["rows"], same["available"]) == (12, classes.config["split"]["train"])
    assert other["loss_value"] != same["loss_value"]
    assert before == {path: path.read_bytes() for path in classes.folder.rglob("*") if path.is_file()}
    assert torch.equal(state, torch.get_rng_state())


def test_rows_are_of_the_part_asked_for(classes: hesse.Run, tmp_path: Path) -> None:
    network = classes.model()
    for part in ("train", "valid"):
        inputs, targets = rows_of(classes, part)
        with torch.no_grad():
            loss = float(F.cross_entropy(network(**inputs), targets))
        assert classes.spectrum(split=part, k=1, out=tmp_path)["loss_value"] == pytest.approx(loss)


def test_a_modality_that_is_absent_everywhere_has_no_curvature(tmp_path: Path) -> None:
    """And without test rows the validation rows are taken; and a data frame has to be given again."""
    parts = ["train", "train", "valid"] * 20
    table = {name: values[:60] for name, values in numbers().items() if name != "age"} | {"part": parts}
    table["said"] = [f"word {i % 7} of {i}" if part == "train" else None for i, part in enumerate(parts)]
    run = train(pa.table(table), tmp_path, split_column="part", columns={"said": "text"}, epochs=1)
    with pytest.raises(InputError, match="data frame, which a run does not keep"):
        run.spectrum()
    record = run.spectrum(table=pa.table(table), k=1)
    assert (record["part"], record["rows"]) == ("valid", 20)
    assert "--table" not in record["command"]
    blocks = {block["name"]: block for block in record["blocks"]}
    assert list(blocks) == ["said", "columns", "fusion and head"]
    assert (blocks["said"]["trace"]["value"], blocks["said"]["largest"]["value"], blocks["said"]["share"]) == (0, 0, 0)
    assert blocks["said"]["effective_dimension"] is None
    assert blocks["columns"]["share"] > 0 and blocks["columns"]["largest"]["converged"]
    with pytest.raises(InputError, match="No row is in the test part"):
        run.spectrum(table=pa.table(table), split="test")


def test_each_modality_of_a_table_of_files_that_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large to write down, a block ``J' R R' J`` has the eigenvalues of the small ``R' J J' R``, and zeros."""
    monkeypatch.setattr(spectrum, "STEPS", 3)  # the density is on trial elsewhere
    table = pets(tmp_path / "old", rows=25)
    run = train(table, tmp_path / "run", TARGET, epochs=1, optimizer="adamw")
    table.parent.rename(tmp_path / "new")
    record = run.spectrum(table=tmp_path / "new" / table.name, k=2)

    network = run.model()
    source = read_table(tmp_path / "new" / table.name)
    _, parts = make_schema(source, TARGET, root=tmp_path / "new")
    data = encode(run.schema, source, root=tmp_path / "new")
    inputs = network.prepare(data.batch(data.positions(parts["test"]))[0])
    out = network.double()(**in_float64(inputs)).flatten()
    p = out.detach().view(record["rows"], -1).softmax(1)
    roots = [(row.diag() - row.outer(row)) / len(p) for row in p]
    values, vectors = torch.linalg.eigh(torch.block_diag(*roots))
    root = vectors * values.clamp_min(0).sqrt()
    params = dict(network.named_parameters())
    rows = [torch.autograd.grad(value, list(params.values()), retain_graph=True) for value in out]
    grams = {name: torch.zeros(len(out), len(out), dtype=torch.float64) for name in ("head", *run.schema.modalities)}
    for i, name in enumerate(params):
        j = torch.stack([row[i].flatten() for row in rows])
        part = name.removeprefix("model.")  # inside its cure
        grams[part.split(".")[1] if part.startswith("encoders.") else "head"] += root.T @ j @ j.T @ root
    kinds = {block["key"]: block["kind"] for block in record["blocks"]}
    assert list(kinds.values()) == ["image", "audio", "text", "columns", "head"]
    assert record["blocks"][0]["name"] == "写真.png"
    for block in record["blocks"]:
        assert close(block["trace"], grams[block["key"]].trace(), rtol=1e-4)
        assert close(block["largest"], torch.linalg.eigvalsh(grams[block["key"]])[-1])
    for found, value in zip(
        record["gauss_newton"]["eigenvalues"], torch.linalg.eigvalsh(sum(grams.values())).flip(0), strict=False
    ):
        assert close(found, value)


def test_a_run_beside_another(classes: hesse.Run, tmp_path: Path) -> None:
    run = train(classes.folder.parent / "data.csv", tmp_path / "run", compare=["sgd"])
    beside = hesse.Run(run.folder / "compare" / "sgd")
    assert beside.spectrum(k=1)["optimizer"] == "sgd"
    assert (beside.folder / "spectrum.html").exists() and not (run.folder / "spectrum.html").exists()
    run.spectrum(k=1)
    clear(run.folder)
    assert not run.folder.exists() or not list(run.folder.glob("spectrum*"))


def test_a_table_that_moved_or_changed(classes: hesse.Run, tmp_path: Path) -> None:
    run = hesse.Run(shutil.copytree(classes.folder, tmp_path / "run"))
    table = classes.folder.parent / "data.csv"
    moved = shutil.copy(table, tmp_path / "moved.csv")
    run.config["command"] = "hesse train nowhere/data.csv --target species"
    with pytest.raises(InputError, match="Say where it is with --table") as caught:
        run.spectrum()
    assert caught.value.finding.where == "nowhere/data.csv"
    record = run.spectrum(table=moved, k=1, out=tmp_path)
    assert record["rows"] == 9 and record["command"].endswith(f"-k 1 --seed 0 --table {moved}")
    lines = table.read_text(encoding="utf-8").splitlines()
    for changed, says in (
        (lines[:-1], "it had 90 rows and has 89"),
        ([line.replace("a,", "b,") for line in lines], "columns have changed"),
    ):
        Path(moved).write_text("\n".join(changed) + "\n", encoding="utf-8")
        with pytest.raises(InputError, match=says):
            run.spectrum(table=moved, out=tmp_path / "new")
    with pytest.raises(InputError, match="no such file"):
        run.spectrum(table=tmp_path / "absent.csv", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"split": "testing"}, "Choose from train, valid, test"),
        ({"rows": 0}, "1 or more; got 0"),
        ({"batch_size": 0}, "1 or more"),
        ({"k": 0}, "1 or more"),
        ({"k": 2.5}, "a whole number"),
        ({"seed": -1}, "0 or more"),
    ],
)
def test_bad_arguments(classes: hesse.Run, tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        classes.spectrum(**arguments, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_more_eigenvalues_than_there_are(classes: hesse.Run, tmp_path: Path) -> None:
    record = classes.spectrum(k=10_000, out=tmp_path)
    assert len(record["hessian"]["eigenvalues"]) == record["parameters"]


def test_a_model_with_weights_that_are_no_numbers(classes: hesse.Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(classes.folder, tmp_path / "run"))
    weights = load_file(folder / "model.safetensors")
    weights["head.0.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="The loss on these rows is nan"):
        hesse.Run(folder).spectrum(out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
