"""Which rows train, and in which order: each once an epoch, whatever the pieces, the buffer, the workers and ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse import InputError
from hesse.multimodal import Schema, make_schema, read_table
from hesse.multimodal.stream import Decoded, Loader, blocks, divide, open_source, readers
from hesse.multimodal.stream.divide import NONE, TEST, TRAIN, VALID, hashed
from hesse.multimodal.stream.order import windows


def alone(rows: Tensor) -> Tensor:
    return rows


def rank(number: int) -> Callable[[Tensor], Tensor]:
    def share(rows: Tensor) -> Tensor:
        return rows.tensor_split(2)[number] if len(rows) >= 2 else rows

    return share


def table(path: Path, rows: int) -> Path:
    lines = ["x,name,y", *(f"{i},n{i % 7},{'ab'[i % 2]}" for i in range(rows))]
    path.write_text("\n".join(lines) + "\n")
    return path


def schema_of(path: Path) -> Schema:
    """x as it is: mean 0, deviation 1."""
    source = read_table(path)
    schema, _ = make_schema(source, "y", root=path.parent, overrides={"x": "number"})
    for column in schema.columns:
        if column.name == "x":
            column.settings.update(mean=0.0, std=1e6)  # nothing is far out
    return schema


def loader_of(path: Path, wanted: Any, buffer: int, workers: int = 0) -> Loader:
    return Loader(schema_of(path), open_source(path), wanted, root=path.parent, buffer=buffer, workers=workers)


def dealt(batches: Any) -> list[list[int]]:
    """The x of each row of each batch."""
    return [(batch.data.inputs["columns"][0][0][:, 0].double() * 1e6).round().long().tolist() for batch in batches]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(30, 90), st.integers(1, 100), st.integers(1, 40), st.integers(20, 400), st.integers(0, 9), st.randoms()
)
def test_an_epoch_is_every_wanted_row_once_from_wherever_it_is_taken_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    buffer: int,
    size: int,
    block: int,
    epoch: int,
    random: Any,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    path = table(tmp_path / "t.csv", rows)
    wanted = np.array([random.random() < 0.8 for _ in range(rows)])
    loader = loader_of(path, wanted, buffer)
    whole = dealt(loader.batches(epoch, 0, size, 5, alone))
    assert sorted(x for batch in whole for x in batch) == np.flatnonzero(wanted).tolist()
    assert len(loader) == wanted.sum()
    assert all(len(batch) == size for batch in whole[:-1])
    start = random.randrange(len(whole) + 1)
    assert dealt(loader.batches(epoch, start, size, 5, alone)) == whole[start:]
    first, second = (dealt(loader.batches(epoch, start, size, 5, rank(number))) for number in (0, 1))
    assert [a + b if len(w) > 1 else a for a, b, w in zip(first, second, whole[start:], strict=True)] == whole[start:]
    if wanted.sum() > 10:
        assert dealt(loader.batches(epoch + 1, 0, size, 5, alone)) != whole


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing_and_outlive_an_epoch_that_is_broken_off(tmp_path: Path, workers: int) -> None:
    path = table(tmp_path / "t.csv", 200)
    wanted = np.ones(200, bool)
    here, there = loader_of(path, wanted, 50), loader_of(path, wanted, 50, workers)
    try:
        for epoch in (0, 1):
            batches = iter(there.batches(epoch, 0, 8, 0, alone))
            next(batches)
            del batches  # out of time
            assert dealt(there.batches(epoch, 3, 8, 0, alone)) == dealt(here.batches(epoch, 3, 8, 0, alone))
    finally:
        there.close()


def test_random_numbers_of_the_process_are_left_alone(tmp_path: Path) -> None:
    loader = loader_of(table(tmp_path / "t.csv", 40), np.ones(40, bool), 10)
    before = torch.get_rng_state()
    assert len(list(loader.batches(0, 0, 8, 0, alone))) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_what_comes_before_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 100)
    loader = loader_of(table(tmp_path / "t.csv", 400), np.ones(400, bool), 40)
    read = []
    real = type(loader._source).read
    monkeypatch.setattr(type(loader._source), "read", lambda *a: read.append(a[1]) or real(*a))  # type: ignore[func-returns-value]
    assert len(list(loader.batches(0, 35, 10, 0, alone))) == 5
    assert len(read) < 0.3 * loader._source.pieces


def test_a_row_that_fails_is_told_by_file_and_row_and_the_others_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path / "t.csv", 60)
    schema = schema_of(path)
    lines = path.read_text().split("\n")
    lines[18] = "many,n1,a"
    lines[41] = "1,n1,c"  # a new class, which stops a whole table
    path.write_text("\n".join(lines))
    monkeypatch.setattr(blocks, "BLOCK", 100)
    loader = Loader(schema, open_source(path), np.ones(60, bool), root=tmp_path, buffer=30, workers=1)
    try:
        batches: list[Decoded] = list(loader.batches(0, 0, 7, 0, alone))
    finally:
        loader.close()
    errors = [error.finding for batch in batches for error in batch.errors.values()]
    assert sorted(f"{f.kind}: {f.where}" for f in errors) == [
        "not a number: t.csv, row 18, column 'x'",
        "unknown class: t.csv, row 41, column 'y'",
    ]
    assert sum(len(batch.data) for batch in batches) == 58
    for batch in batches:
        assert sorted([*batch.data.rows.tolist(), *batch.errors]) == list(range(batch.whole))


def test_a_table_that_changes_stops_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 100)
    path = table(tmp_path / "t.csv", 200)
    loader = loader_of(path, np.ones(200, bool), 20)
    batches = loader.batches(0, 0, 10, 0, alone)
    next(batches)
    table(path, 210)
    with pytest.raises(InputError, match="table changed"):
        list(batches)


def test_a_buffer_mixes_pieces_from_all_over() -> None:
    counts = np.full(1000, 10)
    found = windows(counts, 500, epoch=3, seed=1)
    assert len(found) == 20
    assert all(window.rows == 500 and np.ptp(window.pieces) > 800 for window in found)
    assert np.array_equal(np.sort(np.concatenate([window.pieces for window in found])), np.arange(1000))
    assert [window.first for window in found] == list(range(0, 10_000, 500))


def test_hashes_are_uniform_and_seeded() -> None:
    rows = np.arange(100_000, dtype=np.uint64)
    chances = hashed(rows, 0)
    assert chances.min() >= 0 and chances.max() < 1
    assert np.histogram(chances, 10, (0, 1))[0] == pytest.approx(np.full(10, 10_000), rel=0.04)
    assert abs(np.corrcoef(chances, hashed(rows, 1))[0, 1]) < 0.01
    assert abs(np.corrcoef(chances[1:], chances[:-1])[0, 1]) < 0.01


def test_parts_are_bounded_and_depend_on_the_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["hesse.multimodal.stream.divide"]
    monkeypatch.setattr(module, "MOST_HELD", 40)
    frame = pa.table({"y": ["a", "b", None, "c"] * 500})
    found = divide(open_source(frame), ["y"], None, 0)
    monkeypatch.setattr(readers, "SLICE", 7)
    again = divide(open_source(frame), ["y"], None, 0)
    assert np.array_equal(found.part, again.part) and np.array_equal(found.examples, again.examples)
    assert (found.part == NONE).tolist() == [False, False, True, False] * 500
    for part in (VALID, TEST):
        assert 20 < (found.part == part).sum() < 60
    assert not np.array_equal(found.part, divide(open_source(frame), ["y"], None, 1).part)


def test_the_sample_is_spread_and_has_a_row_of_every_class() -> None:
    y = ["a", "b"] * 5000
    y[7777], y[3] = "rare", "rarer"
    found = divide(open_source(pa.table({"y": y})), ["y"], None, 0)
    sample = found.sample(100)
    assert {7777, 3} <= set(sample.tolist())
    assert len(sample) <= 104
    assert np.diff(sample).max() < 300
    assert (found.part[sample] == TRAIN).all()


def test_a_split_column_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "Validation", "test", "dev"] * 300
    frame = {"y": ["a", "b", "a"] * 400, "s": words}
    part = divide(open_source(pa.table(frame)), ["y"], "s", 0).part
    assert part.tolist() == [TRAIN, VALID, TEST, VALID] * 300
    module = sys.modules["hesse.multimodal.stream.divide"]
    monkeypatch.setattr(module, "MOST_HELD", 100)
    thinned = divide(open_source(pa.table(frame)), ["y"], "s", 0).part
    assert 60 < (thinned == VALID).sum() < 140 and (thinned == TRAIN).sum() == 300
    frame["s"] = ["train"] * 1200
    assert (divide(open_source(pa.table(frame)), ["y"], "s", 0).part == VALID).any()
    frame["s"][777] = "perhaps"
    with pytest.raises(InputError, match=r"row 778.*perhaps"):
        divide(open_source(pa.table(frame)), ["y"], "s", 0)


def test_labels_in_lists_are_found_and_few_rows_still_validate() -> None:
    frame = pa.table({"y": pa.array([["a"], ["a", "b"], None, ["c"]] * 3)})
    found = divide(open_source(frame), ["y"], None, 0)
    assert {0, 1, 3} <= set(found.examples.tolist())
    assert (found.part == VALID).sum() >= 1
