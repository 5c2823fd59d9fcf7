"""The page in a real browser: no error on the console, every chart drawn, nothing wider than the screen."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from report_records import MODALITIES, make_run

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (hesse[dev])")
pytest.importorskip("jinja2", reason="the report needs hesse[train]")
pytest.importorskip("plotly", reason="the report needs hesse[train]")

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from hesse.finding import Finding  # noqa: E402
from hesse.report import build, build_tune  # noqa: E402
from hesse.report.doctor import build_doctor  # noqa: E402
from report_modalities import deepen, several_targets  # noqa: E402
from report_page import diagnosis  # noqa: E402
from report_tune import make_search  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver are not both on the PATH"
)

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# What plotly.js draws for a trace of each type.
DRAWN = {"scatter": ".scatterlayer .trace", "bar": ".barlayer .trace", "heatmap": ".heatmaplayer .hm image"}
LONG = "<b onmouseover=alert(1)>" + "a very long name of a class that somebody exported, 型の名前 🦊 مرحبا " * 3
RUNS: dict[str, dict[str, Any]] = {
    "classification": {},
    "regression": {"task": "regression", "target": "price", "modalities": MODALITIES[:1], "compare": ()},
    "deep": {"deepened": (deepen,), "epochs": 2},
    "several targets": {"deepened": (deepen, several_targets), "epochs": 2},
    "hostile names": {
        "target": LONG,
        "classes": ("$x$", LONG, LONG + "2", "</script>", "var(--page)", "%{y}"),
        "modalities": (("image", LONG), ("text", "字" * 80)),
        "layers": tuple(f"{LONG}.{i}" for i in range(70)),
        "epochs": 2,
        "deepened": (deepen,),
    },
}


def made(folder: Path, deepened: tuple[Callable[[Path], Any], ...] = (), **how: Any) -> Path:
    """The page of such a run."""
    make_run(folder, **how)
    for deepening in deepened:
        deepening(folder)
    return build(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=Service(CHROMEDRIVER)) as driver:
        yield driver


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(make_run(tmp_path_factory.mktemp("run"), epochs=3))


def show(browser: Any, page: Path, width: int, scheme: str) -> dict[str, Any]:
    """Open the page, wait until it has drawn, and return its figures."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri())
    figures = json.loads(browser.execute_script("return document.getElementById('figures').textContent"))
    assert figures
    WebDriverWait(browser, 20).until(lambda _: all(count(browser, name, "svg.main-svg") for name in figures))
    return dict(figures)


def count(browser: Any, chart: str, selector: str) -> int:
    script = "return document.querySelectorAll(`[data-figure='${arguments[0]}'] ${arguments[1]}`).length"
    return int(browser.execute_script(script, chart, selector))


def wide(browser: Any) -> int:
    return int(browser.execute_script("return document.documentElement.scrollWidth"))


@pytest.mark.parametrize(
    ("run", "width", "scheme"),
    [
        ("classification", 1280, "light"),
        ("classification", 360, "dark"),
        ("regression", 1280, "dark"),
        ("hostile names", 360, "light"),
        ("deep", 1280, "light"),
        ("several targets", 360, "dark"),
    ],
)
def test_every_chart_is_drawn(browser: Any, tmp_path: Path, run: str, width: int, scheme: str) -> None:
    figures = show(browser, made(tmp_path, **RUNS[run]), width, scheme)
    assert browser.get_log("browser") == []
    for name, figure in figures.items():
        for kind in {trace["type"] for trace in figure["data"]}:
            expected = sum(trace["type"] == kind for trace in figure["data"])
            assert count(browser, name, DRAWN[kind]) == expected, f"{name} lacks a {kind}"
    assert wide(browser) <= width, "the page scrolls sideways"
    visited = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in visited if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_names_are_drawn_as_text(browser: Any, tmp_path: Path) -> None:
    names = ("<b>bold</b>", "a & b", "var(--page)")
    layers = tuple(f"{name}.conv1" for name in names)
    show(browser, build(make_run(tmp_path, classes=names, layers=layers, epochs=2)), 1280, "light")
    for place in ("[data-figure=confusion] .ytick text", "[data-figure=updates] .legendtext"):
        script = "return [...document.querySelectorAll(arguments[0])].map((text) => text.textContent)"
        assert sorted(browser.execute_script(script, place)) == sorted(names)


def test_turning_dark_redraws_the_charts(browser: Any, plain: Path) -> None:
    fill = "return document.querySelector('[data-figure] .xtick text').style.fill"
    show(browser, plain, 1280, "light")
    light = browser.execute_script(fill)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    WebDriverWait(browser, 10).until(lambda _: browser.execute_script(fill) != light)
    assert browser.get_log("browser") == []


