"""A page as the tests read it, the record of a diagnosis, and a name that would do harm as markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from hesse.finding import Finding
from report_records import layer_rows

HOSTILE = "</script><b onmouseover=alert(1)>x</b><!--<script>{{ 7*7 }} %{x} & \"q\" 'a' 型 مرحبا 🦊"


class Page(HTMLParser):
    """A page as a browser's parser takes it: elements with attributes, visible text, and the figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        # Five megabytes of plotly.js are slow to parse; the test in a browser runs them.
        self.feed(path.read_text(encoding="utf-8").replace(get_plotlyjs(), ""))
        self.text = " ".join(" ".join(self.words).split())
        self.figures: dict[str, Any] = json.loads(self.scripts[0])
        self.tags = [element for element, _ in self.elements]

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


def diagnosis(*entries: tuple[Finding, list[Finding]], **more: Any) -> dict[str, Any]:
    """What Diagnosis.to_dict() gives, without a visit."""
    records = layer_rows(np.random.default_rng(0), 20, ("body.0", "body.2", "head"))
    return {
        "torch": "2.13.0+cpu",
        "subject": "Net",
        "ok": not entries,
        "entries": [
            {"finding": first.to_dict(), "consequences": [other.to_dict() for other in rest]} for first, rest in entries
        ],
        "checks": [
            {
                "check": "Gradient check",
                "subject": "Net",
                "ok": not entries,
                "slopes": [{"analytic": 1.25, "numeric": -0.5, "limit": None, "step": 1e-3}],
                "findings": [],
                "notes": [],
            }
        ],
        "course": {
            "optimizer": "SGD",
            "lr": 0.1,
            "steps": 20,
            "seconds": 1.5,
            "losses": [*np.linspace(2.0, 1.0, 19).tolist(), None],
            "records": records,
        },
        "sharpness": [
            {"when": "at first", "largest": [30.5, 2.0], "trace": 41.0, "error": 0.5, "stable": 20.0, "products": 30}
        ],
        "notes": ["Healthy: the head was at zero."],
        "done": ["Gradient check: failed."],
        **more,
    }
