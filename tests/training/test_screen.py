"""What people see: aligned, one line a column, no escape codes where no terminal reads them."""

from __future__ import annotations

import io
import math

import pyarrow as pa
import pytest
from rich.console import Console

import hesse
from hesse.finding import Finding
from hesse.multimodal import Schema, make_schema, read_table
from hesse.training.screen import Screen
from training_tables import numbers


def schema_of(columns: dict[str, list[object]], target: str) -> Schema:
    from pathlib import Path

    return make_schema(read_table(pa.table(columns)), target, root=Path())[0]


def shown(schema: Schema, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    screen = Screen()
    screen.console = Console(file=io.StringIO(), width=width, markup=False, emoji=False)
    screen.columns(schema, "data.csv", 64)
    assert isinstance(screen.console.file, io.StringIO)
    return screen.console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_column_table_has_one_line_a_column(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["x", "日本語の長い列の名前がここにあります", "[bold]not markup[/]", "a\nb", "x" * 300, ":smile:"]
    columns = {name: [f"text number {i} " * 20 for i in range(64)] for name in names}
    schema = schema_of({**columns, "species": ["a", "b"] * 32}, "species")
    lines = shown(schema, width, monkeypatch)
    assert len(lines) == 1 + 1 + 7 + 1
    assert all(len(line) <= width for line in lines)
    if width >= 120:
        assert any("[bold]not" in line for line in lines) and any(":smile:" in line for line in lines)


def test_a_wide_table_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {f"c{i}": [float(i * j % 7) for j in range(64)] for i in range(1, 101)}
    lines = shown(schema_of({**columns, "species": ["a", "b"] * 32}, "species"), 80, monkeypatch)
    assert len(lines) < 50 and "61 more columns" in "\n".join(lines)


def test_a_pipe_gets_plain_lines(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    hesse.train(pa.table(numbers()), "species", out=f"{tmp_path}/run", epochs=2, optimizer="adamw")
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err and "\r" not in err
    assert [line.split()[:3] for line in err.splitlines() if line.startswith("adamw")] == [
        ["adamw", "epoch", "1"],
        ["adamw", "epoch", "2"],
    ]
    assert err.splitlines()[-1].startswith("report: ")


def test_quiet_says_nothing(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    hesse.train(pa.table(numbers()), "species", out=f"{tmp_path}/run", epochs=1, optimizer="adamw", verbose=False)
    assert capsys.readouterr() == ("", "")


def test_findings_are_shown_with_their_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().findings([Finding("dead units", "[layer]", "Half are.", "Use GELU.", "error", value=math.nan)])
    assert capsys.readouterr().err == "✗ dead units at [layer]: Half are. Use GELU.\n"
