"""Rows of disagreement are shown with their media: within bounds, from the run's samples alone, and as text."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from report_records import make_run

pytest.importorskip("jinja2", reason="the report needs hesse[train]")
pytest.importorskip("plotly", reason="the report needs hesse[train]")

from hesse.files import write_json
from hesse.report import build, samples
from report_modalities import deepen
from report_page import HOSTILE, Page


def deep(folder: Path) -> tuple[Path, dict[str, Any]]:
    make_run(folder, epochs=2, compare=())
    record = deepen(folder)
    return folder, record


def media(page: Page, tag: str) -> list[str]:
    return [a["src"] or "" for name, a in page.elements if name == tag]


def test_pictures_players_and_texts_are_in_the_page(tmp_path: Path) -> None:
    folder, _ = deep(tmp_path)
    page = Page(build(folder))
    for tag, kind, suffix in (("img", "image/png", "png"), ("audio", "audio/wav", "wav")):
        found = media(page, tag)
        assert len(found) == 4
        for i, source in enumerate(found):
            head, _, data = source.partition(",")
            assert head == f"data:{kind};base64"
            assert base64.b64decode(data) == (folder / "samples" / f"{i}.{suffix}").read_bytes()
    assert "vierundzwanzig 3, مرحبا 🦊" in page.text
    named = [a for name, a in page.elements if name in ("img", "audio")]
    assert all("of row" in (a.get("alt") or a.get("aria-label") or "") for a in named)
    assert all("controls" in a for name, a in page.elements if name == "audio")


def test_each_modality_says_what_it_would_answer(tmp_path: Path) -> None:
    folder, _ = deep(tmp_path)
    text = Page(build(folder)).text
    assert "Row 17 Actually 0 ; all together say 0 , 51% sure ✓ right" in text, "rows are counted from 1"
    assert "photo (image) says 0 , 90% sure ✓ right" in text
    assert "voice (audio) says 1 , 80% sure ✗ wrong" in text
    assert "Row 18 Actually 1 ; all together say 2 , 54% sure ✗ wrong" in text


def test_columns_are_a_table_and_an_absent_modality_is_said_to_be(tmp_path: Path) -> None:
    folder, record = deep(tmp_path)
    first = record["disagreements"][0]
    first["samples"]["text_word"] = {"kind": "columns", "text": {"größe": 3.5, "<i>": None}}
    del first["by_modality"]["audio_voice"]
    write_json(folder / "evaluation.json", record)
    page = Page(build(folder))
    assert "column value größe 3.5 <i>" in page.text
    assert "voice (audio) absent" in page.text
    assert "i" not in page.tags


def test_what_exceeds_the_room_is_left_out_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = deep(tmp_path)
    size = (folder / "samples" / "0.png").stat().st_size + (folder / "samples" / "0.wav").stat().st_size
    monkeypatch.setattr(samples, "BYTES", size + 10)
    page = Page(build(folder))
    assert (len(media(page, "img")), len(media(page, "audio"))) == (1, 1)
    assert page.text.count("Left out: the page holds") == 6


def test_a_page_holds_three_megabytes_of_samples_at_most(tmp_path: Path) -> None:
    folder, _ = deep(tmp_path)
    before = build(folder).stat().st_size
    for i in range(4):
        (folder / "samples" / f"{i}.wav").write_bytes(b"\0" * 1_400_000)
    page = Page(build(folder))
    assert len(media(page, "audio")) == 2
    assert (folder / "report.html").stat().st_size - before < 4 * 3_000_000 / 3


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../secret.png", "not a picture or sound of the run's samples"),
        ("secret.png", "not a picture or sound of the run's samples"),
        ("samples/link.png", "not a picture or sound of the run's samples"),
        ("samples/page.svg", "not a picture or sound of the run's samples"),
        ("samples/page.html", "not a picture or sound of the run's samples"),
        ("samples/gone.png", "not there any more"),
    ],
    ids=["above", "beside", "link", "svg", "html", "gone"],
)
def test_only_media_of_the_samples_are_read(tmp_path: Path, name: str, says: str) -> None:
    folder, record = deep(tmp_path / "run")
    for place in (tmp_path / "secret.png", folder / "secret.png", folder / "samples" / "page.svg"):
        place.write_bytes(b"do not tell")
    (folder / "samples" / "page.html").write_bytes(b"do not tell")
    (folder / "samples" / "link.png").symlink_to(tmp_path / "secret.png")
    record["disagreements"] = record["disagreements"][:1]
    record["disagreements"][0]["samples"]["image_photo"]["file"] = name
    write_json(folder / "evaluation.json", record)
    page = Page(build(folder))
    assert media(page, "img") == [] and says in page.text
    assert base64.b64encode(b"do not tell").decode()[:12] not in (folder / "report.html").read_text(encoding="utf-8")


def test_cells_and_labels_are_text(tmp_path: Path) -> None:
    folder, record = deep(tmp_path)
    first = record["disagreements"][0]
    first |= {"actual": HOSTILE, "predicted": HOSTILE}
    first["by_modality"]["text_word"]["predicted"] = HOSTILE
    first["samples"]["text_word"]["text"] = HOSTILE + "x" * 5000
    first["samples"]["image_photo"]["file"] = HOSTILE
    write_json(folder / "evaluation.json", record)
    page = Page(build(folder))
    assert not [attrs for _, attrs in page.elements if any(key.startswith("on") for key in attrs)]
    assert len(page.scripts) == 3
    assert "x" * 700 not in page.text, "a long text is cut"


def test_twelve_rows_are_enough(tmp_path: Path) -> None:
    folder, record = deep(tmp_path)
    record["disagreements"] *= 10
    write_json(folder / "evaluation.json", record)
    assert Page(build(folder)).tags.count("article") == 12


def test_a_quantity_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    make_run(tmp_path, "regression", target="price", epochs=2, compare=())
    record = deepen(tmp_path)
    first = record["disagreements"][0]
    first |= {"actual": 31251.0, "predicted": 29100.0, "confidence": None}
    first["by_modality"]["image_photo"] = {"predicted": 1.25, "confidence": None, "shapley": -4381.2}
    first["by_modality"]["audio_voice"] = {"predicted": 0.5, "confidence": None, "shapley": 2.349}
    record["disagreements"] = [first]
    write_json(tmp_path / "evaluation.json", record)
    text = Page(build(tmp_path)).text
    assert "Actually 31,251 ; all together say 29,100" in text
    assert "photo (image) says 1.25 pull −4,381" in text and "voice (audio) says 0.5 pull +2.35" in text
    assert "✓" not in text and "✗" not in text and "adds to the joint answer" in text
