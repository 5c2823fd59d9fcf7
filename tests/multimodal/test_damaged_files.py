"""Damaged files end in a result or an InputError, and in nothing else."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from hesse import InputError
from hesse.multimodal import encode, make_schema, read_table

COLUMNS = {
    "weight": [4.5, 30.25, None, 3.0] * 5,
    "name": ["Minka", 'Rex, "the" dog', "Żubr\n🐃", None] * 5,
    "size": ["S", "L", "L", "S"] * 5,
    "kind": ["cat", "dog", "dog", "cat"] * 5,
}


def as_csv() -> bytes:
    rows = zip(*COLUMNS.values(), strict=True)
    lines = [",".join('"' + str(c or "").replace('"', '""') + '"' for c in row) for row in rows]
    return "\n".join([",".join(COLUMNS), *lines, ""]).encode()


def as_json() -> bytes:
    rows = (dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet() -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table(COLUMNS), buffer)
    return buffer.getvalue()


def as_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((np.arange(192) % 251).astype(np.uint8).reshape(8, 8, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def as_wav() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(400) / 5), 8000, format="WAV")
    return buffer.getvalue()


@st.composite
def damaged(draw: st.DrawFn, whole: Callable[[], bytes]) -> bytes:
    """The file with a few spans overwritten, inserted or cut out, and perhaps its end lost."""
    content = bytearray(whole())
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(len(content), start + 8)))
        content[start:stop] = draw(st.binary(max_size=8) | st.sampled_from([b"", b'"', b",", b";", b"\n", b"\xff"]))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


MANY = settings(max_examples=60, deadline=None)


def go_through(path: Path) -> None:
    """What ``hesse train`` does before training."""
    try:
        table = read_table(path)
        schema, _ = make_schema(table, table.names[-1], root=path.parent)
        data = encode(schema, table, root=path.parent)
    except InputError as error:
        assert error.finding.kind
        assert error.finding.where
        return
    assert len(data) <= len(table)


@pytest.mark.parametrize(
    ("name", "whole"),
    [("t.csv", as_csv), ("t.tsv", as_csv), ("t.jsonl", as_json), ("t.parquet", as_parquet)],
)
def test_whole_tables_are_read(folder: Path, name: str, whole: Callable[[], bytes]) -> None:
    """The control: what is damaged below is good to begin with."""
    (folder / name).write_bytes(whole())
    table = read_table(folder / name)
    assert len(table) == 20
    assert table.column("name").to_pylist() == COLUMNS["name"]
    go_through(folder / name)


@MANY
@given(content=damaged(as_csv), name=st.sampled_from(["t.csv", "t.tsv"]))
def test_damaged_csv(folder: Path, content: bytes, name: str) -> None:
    (folder / name).write_bytes(content)
    go_through(folder / name)


@MANY
@given(content=damaged(as_json))
def test_damaged_json(folder: Path, content: bytes) -> None:
    (folder / "t.jsonl").write_bytes(content)
    go_through(folder / "t.jsonl")


@MANY
@given(content=damaged(as_parquet))
def test_damaged_parquet(folder: Path, content: bytes) -> None:
    (folder / "t.parquet").write_bytes(content)
    go_through(folder / "t.parquet")


@MANY
@given(content=st.binary(max_size=200), name=st.sampled_from(["t.csv", "t.jsonl", "t.parquet"]))
def test_files_of_anything(folder: Path, content: bytes, name: str) -> None:
    (folder / name).write_bytes(content)
    go_through(folder / name)


@settings(max_examples=20, deadline=None)
@given(picture=damaged(as_png), sound=damaged(as_wav))
def test_damaged_media(folder: Path, picture: bytes, sound: bytes) -> None:
    (folder / "good.png").write_bytes(as_png())
    (folder / "good.wav").write_bytes(as_wav())
    (folder / "bad.png").write_bytes(picture)
    (folder / "bad.wav").write_bytes(sound)
    rows = ["good.png,good.wav,a", "bad.png,good.wav,b", "good.png,bad.wav,a", "good.png,good.wav,b"] * 3
    (folder / "media.csv").write_text("\n".join(["photo,sound,y", *rows]))
    table = read_table(folder / "media.csv")
    kinds = {"photo": "image", "sound": "audio"}
    schema, _ = make_schema(table, "y", root=folder, overrides=kinds)
    data = encode(schema, table, root=folder, skip_bad_rows=True)
    assert len(data) in (6, 9, 12)
    assert len(data.findings) == (13 - len(data) if len(data) < 12 else 0)
    go_through(folder / "media.csv")


@given(st.lists(st.text(max_size=8), min_size=1, max_size=12), st.text(max_size=4))
@settings(deadline=None, max_examples=60)
def test_any_text_in_a_data_frame(cells: list[str], name: str) -> None:
    """Any Unicode text in cells and names, half surrogate pairs aside, which Arrow cannot hold."""
    try:
        columns = {name: cells, "y": ["a", "b"] * (len(cells) // 2) + ["a"] * (len(cells) % 2)}
        table = read_table(pa.table(columns))
        schema, _ = make_schema(table, "y", root=Path(tempfile.gettempdir()))
        assert len(encode(schema, table, root=Path(tempfile.gettempdir()))) == len(cells)
    except InputError as error:
        assert error.finding.kind
