"""Cells become tensors: values, masks, targets, and what happens to rows that cannot be read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import hesse
from hesse import InputError
from hesse.multimodal import Dataset, FusedModel, Schema, Table, encode, make_schema, media, read_table
from hesse.multimodal.encoders import image

N = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty bright or dark pictures with high or low sounds, and pets.csv that names them."""
    random = np.random.default_rng(0)
    lines = ["photo,sound,story,weight,size,species"]
    for i in range(N):
        dog = i % 2
        Image.fromarray((random.random((8, 9)) * 100 + 150 * dog).astype(np.uint8)).save(tmp_path / f"{i}.png")
        wave = np.sin(np.arange(800) * (0.2 + 0.4 * dog) + i)
        soundfile.write(tmp_path / f"{i}.wav", wave, 8000)
        species, size, weight = ("cat", "dog")[dog], "SML"[i % 3], 4 + 16 * dog + random.normal()
        lines.append(f"{i}.png,{i}.wav,the {species} number {i * 37 % 100},{weight:.2f},{size},{species}")
    (tmp_path / "pets.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def edit(folder: Path, row: int, old: str, new: str) -> None:
    """Replace part of one data row (from 1) of pets.csv."""
    lines = (folder / "pets.csv").read_text(encoding="utf-8").split("\n")
    assert old in lines[row]
    lines[row] = lines[row].replace(old, new)
    (folder / "pets.csv").write_text("\n".join(lines), encoding="utf-8")


def load(folder: Path, **options: Any) -> tuple[Schema, dict[str, Any], Dataset]:
    table = read_table(folder / "pets.csv")
    schema, parts = make_schema(table, "species", root=folder)
    return schema, parts, encode(schema, table, root=folder, **options)


def test_all_modalities_reach_the_model(folder: Path) -> None:
    ticks: list[tuple[int, int]] = []
    schema, parts, data = load(folder, progress=lambda done, total: ticks.append((done, total)))
    assert list(data.inputs) == ["image_photo", "audio_sound", "text_story", "columns"]
    assert ticks[-1] == (2 * N, 2 * N)
    assert ticks == sorted(ticks)
    assert len(data) == N
    assert not data.findings
    model = FusedModel(schema.model_settings(), schema.outputs)
    batch = data.batch(data.positions(parts["train"]))
    step = hesse.closure(model, torch.nn.functional.cross_entropy, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    before = float(step())
    for _ in range(5):
        optimizer.step(step)
    assert float(step()) < 0.5 * before


def test_every_picture_lies_in_its_row(folder: Path) -> None:
    """Against a loop: threads fill the array, so a mixed-up row would be theirs."""
    schema, _, data = load(folder)
    pixels, present = data.inputs["image_photo"]
    settings = schema.modalities["image_photo"][0].settings
    for i in range(N):
        assert np.array_equal(pixels[i], image.decode(folder / f"{i}.png", settings))
    assert present.all()


def test_missing_cells_are_absent_not_wrong(folder: Path) -> None:
    for cell in ("0.png", "0.wav", "the cat number 0"):
        edit(folder, 1, cell, "")
    _, _, data = load(folder)
    for key in ("image_photo", "audio_sound", "text_story"):
        values, present = data.inputs[key]
        assert present.tolist() == [False] + [True] * (N - 1)
        assert not values[0].any()
        assert values[1].any()


def test_numbers_and_categories_are_coded_as_the_schema_says() -> None:
    size = ["S", "M", "M", None, "L", "M"] * 10
    weight = [1.0, None, 2.5, None, 1e9, -3.0] * 10
    table = read_table(pa.table({"size": size, "weight": weight, "y": ["a", "b", "b"] * 20}))
    schema, _ = make_schema(table, "y", root=Path())
    (numbers, codes), present = encode(schema, table, root=Path()).inputs["columns"]
    by_name = {column.name: column.settings for column in schema.columns}
    assert by_name["size"]["values"][0] == "M"
    for i in range(6):
        code = 0 if size[i] is None else 1 + by_name["size"]["values"].index(size[i])
        assert codes[i, 0] == code
        value = weight[i]
        if value is None:
            assert numbers[i, 0].isnan()
        else:
            standard = (value - by_name["weight"]["mean"]) / by_name["weight"]["std"]
            assert numbers[i, 0] == pytest.approx(min(standard, 10.0), rel=1e-6)
    assert present[:6].tolist() == [True, True, True, False, True, True]
    assert (numbers.dtype, codes.dtype) == (torch.float32, torch.int64)

    unseen = read_table(pa.table({"size": ["XXL", " M", None], "weight": ["1.0", "nan", "2.5"]}))
    (numbers, codes), _ = encode(schema, unseen, root=Path(), with_target=False).inputs["columns"]
    assert codes[:, 0].tolist() == [0, 1, 0]
    assert numbers[:, 0].isnan().tolist() == [False, True, False]


@given(st.lists(st.floats(), min_size=8, max_size=30))
@settings(deadline=None)
def test_any_number_stays_within_ten_deviations(values: list[float]) -> None:
    n = len(values)
    table = new_table(x=values, w=[i**2 for i in range(n)], y=["a" if i % 2 else "b" for i in range(n)])
    schema, _ = make_schema(table, "y", root=Path())
    (numbers, _), _ = encode(schema, table, root=Path()).inputs["columns"]
    if any(column.name == "x" for column in schema.inputs):
        assert numbers[:, 0].isnan().tolist() == [math.isnan(value) for value in values]
    assert numbers.nan_to_num(0, math.inf, -math.inf).abs().max() <= 10.001


def test_targets() -> None:
    x = ["S", "M"] * 30
    table = read_table(pa.table({"x": x, "y": ["dog", None, "cat"] * 20}))
    schema, parts = make_schema(table, "y", root=Path())
    data = encode(schema, table, root=Path())
    assert data.rows.tolist() == [i for i in range(60) if i % 3 != 1]
    assert data.targets is not None
    assert data.targets.tolist() == [1, 0] * 20
    assert [(f.kind, f.value) for f in data.findings] == [("missing target", 20)]
    assert torch.equal(data.rows[data.positions(parts["valid"])], torch.from_numpy(parts["valid"]))

    y = [float(i) + 0.5 for i in range(60)]
    table = read_table(pa.table({"x": x, "y": y}))
    schema, parts = make_schema(table, "y", root=Path())
    data = encode(schema, table, root=Path())
    assert data.targets is not None
    assert data.targets.dtype == torch.float32
    (target,) = schema.targets
    assert (data.targets[:, 0] * target.scale + target.mean).tolist() == pytest.approx(y, rel=1e-5)
    train = data.targets[data.positions(parts["train"])]
    assert (float(train.mean()), float(train.std(correction=0))) == pytest.approx((0, 1), abs=1e-6)


def test_prediction_needs_the_inputs_and_not_the_target() -> None:
    table = read_table(pa.table({"x": ["S", "M"] * 30, "w": [0.5, 1.5, 3.5] * 20, "y": ["a", "b"] * 30}))
    schema, _ = make_schema(table, "y", root=Path())
    new = read_table(pa.table({"w": [1.0], "x": ["S"]}))
    data = encode(schema, new, root=Path(), with_target=False)
    assert data.targets is None
    assert data.batch([0])[1] is None
    with pytest.raises(InputError, match="lacks 'x', 'y'"):
        encode(schema, new_table(w=[1.0]), root=Path())
    with pytest.raises(InputError, match="lacks 'x', 'w', which"):
        encode(schema, new_table(v=[1.0]), root=Path(), with_target=False)
    data = encode(schema, new_table(W=[1.0, 2.0], x=["S", "M"]), root=Path(), with_target=False)
    (numbers, codes), present = data.inputs["columns"]
    assert (numbers.isnan().all(), codes[:, 0].tolist(), present.all()) == (True, [2, 1], True)
    assert [(f.kind, f.value) for f in data.findings] == [("missing column", "w")]
    assert "Did you mean 'W'?" in data.findings[0].remedy
    with pytest.raises(InputError, match=r"row 2, column 'w': The value 'big' is not a number"):
        encode(schema, new_table(w=["1", "big"], x=["S", "M"]), root=Path(), with_target=False)
    with pytest.raises(InputError, match=r"column 'x': The column holds list<.*> values"):
        encode(schema, new_table(w=[1.0], x=[["S"]]), root=Path(), with_target=False)
    with pytest.raises(InputError, match=r"row 2, column 'y': The model was not trained on the class 'c'"):
        encode(schema, new_table(w=[1.0, 1.0], x=["S", "M"], y=["a", "c"]), root=Path())


def new_table(**columns: list[Any]) -> Table:
    return read_table(pa.table(columns))


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "16.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "20.png").unlink()
    (folder / "20.wav").unlink()
    (folder / "30.wav").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"2 of the other 39 rows cannot be read either.*--skip-bad-rows") as caught:
        load(folder)
    assert caught.value.finding.where == "pets.csv, row 17, column 'photo' (16.png)"


def test_bad_rows_are_skipped_counted_and_listed(folder: Path) -> None:
    _, _, whole = load(folder)
    (folder / "16.png").write_bytes(b"no picture")
    (folder / "30.wav").write_bytes(b"RIFF")
    _, parts, data = load(folder, skip_bad_rows=True)
    kept = [i for i in range(N) if i not in (16, 30)]
    assert data.rows.tolist() == kept
    assert [f.where for f in data.findings] == [
        "pets.csv",
        "pets.csv, row 17, column 'photo' (16.png)",
        "pets.csv, row 31, column 'sound' (30.wav)",
    ]
    assert data.findings[0].value == 2
    assert data.targets is not None
    assert whole.targets is not None
    assert torch.equal(data.targets, whole.targets[kept])
    codes, _ = data.inputs["text_story"]
    assert torch.equal(codes, whole.inputs["text_story"][0][kept])
    assert sum(len(data.positions(rows)) for rows in parts.values()) == N - 2


def test_the_list_of_bad_rows_is_short(folder: Path) -> None:
    for i in range(25):
        (folder / f"{i}.png").write_bytes(b"no picture")
    _, _, data = load(folder, skip_bad_rows=True)
    assert len(data) == 15
    assert len(data.findings) == 21
    for i in range(25, N):
        (folder / f"{i}.wav").write_bytes(b"no sound")
    table = read_table(folder / "pets.csv")
    schema, _ = make_schema(table, "species", overrides={"photo": "ignore", "sound": "ignore"}, root=folder)
    assert list(schema.modalities) == ["text_story", "columns"]


def test_when_no_file_can_be_read_skipping_does_not_help(folder: Path) -> None:
    for i in range(N):
        (folder / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"column 'photo'.*None of the image files looked at can be read"):
        load(folder, skip_bad_rows=True)


def test_a_path_outside_is_refused_even_when_skipping(folder: Path) -> None:
    edit(folder, 17, "16.png", "../16.png")
    with pytest.raises(InputError, match=r"outside the data folder at pets\.csv, row 17, column 'photo'"):
        load(folder, skip_bad_rows=True)


def test_large_data_live_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, small = load(folder)
    monkeypatch.setattr(media, "IN_MEMORY", 0)
    assert isinstance(media.allocate((3, 2), np.dtype(np.uint8)), np.memmap)
    (folder / "0.png").write_bytes(b"no picture")
    _, _, data = load(folder, skip_bad_rows=True)
    indices = torch.tensor([5, 3, 38])
    large, _ = data.batch(indices)[0]["audio_sound"]
    assert torch.equal(large, small.inputs["audio_sound"][0][indices + 1])


def test_no_room_on_the_disk_is_said_beforehand() -> None:
    with pytest.raises(InputError, match="TMPDIR"):
        media.allocate((1 << 40, 1 << 15), np.dtype(np.uint8))


def test_batches_by_slice_list_and_tensor() -> None:
    table = read_table(pa.table({"x": ["S", "M"] * 30, "y": ["a", "b"] * 30}))
    schema, _ = make_schema(table, "y", root=Path())
    data = encode(schema, table, root=Path())
    for indices in (slice(1, 4), [1, 2, 3], np.array([1, 2, 3]), torch.tensor([1, 2, 3])):
        inputs, targets = data.batch(indices)
        (_, codes), present = inputs["columns"]
        assert targets is not None
        assert (targets.tolist(), len(codes), len(present)) == ([1, 0, 1], 3, 3)
