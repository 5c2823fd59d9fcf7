"""Tables of every format become the same columns; files that cannot be read say where and why."""

from __future__ import annotations

import datetime
import decimal
import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from pyarrow import parquet

from hesse import InputError
from hesse.multimodal import Table, read_table
from hesse.multimodal.delimited import find_delimiter
from hesse.multimodal.stream import open_source


def write(folder: Path, content: str | bytes, name: str = "pets.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(folder: Path, content: str | bytes, name: str = "pets.csv") -> InputError:
    with pytest.raises(InputError) as caught:
        read_table(write(folder, content, name))
    assert caught.value.finding.remedy
    return caught.value


ROWS = {"name": ["Minka", None, "Żubr 🐃"], "weight": [4.5, None, 600.0], "legs": [4, 4, None]}
CSV = "name,weight,legs\nMinka,4.5,4\nNA,,4\nŻubr 🐃,600.0,null\n"
JSON = """
{"name": "Minka", "weight": 4.5, "legs": 4}
{"name": null, "legs": 4}
{"name": "Żubr 🐃", "weight": 600}
"""
FORMATS = ["csv", "tsv", "semicolon", "pipe", "bom", "crlf", "jsonl", "parquet", "pandas", "polars"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_table(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        source: object = tmp_path / "pets.parquet"
        parquet.write_table(pa.table(ROWS), source)
    elif kind == "jsonl":
        source = write(tmp_path, JSON, "pets.jsonl")
    elif kind == "pandas":
        source = pd.DataFrame(ROWS, index=["a", "b", "c"])
    elif kind == "polars":
        source = pl.DataFrame(ROWS)
    else:
        text = {
            "csv": CSV,
            "tsv": CSV.replace(",", "\t"),
            "semicolon": CSV.replace(",", ";").replace("4.5", "4,5").replace("600.0", "600,0"),
            "pipe": CSV.replace(",", "|"),
            "bom": "\ufeff" + CSV,
            "crlf": CSV.replace("\n", "\r\n"),
        }[kind]
        source = write(tmp_path, text, "pets.tsv" if kind == "tsv" else "pets.csv")
    table = read_table(source)
    numbers = pa.table({name: table.column(name).cast(pa.float64()) for name in ("weight", "legs")})
    assert table.names == list(ROWS)
    assert table.column("name").to_pylist() == ROWS["name"]
    assert numbers.to_pydict() == {"weight": [4.5, None, 600.0], "legs": [4.0, 4.0, None]}
    assert table.folder == (None if kind in ("pandas", "polars") else tmp_path)


def test_arrow_types_become_texts_and_numbers() -> None:
    table = read_table(
        pa.table(
            {
                "bool": pa.array([True, None]),
                "small": pa.array([1, None], pa.int8()),
                "big": pa.array([2**63 + 1, None], pa.uint64()),
                "half": pa.array(np.array([1.5, np.nan], np.float16)),
                "decimal": pa.array([decimal.Decimal("1.25"), None]),
                "codes": pa.array([" x ", " NA"]).dictionary_encode(),
                "view": pa.array(["a", None], pa.string_view()),
                "runs": pa.RunEndEncodedArray.from_arrays([2], ["z"]),
                "date": pa.array([datetime.date(2020, 1, 2), None]),
                "instant": pa.array([datetime.datetime(2020, 1, 2), None], pa.timestamp("s", "Europe/Berlin")),
                "span": pa.array([datetime.timedelta(seconds=1), None], pa.duration("s")),
                "nothing": pa.array([None, None]),
                "list": pa.array([[1], None]),
                "bytes": pa.array([b"\xff", None]),
            }
        )
    )
    assert {name: values[0] for name, values in table.data.to_pydict().items()} == {
        "bool": "true",
        "small": 1,
        "big": float(2**63),
        "half": 1.5,
        "decimal": 1.25,
        "codes": "x",
        "view": "a",
        "runs": "z",
        "date": "2020-01-02",
        "instant": "2020-01-02 00:00:00",
        "span": 1,
        "nothing": None,
        "list": [1],
        "bytes": b"\xff",
    }
    rest = [values[1] for name, values in table.data.to_pydict().items() if name != "runs"]
    assert rest == [None] * len(rest)


def test_quoted_cells_keep_delimiters_newlines_and_quotes(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, 'a,b\n"x, ""y""\nz",1\n5" pipe,2\n'))
    assert table.column("a").to_pylist() == ['x, "y"\nz', '5" pipe']


def test_names_are_composed_and_stripped(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, "cafe\u0301 , 名前\n1,2\n")).names == ["café", "名前"]


def test_an_empty_line_is_a_missing_value_when_there_is_one_column(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, "a\n1\n\n3\n")).column("a").to_pylist() == ["1", None, "3"]
    assert len(read_table(write(tmp_path, "a,b\n1,1\n\n3,3\n\n"))) == 2


