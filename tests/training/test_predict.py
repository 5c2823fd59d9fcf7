"""Predictions of tables of any size: in order, in little memory, with a name for every row that fails."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

import hesse
from hesse import InputError
from hesse.cli.app import app
from hesse.files import read_lines
from hesse.multimodal.stream import blocks, open_source
from hesse.training import forecast, predictions
from training_tables import TARGET, numbers, pets, write_csv


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, hesse.Run]:
    table = pets(tmp_path_factory.mktemp("zoo"))
    return table, hesse.train(table, TARGET, out=table.parent / "run", epochs=2, optimizer="adamw", verbose=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> hesse.Run:
    """Numbers and a category."""
    folder = tmp_path_factory.mktemp("plain")
    return hesse.train(
        pa.table(numbers()).drop(["age"]), "species", out=folder / "run", epochs=2, optimizer="adamw", verbose=False
    )


def predict(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def close(one: pa.Table, other: pa.Table) -> None:
    """Floats of batches of other sizes may differ in the last bits."""
    assert one.column_names == other.column_names
    pd.testing.assert_frame_equal(one.to_pandas(), other.to_pandas(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 59, 60, 1000])
def test_chunks_of_any_size_give_the_same_rows_in_order(
    zoo: tuple[Path, hesse.Run], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    table, run = zoo
    whole = run.predict(table)
    monkeypatch.setattr(forecast, "ROWS", rows)
    monkeypatch.setattr(blocks, "BLOCK", 997)
    seen: list[tuple[int, int]] = []
    chunks = list(run.forecast(table, progress=lambda done, total: seen.append((done, total))))
    assert max(len(chunk) for chunk in chunks) <= rows
    close(pa.concat_tables(chunks), whole)
    assert seen[-1] == (60, 60)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_table_of_every_format_and_a_folder_of_them_give_the_same(
    zoo: tuple[Path, hesse.Run], tmp_path: Path, ending: str
) -> None:
    table, run = zoo
    frame = pd.read_csv(table)
    parts = tmp_path / "parts"
    parts.mkdir()
    for i, part in enumerate((frame[:25], frame[25:26], frame[26:])):
        path = parts / f"{i}.{ending}"
        if ending == "csv":
            part.to_csv(path, index=False)
        elif ending == "jsonl":
            part.to_json(path, orient="records", lines=True, force_ascii=False)
        else:
            part.to_parquet(path, row_group_size=10)
    close(run.predict(parts, data_root=table.parent), run.predict(table))


def test_rows_that_fail_are_named_in_every_way_and_the_rest_is_done(
    zoo: tuple[Path, hesse.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "ROWS", 16)
    table, run = zoo
    whole = run.predict(table)
    frame = pd.read_csv(table, dtype=str)
    (table.parent / "broken.png").write_bytes(b"no picture")
    frame.loc[3, "写真.png"] = "broken.png"
    frame.loc[20, "sound"] = "absent.wav"
    frame.loc[33, "写真.png"] = "../../outside.png"
    frame.loc[47, "sound"] = "/etc/passwd"
    frame.loc[59, "weight (kg)"] = "heavy"
    bad = [3, 20, 33, 47, 59]
    frame.to_csv(table.parent / "bad.csv", index=False)
    found = run.forecast(table.parent / "bad.csv")
    predicted = pa.concat_tables(list(found))
    assert (found.rows, found.failed) == (60, 5)
    assert [finding.where.split(", ")[1] for finding in found.failures] == [f"row {row + 1}" for row in bad]
    assert found.failures[2].kind == found.failures[3].kind == "path outside the data folder"
    assert [i for i, cell in enumerate(predicted[TARGET].to_pylist()) if cell is None] == bad
    assert all(column.null_count == 5 for column in predicted.columns)
    good = [row for row in range(60) if row not in bad]
    close(predicted.take(good), whole.take(good))
    with pytest.raises(InputError, match="row 4"):
        list(run.forecast(table.parent / "bad.csv", strict=True))

    code, line, err = predict(run.folder, table.parent / "bad.csv", "--out", tmp_path / "p.csv", "--json")
    told = json.loads(line)
    assert (code, told["ok"], told["rows"], told["empty"]) == (0, True, 60, 5)
    assert [finding["where"] for finding in told["failures"]] == [finding.where for finding in found.failures]
    assert "55 predictions" in err and "5 rows cannot be read; their predictions are empty" in err
    assert all(f"row {row + 1}" in err for row in bad)
    code, _, err = predict(run.folder, table.parent / "bad.csv", "--out", tmp_path / "strict.csv", "--strict")
    assert code == 1 and "row 4" in err
    assert not (tmp_path / "strict.csv").exists()


def test_of_many_failures_the_first_are_named(plain: hesse.Run, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", ["x", "y", "kind"], [["1", "2" if i == 7 else "two", "a"] for i in range(50)])
    code, out, err = predict(plain.folder, table)
    assert code == 0
    assert out.count("\n") == 51
    assert err.count("not a number at") == 20
    assert "49 rows cannot be read, the first 20 of which are named above" in err


def test_a_table_without_a_readable_row_is_refused_and_nothing_is_written(plain: hesse.Run, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", ["x", "y", "kind"], [["one", "2", "a"]] * 3)
    code, _, err = predict(plain.folder, table, "--out", tmp_path / "p.csv")
    assert code == 1 and "None of the other 2 rows can be read either" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv"]


def test_unknown_categories_and_absent_columns_are_told_once(plain: hesse.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "ROWS", 10)
    columns = {name: cells for name, cells in numbers().items() if name in ("x", "kind")}
    columns["kind"][5:25] = ["new"] * 20
    columns["Y"] = [1.0] * 64
    found = plain.forecast(pa.table(columns))
    predicted = pa.concat_tables(list(found))
    assert predicted["species"].null_count == 0
    absent, unknown = found.findings
    assert absent.kind == "missing column" and "Did you mean 'Y'?" in absent.remedy
    assert unknown.kind == "unknown categories" and unknown.value == 20
    assert unknown.message == "20 of 64 values were in no training row and count as missing: 'new' (20)."


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_failure_while_writing_leaves_what_was_there(
    plain: hesse.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    out = tmp_path / f"p.{ending}"
    out.write_text("before")
    table = tmp_path / "t.csv"
    write_csv(table, ["x", "y", "kind"], [["1", "2", "a"]] * 2000)

    def changing(self: Any, piece: int, names: Any = None) -> Any:
        found = read(self, piece, names)
        os.utime(table, ns=(0, 0))
        return found

    read = type(open_source(table)).read
    monkeypatch.setattr(type(open_source(table)), "read", changing)
    monkeypatch.setattr(blocks, "BLOCK", 5000)
    code, _, err = predict(plain.folder, table, "--out", out)
    assert code == 1 and "changed while it was read" in err
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "t.csv"]


def test_files_say_what_the_table_says(zoo: tuple[Path, hesse.Run], tmp_path: Path) -> None:
    table, run = zoo
    whole = run.predict(table)
    for ending in ("csv", "jsonl", "parquet"):
        assert predict(run.folder, table, "--out", tmp_path / f"p.{ending}")[0] == 0
    close(pa.csv.read_csv(tmp_path / "p.csv"), whole)
    close(pa.Table.from_pylist(read_lines(tmp_path / "p.jsonl")), whole)
    close(pa.parquet.read_table(tmp_path / "p.parquet"), whole)


def test_parquet_has_large_row_groups_whatever_the_chunks(
    plain: hesse.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "ROWS", 10)
    monkeypatch.setattr(predictions, "ROW_GROUP", 30)
    pa.parquet.write_table(pa.table(numbers()), tmp_path / "t.parquet")
    assert predict(plain.folder, tmp_path / "t.parquet", "--out", tmp_path / "p.parquet")[0] == 0
    metadata = pa.parquet.read_metadata(tmp_path / "p.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [30, 30, 4]


def test_predictions_are_not_written_into_the_folder_they_are_made_from(plain: hesse.Run, tmp_path: Path) -> None:
    write_csv(tmp_path / "parts" / "a.csv", ["x", "y", "kind"], [["1", "2", "a"]])
    code, _, err = predict(plain.folder, tmp_path / "parts", "--out", tmp_path / "parts" / "b.csv")
    assert code == 1 and "would lie in the folder that is read" in err
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["a.csv"]
