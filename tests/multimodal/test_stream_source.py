"""A table read in pieces is the table read at once, and what is wrong with it is said alike."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hesse import InputError
from hesse.multimodal import Table, read_table
from hesse.multimodal.stream import Source, blocks, open_source, readers


def whole(source: Source) -> pa.Table:
    parts = [source.read(i) for i in range(source.pieces)]
    return pa.concat_tables([part.data for part in parts], promote_options="permissive")


def same(source: Source, table: Table) -> None:
    assert source.names == table.names
    assert len(source) == len(table)
    assert whole(source).to_pydict() == table.data.to_pydict()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 11)


CELLS = st.text(st.sampled_from('ab ,;"\n\r1.é'), max_size=6) | st.sampled_from(["NA", "", "1,5", "-2", "x\r\ny"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_csv_in_pieces_is_csv_at_once(tmp_path: Path, small_blocks: None, data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 3))
    rows = data.draw(st.lists(st.lists(CELLS, min_size=columns, max_size=columns), min_size=1, max_size=12))
    delimiter, end = data.draw(st.sampled_from(",;|")), data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=data.draw(st.sampled_from([0, 1])))
    writer.writerows([[f"c{i}" for i in range(columns)], *rows])
    path = tmp_path / "table.csv"
    path.write_bytes(data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.getvalue().encode())
    try:
        expected = read_table(path, delimiter=delimiter)
    except InputError as error:
        with pytest.raises(InputError) as found:
            open_source(path, delimiter=delimiter)
        assert found.value.finding.kind == error.finding.kind
        return
    source = open_source(path, delimiter=delimiter)
    same(source, expected)
    for piece in range(source.pieces):
        some = source.read(piece, ["c0"])
        assert some.data.column_names == ["c0"]
        assert some.first == source.starts[piece]


VALUES = st.none() | st.integers(-5, 5) | st.floats(-2, 2, width=16)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({}, optional={"a": VALUES, "b": st.none() | st.text("xé \n", max_size=4)})))
def test_json_lines_in_pieces_are_json_lines_at_once(
    tmp_path: Path, small_blocks: None, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path / "table.jsonl"
    rows = [{"a": 1.5, "b": "begin"}, *rows]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    same(open_source(path), read_table(path))


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_parquet_in_row_groups_is_parquet_at_once(tmp_path: Path, rows: int) -> None:
    table = pa.table({"x": [1.5, None, float("nan"), 4.0] * 16, "name": [" a", "NA", "b ", None] * 16})
    table = table.append_column("kind", pa.array(["s", "t"] * 32).dictionary_encode())
    pa.parquet.write_table(table, tmp_path / "table.parquet", row_group_size=rows)
    source = open_source(tmp_path / "table.parquet")
    assert source.pieces == -(-64 // rows)
    same(source, read_table(tmp_path / "table.parquet"))
    assert source.read(source.pieces - 1, ["kind"]).names == ["kind"]


def test_a_frame_is_read_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SLICE", 3)
    frame = pd.DataFrame({"x": range(8), "name": list("abcdefgh")})
    source = open_source(frame)
    assert source.pieces == 3 and source.folder is None
    same(source, read_table(frame))


def test_a_folder_is_one_table_in_the_order_of_names_and_rows_are_named_by_file(tmp_path: Path) -> None:
    for i, text in ((1, "x,name\n1,a\n2,b\n"), (0, "name,x\nc,3\n"), (10, "x,name\n4,d\n")):
        (tmp_path / f"part{i:02}.csv").write_text(text)
    (tmp_path / "_notes.csv").write_text("z\n1\n")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "more.csv").write_text("z\n1\n")
    (tmp_path / "photo.png").write_bytes(b"")
    source = open_source(tmp_path)
    assert whole(source).select(["x", "name"]).to_pydict() == {"x": list("3124"), "name": list("cabd")}
    assert source.read(1).where("x", 1) == "part01.csv, row 2, column 'x'"
    assert source.folder == tmp_path


def test_names_of_parquet_folders_are_columns(tmp_path: Path) -> None:
    for species in ("cat", "dog"):
        (tmp_path / f"species={species}").mkdir()
        pa.parquet.write_table(pa.table({"x": [1.0, 2.0]}), tmp_path / f"species={species}" / "a.parquet")
    source = open_source(tmp_path)
    assert whole(source).to_pydict() == {"x": [1.0, 2.0] * 2, "species": ["cat", "cat", "dog", "dog"]}


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("x\n1\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("x\n1\n")
    (tmp_path / "data" / "b.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(InputError, match="outside the data folder"):
        open_source(tmp_path / "data")
    (tmp_path / "data" / "b.csv").unlink()
    (tmp_path / "data" / "b.csv").symlink_to("a.csv")
    assert len(open_source(tmp_path / "data")) == 2


FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "nothing": ({}, "no table in this folder"),
    "several formats": ({"a.csv": "x\n1\n", "b.jsonl": '{"x": 1}\n'}, "several formats: delimited, json"),
    "other columns": ({"a.csv": "x,y\n1,2\n", "b.csv": "x,z\n1,2\n"}, r"b.csv: .* lacks y and has z besides"),
    "no rows": ({"a.csv": "x,y\n", "b.csv": "x,y\n"}, "no rows"),
    "a name twice": ({"a.csv": "x,x\n1,2\n"}, "Both columns are called 'x'"),
    "ragged": ({"a.csv": "x,y\n1,2\n", "b.csv": "x,y\n1,2\n1,2\n3\n"}, "b.csv, row 3: The row has 1 cells"),
    "damaged": ({"a.parquet": "PAR1"}, "not a whole Parquet file"),
    "mixed": ({"a.jsonl": '{"x": 1}\n{"x": "one"}\n'}, "row 2, column 'x'"),
    "latin-1": ({"a.csv": "x\n\udce9\n"}, "line 2.*0xe9"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, small_blocks: None, name: str) -> None:
    files, says = FOLDERS[name]
    for file, text in files.items():
        (tmp_path / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=says):
        open_source(tmp_path)


def test_a_quote_that_is_never_closed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.csv"
    path.write_text('x,y\n1,2\n3,"4\n' + "5,6\n" * 50)
    for block, largest in ((1 << 20, 64 << 20), (11, 64 << 20), (11, 40)):
        monkeypatch.setattr(blocks, "BLOCK", block)
        monkeypatch.setattr(blocks, "LARGEST", largest)
        monkeypatch.setattr(readers, "LARGEST", largest)
        with pytest.raises(InputError, match=r"table.csv, row 2: A double quote is opened"):
            open_source(path)


@pytest.mark.parametrize("how", ["appended", "rewritten", "replaced", "removed", "touched"])
def test_a_file_that_changes_is_refused(tmp_path: Path, small_blocks: None, how: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text("x,y\n1,2\n3,4\n5,6\n")
    source = open_source(path)
    assert len(source.read(0)) == 1
    if how == "appended":
        path.write_text("x,y\n1,2\n3,4\n5,6\n7,8\n")
    elif how == "rewritten":
        path.write_text("x,y\n1,2\n3,4\n5,9\n")
        os.utime(path, ns=(0, 0))
    elif how == "replaced":
        (tmp_path / "new.csv").write_text("x,y\n1,2\n3,4\n5,6\n")
        (tmp_path / "new.csv").replace(path)
    elif how == "removed":
        path.unlink()
    else:
        os.utime(path, ns=(0, 0))
    with pytest.raises(InputError, match="table changed") as error:
        source.read(1)
    assert "work on a copy" in error.value.finding.remedy


def test_a_file_that_changes_while_it_is_read_at_once_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hesse.multimodal import table

    path = tmp_path / "table.csv"
    path.write_text("x,y\n1,2\n")

    def read(path: Path, *rest: Any) -> Any:
        found = real(path, *rest)
        path.write_text("x,y\n1,2\n3,4\n")
        return found

    real = table.read_delimited
    monkeypatch.setattr(table, "read_delimited", read)
    with pytest.raises(InputError, match="table changed"):
        read_table(path)