@pytest.mark.parametrize("columns", [2, 500])
def test_every_cell_is_read_as_text(tmp_path: Path, columns: int) -> None:
    """007 and 1e3 are what they are until someone asks, in the last column as in the first."""
    header = ",".join(f'"no {i}, of many"' for i in range(columns))
    table = read_table(write(tmp_path, header + "\n" + ",".join(["007"] * columns) + "\n"))
    assert {table.column(name).to_pylist()[0] for name in table.names} == {"007"}


@pytest.mark.parametrize(
    ("sample", "default", "found"),
    [
        ("a,b\n1,2\n", ",", ","),
        ("a;b\n1,5;2,5\n", ",", ";"),
        ("a, in cm;b\n1;2\n", ",", ";"),
        ("a\tb,c\n1\t2,3\n", ",", "\t"),
        ("a;b, c\n1;2,5\n", ",", None),
        ('"a;b",c\n"1;2",3\n', ",", ","),
        ("a,b\n1,2,3\n", ",", ","),
        ("a|b\n1|2|3\n", ",", "|"),
        ("a\n1\n", ",", ","),
        ("a,b\n1,2\n", "\t", ","),
    ],
)
def test_delimiter(sample: str, default: str, found: str | None) -> None:
    assert find_delimiter(sample, default) == found


def test_ambiguous_delimiter_is_asked_for_and_taken(tmp_path: Path) -> None:
    text = "item;price, EUR\npen;1,50\n"
    assert refused(tmp_path, text).finding.kind == "wrong delimiter"
    assert read_table(tmp_path / "pets.csv", delimiter=";").names == ["item", "price, EUR"]
    with pytest.raises(InputError, match="one ASCII character"):
        read_table(tmp_path / "pets.csv", delimiter="::")


@pytest.mark.parametrize(
    ("content", "kind", "where"),
    [
        (b"", "empty table", "pets.csv"),
        (b"\n\n", "empty table", "pets.csv"),
        (b"\xef\xbb\xbf", "empty table", "pets.csv"),
        (b"a,b\n", "empty table", "pets.csv"),
        (b"a,b,a\n1,2,3\n", "duplicate column", "pets.csv, columns 1 and 3"),
        ("é,e\u0301\n1,2\n".encode(), "duplicate column", "pets.csv, columns 1 and 2"),
        (b",a\n0,1\n", "missing column name", "pets.csv, column 1 of 2"),
        (b"a,b,\n0,1,2\n", "missing column name", "pets.csv, column 3 of 3"),
        (b"a,b\n1,2\n1,2,3\n4\n", "ragged rows", "pets.csv, row 2"),
        (b'a,b\n"1\n1",2\n\n1\n', "ragged rows", "pets.csv, row 2"),
        (b'a,b\n1,2\n3,"4\n5,6\n', "unclosed quote", "pets.csv, row 2"),
        ("a,b\nx,Z\u00fcrich\n".encode("latin-1"), "wrong encoding", "pets.csv, line 2"),
        ("a,b\nx,y\n".encode("utf-16"), "wrong encoding", "pets.csv"),
        ("a,b\nx,y\n".encode("utf-16-le"), "wrong encoding", "pets.csv"),
        ("a,b\nx,ü".encode()[:-1], "wrong encoding", "pets.csv, line 2"),
    ],
)
def test_damaged_csv(tmp_path: Path, content: bytes, kind: str, where: str) -> None:
    finding = refused(tmp_path, content).finding
    assert (finding.kind, finding.where) == (kind, where)


