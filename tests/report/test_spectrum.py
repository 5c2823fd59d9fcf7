"""The page of a spectrum says what the record holds, draws every eigenvalue it names, and repeats no name as markup."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="the report needs hesse[train]")
go = pytest.importorskip("plotly.graph_objects", reason="the report needs hesse[train]")

from plotly.offline import get_plotlyjs  # noqa: E402

from hesse.files import write_json  # noqa: E402
from hesse.finding import InputError  # noqa: E402
from hesse.report import build_spectrum  # noqa: E402
from hesse.report.spectrum import measured, short  # noqa: E402

HOSTILE = "</script><b onmouseover=alert(1)>x</b><!--<script>{{ 7*7 }} %{x} & \"q\" 'a' 型 مرحبا 🦊"
CHROMEDRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def number(value: float, error: float = 0.0, converged: bool = True) -> dict[str, Any]:
    return {"value": value, "error": error, "converged": converged}


def record(names: tuple[str, ...] = ("photo", "voice"), **more: Any) -> dict[str, Any]:
    """A record as ``hesse spectrum`` writes it, of 1000 parameters."""
    random = np.random.default_rng(0)
    rule = {"nodes": [[0.0, 0.5, 30.0, 60.0]] * 3, "weights": [[0.9, 0.098, 0.001, 0.001]] * 3}
    below = {"nodes": [[-2.0, 0.0, 60.0]] * 3, "weights": [[0.01, 0.989, 0.001]] * 3}
    sizes = random.uniform(1, 50, len(names) + 1)
    blocks = [
        {
            "key": f"block{i}",
            "name": name,
            "kind": "image",
            "parameters": 200,
            "trace": number(float(size), 0.3),
            "largest": number(float(size) / 5, 1e-4),
            "share": float(size / sizes.sum()),
            "effective_dimension": 5.0,
        }
        for i, (name, size) in enumerate(zip((*names, "fusion and head"), sizes, strict=True))
    ]
    blocks[-1]["kind"] = "head"
    return {
        "hesse": "0.1.0",
        "torch": "2.13.0",
        "command": "hesse spectrum runs/pets --split test --rows 512 --batch-size 512 -k 2 --seed 0",
        "table": "pets.csv",
        "target": "species",
        "optimizer": "kfac",
        "lr": None,
        "loss": "cross-entropy",
        "loss_value": 0.3412,
        "part": "test",
        "rows": 90,
        "available": 120,
        "batch_size": 512,
        "seed": 0,
        "parameters": 1000,
        "rank": 180,
        "gauss_newton": {
            "eigenvalues": [number(60.02, 1e-3), number(30.0, 0.02)],
            "density": rule,
            "trace": number(float(sizes.sum()), 0.5),
            "effective_dimension": 3.25,
            "share_of_largest": 0.625,
        },
        "hessian": {
            "eigenvalues": [number(60.5, 1e-3), number(29.5, 0.02)],
            "density": below,
            "lowest": number(-2.125, 0.04),
            "trace": number(101.0, 4.0),
        },
        "blocks": blocks,
        **more,
    }


class Page(HTMLParser):
    """A page as a browser's parser takes it: elements with attributes, visible text, and the figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8").replace(get_plotlyjs(), ""))
        self.text = " ".join(" ".join(self.words).split())
        self.figures: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = tag
            self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif not self.inside:
            self.words.append(data)


def build(folder: Path, **more: Any) -> Page:
    write_json(folder / "spectrum.json", record(**more))
    path = build_spectrum(folder)
    assert path == folder / "spectrum.html"
    return Page(path)


def test_the_page_says_what_the_record_holds(tmp_path: Path) -> None:
    page = build(tmp_path)
    for words in (
        "species",
        "cross-entropy by 1,000 parameters, on 90 of 120 test rows of pets.csv",
        "trained with K-FAC",
        "above the learning rate 2 / 60.5 = 0.0331",
        "30.00 ± 0.02",
        "-2.125 ± 0.040",
        "101.0 ± 4.0",
        "62.5%",
        "at most 180 of 1,000",
        "hesse spectrum runs/pets --split test",
        "photo",
        "voice",
        "fusion and head",
    ):
        assert words in page.text, words
    assert "A star marks" not in page.text
    first = (tmp_path / "spectrum.html").read_bytes()
    assert build_spectrum(tmp_path).read_bytes() == first


def test_what_did_not_converge_has_a_star(tmp_path: Path) -> None:
    blocks = record()["blocks"]
    blocks[1]["trace"]["converged"] = False
    page = build(tmp_path, blocks=blocks)
    assert page.text.count(" *") == 1
    assert "A star marks" in page.text


def test_a_block_without_curvature_has_no_share(tmp_path: Path) -> None:
    blocks = record()["blocks"]
    blocks[0] |= {"trace": number(0.0), "largest": number(0.0), "share": None, "effective_dimension": None}
    page = build(tmp_path, blocks=blocks)
    assert "photo 200 0 – 0 –" in page.text
    assert page.figures["shares"]["data"][0]["x"][0] is None


