"""The page of hesse doctor: what is wrong in order, consequences below, and nothing as markup."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="the report needs hesse[train]")
pytest.importorskip("plotly", reason="the report needs hesse[train]")

from hesse.finding import Finding
from hesse.report.doctor import build_doctor
from report_page import HOSTILE, Page, diagnosis

FIRST = Finding("detached", "body.2", "The gradient stops.", "Do without it.", "error", function="detach", line=12)
FIRST = Finding(**{**FIRST.to_dict(), "file": "net.py"})
BELOW = Finding("no_gradient", "body.0", "It never got a gradient.", "Look before it.", step=9)
NOTE = Finding("plateau", "loss", "The loss has stayed.", severity="info", step=15)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(build_doctor(diagnosis((FIRST, [BELOW]), (NOTE, [])), tmp_path_factory.mktemp("page") / "a.html"))


def test_findings_stand_in_order_with_their_lines_and_consequences(page: Page) -> None:
    assert "Net : 1 thing to mend" in page.text
    places = [page.text.index(word) for word in ("detached", "net.py:12", "Do without it", "no_gradient", "plateau")]
    assert places == sorted(places)
    assert "1 finding that may be its consequence" in page.text and "1 note" in page.text
    assert page.tags.count("details") == 2


def test_numbers_that_say_so(page: Page) -> None:
    assert set(page.figures) == {"gradients", "layer", "losses"}
    marked = page.figures["gradients"]["data"][1]
    assert list(zip(marked["x"], marked["y"], strict=True)) == [(9, "body.0"), (15, "(whole model)")]
    assert page.figures["losses"]["data"][0]["y"][-1] is None
    assert "In 1 of them it was no finite number" in str(page.elements)
    for number in ("1.25", "-0.500", "30.5, 2.00", "41.0 ± 0.500", "20.0"):
        assert number in page.text


def test_links_lead_to_sections(page: Page) -> None:
    targets = {(a["href"] or "")[1:] for tag, a in page.elements if tag == "a"}
    assert targets <= {a.get("id") for _, a in page.elements}
    assert len(targets) == 6


def test_nothing_found_is_said(tmp_path: Path) -> None:
    page = Page(build_doctor(diagnosis(course=None, sharpness=[]), tmp_path / "b.html"))
    assert "Net : nothing found" in page.text and "found a fault" in page.text
    assert "No layer got a gradient" in page.text and "No step had a loss" in page.text
    assert page.figures == {}


def test_names_are_text(tmp_path: Path) -> None:
    bad = Finding(HOSTILE, HOSTILE, HOSTILE, HOSTILE, "error", HOSTILE, HOSTILE, 3, HOSTILE, HOSTILE, 4)
    path = build_doctor(diagnosis((bad, [bad]), subject=HOSTILE, notes=[HOSTILE], done=[HOSTILE]), tmp_path / "c.html")
    page = Page(path)
    assert "<b onmouseover" not in path.read_text(encoding="utf-8")
    assert page.text.count("{{ 7*7 }}") > 8 and "49 " not in page.text