def test_it_prints(browser: Any, plain: Path) -> None:
    show(browser, plain, 1280, "dark")
    assert base64.b64decode(browser.print_page()).startswith(b"%PDF")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.className") == ""


def point(browser: Any, place: str, says: str, *arguments: Any) -> tuple[float, float]:
    """Point at a place of the heat map until it says so; the place anew each time, for a busy machine lays out late."""
    said = "return document.querySelector('[data-figure=gradients] .hoverlayer').textContent"

    def pointed(_: Any) -> Any:
        x, y = browser.execute_script(place, *arguments)
        for aside in (2, 0):
            browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x - aside, "y": y})
        return (x, y) if says in browser.execute_script(said) else False

    x, y = WebDriverWait(browser, 20).until(pointed)
    return x, y


def drawn(browser: Any) -> Any:
    """What the chart of one layer shows: the name in the list, the heights of its first curve, its marks."""
    script = """const plot = document.querySelector("[data-figure=layer]");
    const list = document.querySelector("[data-choose]");
    return [list.selectedOptions[0].text, plot.data[0].y, plot.data[plot.data.length - 1].x]"""
    return browser.execute_script(script)


def test_a_click_on_a_row_shows_the_curves_of_its_layer(browser: Any, plain: Path) -> None:
    choices = show(browser, plain, 1280, "light")["layer"]["choices"]
    assert drawn(browser)[0] == "encoders.text_word.embedding", "the layer with the gravest finding"
    place = """const plot = document.querySelector("[data-figure=gradients]"), layout = plot._fullLayout;
    plot.scrollIntoView({block: "center", behavior: "instant"});
    const box = plot.querySelector(".nsewdrag").getBoundingClientRect();
    return [box.left + layout.xaxis.d2p(9), box.top + layout.yaxis.c2p(arguments[0])]"""
    for row in (3, 11):
        name = choices[row]["name"]

        def clicked(_: Any, row: int = row, name: str = name) -> bool:
            """Again and again: on a busy machine a click may come before the chart is ready for it."""
            x, y = point(browser, place, name, row)
            for kind in ("mousePressed", "mouseReleased"):
                event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
                browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)
            return bool(drawn(browser)[0] == name)

        WebDriverWait(browser, 20).until(clicked)
        assert drawn(browser)[1] == choices[row]["traces"][0]["y"]
    assert browser.get_log("browser") == []


def test_the_keyboard_reaches_every_layer(browser: Any, plain: Path) -> None:
    choices = show(browser, plain, 1280, "light")["layer"]["choices"]
    chosen = browser.find_element("css selector", "[data-choose=layer]")
    browser.execute_script("arguments[0].focus()", chosen)
    assert browser.switch_to.active_element == chosen and chosen.accessible_name
    for step in (1, 2):
        chosen.send_keys(Keys.ARROW_DOWN)
        name, curve, _ = drawn(browser)
        index = next(i for i, choice in enumerate(choices) if choice["name"] == name)
        assert index == 9 + step and curve == choices[index]["traces"][0]["y"]


def test_a_mark_tells_its_finding_when_pointed_at(browser: Any, plain: Path) -> None:
    show(browser, plain, 1280, "light")
    place = """const plot = document.querySelector("[data-figure=gradients]");
    plot.scrollIntoView({block: "center", behavior: "instant"});
    const mark = plot.querySelectorAll(".scatterlayer .point")[1].getBoundingClientRect();
    return [mark.left + mark.width / 2, mark.top + mark.height / 2]"""
    point(browser, place, "Weigh the text up")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_of_the_doctor_is_drawn(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    found = Finding(LONG, f"body.2.{LONG}", LONG, LONG, "error", step=3)
    page = build_doctor(diagnosis((found, [found]), subject=LONG), tmp_path / "doctor.html")
    figures = show(browser, page, width, scheme)
    assert set(figures) == {"gradients", "layer", "losses"}
    assert count(browser, "gradients", ".scatterlayer .point") == 1
    assert browser.get_log("browser") == [] and wide(browser) <= width


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (360, "light")])
def test_the_page_of_a_search_is_drawn(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    make_search(tmp_path, target=LONG)
    figures = show(browser, build_tune(tmp_path), width, scheme)
    for name, figure in figures.items():
        assert count(browser, name, DRAWN["scatter"]) == len(figure["data"]), name
    assert browser.get_log("browser") == [] and wide(browser) <= width


def test_pictures_and_sounds_of_samples_can_be_seen_and_heard(browser: Any, tmp_path: Path) -> None:
    show(browser, made(tmp_path, (deepen,), epochs=2), 1280, "light")
    seen = "return [...document.images].map((image) => image.naturalWidth)"
    assert browser.execute_script(seen) == [16] * 4
    heard = "return [...document.querySelectorAll('audio')].map((player) => player.duration)"
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(heard) == [0.5] * 4)
    assert browser.get_log("browser") == []