def test_the_curve_is_as_high_as_the_number_of_eigenvalues(tmp_path: Path) -> None:
    page = build(tmp_path)
    curve, known, below, below_known = page.figures["density"]["data"]
    heights = dict(zip(curve["customdata"], curve["y"], strict=True))

    def near(value: float) -> float:
        return heights[min(heights, key=lambda x: abs(x - value))]

    # Weights 0.9, 0.098, 0.001, 0.001 of 1000 eigenvalues; the grid is finer than a bell, but not endlessly.
    assert [near(x) for x in (0.0, 0.5, 30.0, 60.0)] == pytest.approx([900, 98, 1, 1], rel=0.02)
    assert near(8.0) < 0.1
    assert known["customdata"] == [60.02, 30.0] and known["y"] == [1.0, 1.0]
    assert below_known["customdata"] == [60.5, 29.5, -2.125]
    assert min(below["customdata"]) < -2.0 < 0.0
    places = dict(zip(curve["x"], curve["customdata"], strict=True))
    ticks = page.figures["density"]["layout"]["xaxis"]
    for at, text in zip(ticks["tickvals"], ticks["ticktext"], strict=True):
        value = float(text.replace("−", "-"))
        assert at == pytest.approx(math.asinh(value / 0.6), abs=1e-9)  # 0.6: a hundredth of the largest node
        assert places[min(places, key=lambda x: abs(x - at))] == pytest.approx(value, rel=0.05, abs=0.02)


def test_bars_are_the_numbers_of_the_blocks(tmp_path: Path) -> None:
    page = build(tmp_path)
    blocks = record()["blocks"]
    assert page.figures["shares"]["data"][0]["x"] == [block["share"] for block in blocks]
    assert page.figures["largest"]["data"][0]["x"] == [block["largest"]["value"] for block in blocks]
    colours = page.figures["shares"]["data"][0]["marker"]["color"]
    assert colours[0] == colours[1] != colours[2]


def test_plotly_itself_accepts_every_figure(tmp_path: Path) -> None:
    page = build(tmp_path)
    holders = {a["data-figure"] for _, a in page.elements if "data-figure" in a}
    assert holders == set(page.figures) == {"shares", "largest", "density"}
    for figure in page.figures.values():
        plain = json.loads(re.sub(r'"var\(--sans\)"', '"Arial"', json.dumps(figure)))
        plain = json.loads(re.sub(r'"var\(--[\w-]+\)"', '"#123456"', json.dumps(plain)))
        go.Figure(data=plain["data"], layout=plain["layout"])  # raises on an unknown key or an impossible value
        assert set(plain["narrow"]) <= set(plain["layout"])


def test_names_are_text_everywhere(tmp_path: Path) -> None:
    page = build(tmp_path, names=(HOSTILE, HOSTILE + "2"), target=HOSTILE, table=HOSTILE, command=f"hesse '{HOSTILE}'")
    assert not [attrs for _, attrs in page.elements if any(key.startswith("on") for key in attrs)]
    assert len(page.scripts) == 3
    assert page.text.count("<b onmouseover=alert(1)>") == 6, "names are shown as they are"
    assert "<b" not in json.dumps([{**trace, "hovertemplate": ""} for trace in page.figures["shares"]["data"]])
    assert len(set(page.figures["shares"]["data"][0]["y"])) == 3


def test_nothing_is_asked_of_the_network(tmp_path: Path) -> None:
    page = build(tmp_path)
    for tag, attrs in page.elements:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert not re.match(r"(?!#|data:,)", attrs.get(key) or "#"), f"<{tag} {key}={attrs[key]}>"
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "http" not in policy


@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver are not both on the PATH")
@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (360, "dark")])
def test_every_chart_is_drawn(tmp_path: Path, width: int, scheme: str) -> None:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (hesse[dev])")
    service = importlib.import_module("selenium.webdriver.chrome.service").Service(CHROMEDRIVER)
    wait = importlib.import_module("selenium.webdriver.support.ui").WebDriverWait
    build(tmp_path, names=(HOSTILE, "<i>写真</i>", "a name that is longer than a telephone is wide " * 3))
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=service) as browser:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((tmp_path / "spectrum.html").as_uri())
        drawn = "return document.querySelectorAll('[data-figure] svg.main-svg:first-child').length"
        wait(browser, 20).until(lambda _: browser.execute_script(drawn) == 3)
        assert browser.get_log("browser") == []
        traces = "return document.querySelectorAll('[data-figure=density] .scatterlayer .trace').length"
        assert browser.execute_script(traces) == 4
        names = "return [...document.querySelectorAll('[data-figure=shares] .ytick text')].map((t) => t.textContent)"
        assert "<i>写真</i>" in browser.execute_script(names)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_no_record_and_damaged_records(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no spectrum"):
        build_spectrum(tmp_path)
    (tmp_path / "spectrum.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="hesse spectrum RUN"):
        build_spectrum(tmp_path)
    write_json(tmp_path / "spectrum.json", {"target": "species"})
    with pytest.raises(InputError, match="lacks optimizer"):
        build_spectrum(tmp_path)
    assert not (tmp_path / "spectrum.html").exists()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (57.9213, 1e-4, "57.92"),
        (57.9213, 0.0355, "57.92 ± 0.04"),
        (612.34, 18.2, "612 ± 18"),
        (61234.0, 1820.0, "61,200 ± 1,800"),
        (0.0, 0.0, "0"),
        (0.0, 0.02, "0.000 ± 0.020"),
        (-1.8302, 0.058, "-1.830 ± 0.058"),
        (3.25e-7, 0.0, "3.250e-07"),
        (3.25e-7, 4e-9, "(3.250 ± 0.040)e-07"),
        (2.5e8, 0.0, "2.500e+08"),
        (math.pi, 30.0, "3 ± 30"),
    ],
)
def test_numbers_have_the_digits_that_their_errors_leave(value: float, error: float, text: str) -> None:
    assert measured(number(value, error)) == text
    assert measured(number(value, error, converged=False)) == f"{text} *"


def test_short_numbers() -> None:
    assert [short(x) for x in (None, 0.0, 0.03313, 9.0, 579.2, 1234.5)] == ["–", "0", "0.0331", "9.00", "579", "1,234"]
