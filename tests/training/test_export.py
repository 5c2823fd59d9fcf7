"""The exported file computes what the model computes, for any rows, and is not there when it would not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image

import hesse
from hesse import InputError
from hesse.files import read_json
from hesse.multimodal import FusedModel, encode, read_table
from hesse.multimodal.encoders.audio import LogMel
from hesse.multimodal.fusion import FUSIONS
from hesse.training import export as exporting
from hesse.training.export import export
from hesse.training.graph import Graph, ports, samples
from training_tables import TARGET, numbers, pets

pytest.importorskip("onnx", reason="hesse[export] is not installed")
pytest.importorskip("onnxscript", reason="hesse[export] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="hesse[export] is not installed")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, hesse.Run, Path]:
    """A table of pictures, sequences of them, sounds, texts, dates and columns, a run on it, and its file."""
    table = pets(tmp_path_factory.mktemp("zoo"))
    rows = pd.read_csv(table)
    for i in range(5):
        Image.new("RGB", (9, 8), (50 * i, 20, 90)).save(table.parent / f"album{i}.png")
    rows["album"] = [f"album{i % 5}.png|album{i % 3}.png" for i in range(len(rows))]
    rows["born"] = [f"20{10 + i % 9}-0{1 + i % 8}-1{i % 9}" for i in range(len(rows))]
    rows.to_csv(table, index=False)
    run = hesse.train(table, TARGET, out=table.parent / "run", epochs=3, verbose=False)
    return table, run, export(run)


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def arrays_of(run: hesse.Run, frame: Any, root: Path) -> dict[str, Any]:
    """The arrays of a table's rows, made without any help of the exporting code."""
    data = encode(run.schema, read_table(frame), root=root, with_target=False)
    arrays = {}
    for key, (values, present) in data.inputs.items():
        arrays[f"{key}.present"] = present.numpy()
        if isinstance(values, torch.Tensor):
            arrays[key] = values.numpy()
        else:
            names = ("numbers", "categories") if key == "columns" else ("pictures", "counts")
            pairs = zip(names, values, strict=True)  # a table without categories has no such input
            arrays |= {f"{key}.{name}": part.numpy() for name, part in pairs if part.shape[1:].numel()}
    return arrays


def test_the_file_predicts_what_the_run_predicts(zoo: tuple[Path, hesse.Run, Path]) -> None:
    table, run, path = zoo
    assert path == run.folder / "model.onnx"
    kinds = [port.kind for port in ports(run.schema)]
    assert set(kinds) == {"image", "images", "audio", "text", "columns"}
    model, classes = session(path), run.config["classes"]
    assert {one.name: one.shape[1:] for one in model.get_inputs()} == {
        port.name: list(port.shape) for port in ports(run.schema)
    }
    rows = pd.read_csv(table).drop(columns=TARGET)
    expected = run.predict(table).to_pandas()
    shares = expected[[f"probability of {name}" for name in classes]].to_numpy()
    for some in (rows[:1], rows[3:10], rows):  # with missing cells of every column among them
        logits, probability = model.run(["logits", "probabilities"], arrays_of(run, some, table.parent))
        assert np.abs(probability - shares[some.index]).max() < 1e-5
        assert [classes[i] for i in probability.argmax(1)] == expected[TARGET][some.index].to_list()
        assert logits.shape == (len(some), len(classes))
    assert rows.isna().any().all() or rows.drop(columns=["album", "born"]).isna().any().all()


def test_rows_without_anything_and_data_that_are_not_there(zoo: tuple[Path, hesse.Run, Path]) -> None:
    _, run, path = zoo
    arrays = dict(zip((port.name for port in ports(run.schema)), samples(run.schema, 7), strict=True))
    blank = {name: np.zeros_like(array) for name, array in arrays.items()}
    absent = {name: blank[name] if name.endswith(".present") else array for name, array in arrays.items()}
    first, second = (session(path).run(["probabilities"], given)[0] for given in (absent, blank))
    assert (first == second).all() and (first == first[0]).all()


def test_the_metadata_say_how_to_read_cells(zoo: tuple[Path, hesse.Run, Path]) -> None:
    _, run, path = zoo
    said = session(path).get_modelmeta().custom_metadata_map
    assert json.loads(said["hesse.schema"]) == run.schema.to_json()
    inputs = json.loads(said["hesse.inputs"])
    assert list(inputs) == [port.name for port in ports(run.schema)]
    assert inputs["audio_sound"]["columns"] == ["sound"] and inputs["audio_sound"]["dtype"] == "int16"
    assert json.loads(said["hesse.outputs"])["probabilities"]["classes"] == run.config["classes"]
    assert said["hesse.version"] == hesse.__version__


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> hesse.Run:
    """A run on numbers, a category and texts."""
    columns = numbers()
    columns["said"] = [f"{'wow' * (i % 4)} {i}" for i in range(64)]
    del columns["species"]
    folder = tmp_path_factory.mktemp("two")
    return hesse.train(pa.table(columns), "age", out=folder / "run", epochs=1, optimizer="adamw", verbose=False)