def test_wrong_byte_is_found_across_blocks(tmp_path: Path) -> None:
    """The first block ends inside a character, and the wrong byte is in the third."""
    rows = 700_000
    content = "é\n".encode() * rows + b"\xe9\n"
    finding = refused(tmp_path, content).finding
    assert (finding.where, finding.value) == (f"pets.csv, line {rows + 1}", "0xe9")


def test_ragged_rows_are_counted(tmp_path: Path) -> None:
    error = refused(tmp_path, "a,b\n" + "1,2\n" * 16 + "1,2,3\n" * 5)
    assert error.finding.where == "pets.csv, row 17"
    assert "3 cells, the header 2" in str(error)
    assert "4 more rows do not fit" in str(error)


@pytest.mark.parametrize(
    ("content", "kind", "where"),
    [
        ("", "empty table", "pets.jsonl"),
        ("{}\n", "empty table", "pets.jsonl"),
        ('{"a": 1}\n\n{"a": "x"}\n', "mixed column", "pets.jsonl, row 2, column 'a'"),
        ('{"a": null}\n{"a": [1]}\n{"a": 1}\n', "mixed column", "pets.jsonl, row 3, column 'a'"),
        ('{"a": 1}\n{"a": tru}\n', "damaged file", "pets.jsonl, row 2"),
        ('{"a": 1, "a": 2}\n', "duplicate column", "pets.jsonl, row 1, column 'a'"),
        ('[{"a": 1}]', "not JSON lines", "pets.jsonl, row 1"),
        ('{"a":\n1}', "not JSON lines", "pets.jsonl, row 1"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON lines", "pets.jsonl, row 1"),
        ('{"": 1}', "missing column name", "pets.jsonl, column 1 of 1"),
    ],
)
def test_damaged_json(tmp_path: Path, content: str, kind: str, where: str) -> None:
    finding = refused(tmp_path, content, "pets.jsonl").finding
    assert (finding.kind, finding.where) == (kind, where)


def test_brackets_in_json_texts_are_not_nesting(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, '{"a": "' + "[" * 1000 + '\\""}\n', "pets.jsonl"))
    assert table.column("a").to_pylist() == ["[" * 1000 + '"']


def test_damaged_parquet(tmp_path: Path) -> None:
    assert refused(tmp_path, b"PAR1 no more PAR1", "pets.parquet").finding.kind == "damaged file"
    assert refused(tmp_path, b"", "pets.parquet").finding.kind == "damaged file"


def test_missing_file_suggests_one(tmp_path: Path) -> None:
    write(tmp_path, CSV)
    with pytest.raises(InputError, match=r"Did you mean 'pets\.csv'"):
        read_table(tmp_path / "pest.csv")
    with pytest.raises(InputError, match="no such folder"):
        read_table(tmp_path / "nowhere" / "pets.csv")
    with pytest.raises(InputError, match="folder or a device"):
        read_table(tmp_path)
    with pytest.raises(InputError, match="unknown file type"):
        read_table(write(tmp_path, CSV, "pets.xlsx"))


@pytest.mark.parametrize("name", ["pets.csv.gz", "pets.csv"])
def test_a_compressed_file_is_named_with_what_unpacks_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"a,b\n1,2\n"))
    for read in (read_table, open_source):
        with pytest.raises(InputError, match=rf"compressed file at {name}.*gunzip '{name}'"):
            read(path)


def test_data_frames_that_are_no_tables() -> None:
    with pytest.raises(InputError, match="duplicate column"):
        read_table(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(InputError, match=r"mixed column.*'x'.*column a"):
        read_table(pd.DataFrame({"a": [1, "x"]}))
    with pytest.raises(TypeError, match="from_pylist"):
        read_table([{"a": 1}])


def test_where() -> None:
    assert Table(pa.table({"a": [1]}), "t", None).where() == "t"
