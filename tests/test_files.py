"""Files that are whole or absent, and JSON that every language reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hesse.files import atomic_path, read_json, read_lines, write_json, write_lines, write_text


class Crash(Exception):
    pass


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with pytest.raises(Crash), atomic_path(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise Crash
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_at_the_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Crash), atomic_path(tmp_path / "new" / "file") as temporary:
        temporary.write_bytes(b"half")
        raise Crash
    assert list((tmp_path / "new").iterdir()) == []


def test_the_new_file_is_on_disk_before_it_gets_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append("replace"), replace(self, to))[1])
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename is atomic only within one file system
    assert order == ["fsync", "replace"]
    assert path.read_text() == "new"


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX")
def test_a_file_has_the_mode_that_open_would_give(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"loss": [float("nan"), (float("inf"), -float("inf"))], "epoch": 3, "ok": True})

    def refuse(name: str) -> None:
        raise AssertionError(f"not JSON: {name}")

    assert json.loads(path.read_text(), parse_constant=refuse) == {"loss": [None, [None, None]], "epoch": 3, "ok": True}


TEXTS = ["Größe", "図.png", "صوت", "🙂", "a\nb\r\nc", "line\u2028separator", '"', "", "undecodable\udcff.png"]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tmp_path: Path, text: str) -> None:
    write_json(tmp_path / "a.json", {text: text})
    assert read_json(tmp_path / "a.json") == {text: text}
    write_lines(tmp_path / "a.jsonl", [text, [text]])
    assert read_lines(tmp_path / "a.jsonl") == [text, [text]]


def test_lines_of_an_absent_file_are_none(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "absent.jsonl") == []


def test_a_torn_last_line_is_dropped_wherever_the_tear_is(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    write_lines(path, [{"step": 1}])
    whole = len(path.read_bytes())
    write_lines(path, [{"step": 1}, {"step": "zwölf"}])
    data = path.read_bytes()
    for size in range(whole, len(data)):  # also through the two bytes of the ö
        path.write_bytes(data[:size])
        assert read_lines(path) == [{"step": 1}]


def test_damage_in_the_middle_is_not_hidden(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(b'{"st\n{"step": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        read_lines(path)