@pytest.mark.parametrize("fusion", sorted(set(FUSIONS) - {"concat"}))
def test_every_fusion(two: hesse.Run, fusion: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    schema = two.schema
    model = FusedModel(schema.model_settings(), schema.outputs, fusion, [("regression", 1)])
    monkeypatch.setattr(hesse.Run, "model", lambda run: model.eval())
    path = export(two, tmp_path / "model.onnx")
    arrays = dict(zip((port.name for port in ports(schema)), samples(schema, 20, seed=5), strict=True))
    logits, values = session(path).run(["logits", "values"], arrays)
    graph = Graph(schema, model, {})
    with torch.no_grad():
        expected = graph(*map(torch.from_numpy, arrays.values()))
    assert np.abs(logits - expected[0].numpy()).max() < 1e-5
    assert values.shape == (20,)
    (target,) = schema.targets
    assert np.allclose(values, target.mean + target.scale * logits[:, 0], rtol=1e-6)


def test_the_calibration_is_inside(two: hesse.Run) -> None:
    columns = {"x": [0.1 * i for i in range(40)], "kind": ["a", "b"] * 20}
    schema, _ = hesse.multimodal.make_schema(read_table(pa.table(columns)), "kind", root=Path())
    torch.manual_seed(0)
    model = FusedModel(schema.model_settings(), 2)
    arrays = list(map(torch.from_numpy, samples(schema, 4)))
    with torch.no_grad():
        logits, plain = Graph(schema, model, {})(*arrays)
        same, hot = Graph(schema, model, {"kind": {"temperature": 2.5}})(*arrays)
    assert torch.equal(logits, same)
    assert torch.allclose(plain, logits.softmax(1)) and torch.allclose(hot, (logits / 2.5).softmax(1))


@pytest.mark.parametrize(("rate", "samples"), [(8000, 1), (8000, 8000), (16000, 160_000)])
def test_spectrograms_at_once_are_those_in_pieces(rate: int, samples: int) -> None:
    from hesse.training.graph import _AtOnce

    mel = LogMel(rate, samples)
    sound = torch.randint(-32768, 32767, (20, samples), dtype=torch.int16)
    assert torch.equal(_AtOnce(mel)(sound), mel(sound))


def test_a_file_that_computes_something_else_is_not_left(
    two: hesse.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(graph: Graph, content: bytes, arrays: list[Any], where: str) -> list[Any]:
        with torch.no_grad():
            return [out.numpy() * (1 + 1e-4) for out in graph(*map(torch.from_numpy, arrays))]

    monkeypatch.setattr(exporting, "_written", lambda graph, run: b"")
    monkeypatch.setattr(exporting, "_computed", off)
    (tmp_path / "model.onnx").write_text("an older file", encoding="utf-8")
    with pytest.raises(InputError, match="the limit is 1e-05") as error:
        export(two, tmp_path / "model.onnx")
    assert error.value.finding.kind == "other numbers"
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [
        ("model.onnx", "an older file")
    ]


def test_a_model_that_onnx_has_no_words_for_is_refused(
    two: hesse.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two.model()
    fuse = model.fuse
    model.fuse = lambda *given: fuse(*given) * torch.linalg.eigvalsh(fuse(*given) @ fuse(*given).mT).sum()  # type: ignore
    monkeypatch.setattr(hesse.Run, "model", lambda run: model)
    with pytest.raises(InputError) as error:
        export(two, tmp_path / "model.onnx")
    assert error.value.finding.kind == "not exportable" and "hesse predict" in error.value.finding.remedy
    assert not list(tmp_path.iterdir())


def test_without_a_model_or_a_library_it_is_said(
    two: hesse.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="This is a folder"):
        export(two, tmp_path)
    import importlib

    def without(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ImportError, match=r"pip install 'hesse\[export\]'"):
        export(two)
    assert read_json(two.folder / "config.json")["status"] == "finished"


def test_features_of_a_frozen_model_are_an_input_and_a_model_that_trained_along_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="hesse[pretrained] is not installed")
    from checkpoints import save_text

    monkeypatch.setenv("HESSE_CACHE", str(tmp_path / "cache"))
    columns = numbers(40)
    del columns["age"]
    columns["said"] = [f"{'wow ' * (i % 4)} dog {i}" for i in range(40)]
    options: dict[str, Any] = {"encoders": {"said": f"hf:{save_text(tmp_path / 'bert')}"}, "epochs": 1}
    options |= {"optimizer": "adamw", "verbose": False}
    table = pa.table(columns)
    run = hesse.train(table, "species", out=tmp_path / "frozen", **options)
    arrays = arrays_of(run, table, tmp_path)
    (probability,) = session(export(run)).run(["probabilities"], arrays)
    assert arrays["text_said"].dtype == np.float32
    assert np.abs(probability[:, 0] - run.predict(table)["probability of s0"].to_numpy()).max() < 1e-5
    run = hesse.train(table, "species", out=tmp_path / "trained", trainable={"said": 1}, **options)
    with pytest.raises(InputError, match="pretrained one that trains along") as error:
        export(run)
    assert error.value.finding.where == "column 'said'" and not (run.folder / "model.onnx").exists()


@pytest.mark.parametrize("texts", [1, 5])  # of up to five modalities every combination has shares of its own
def test_a_cure_for_starving_modalities_goes_along(tmp_path: Path, texts: int) -> None:
    columns: dict[str, list[Any]] = {"x": [0.1 * i for i in range(40)], "kind": ["a", "b"] * 20}
    columns |= {f"said {k}": [f"{'oh ' * (i % 5)}{i * k}" for i in range(40)] for k in range(texts)}
    options: dict[str, Any] = {"balance": "pool", "epochs": 1, "optimizer": "adamw", "verbose": False}
    kinds = {name: "text" for name in columns if name.startswith("said")}
    run = hesse.train(pa.table(columns), "kind", out=tmp_path / "run", columns=kinds, **options)
    assert len(run.schema.modalities) == texts + 1
    (probability,) = session(export(run)).run(["probabilities"], arrays_of(run, pa.table(columns), tmp_path))
    expected = run.predict(pa.table(columns))["probability of b"].to_numpy()
    assert np.abs(probability[:, 1] - expected).max() < 1e-5
