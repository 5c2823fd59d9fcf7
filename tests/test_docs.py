"""The Python on the pages runs: each page's blocks, one after the other, as a reader would paste them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(
    [
        *DOCS.glob("optimizers/*.md"),
        *(DOCS / f"{name}.md" for name in ("check", "choose", "damping", "minimize", "newton", "step", "watch")),
        *(DOCS / f"{name}.md" for name in ("encoders", "export", "fusion", "multimodal", "sklearn", "tune")),
    ]
)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UTF8 = {**os.environ, "PYTHONUTF8": "1"}
LINK = re.compile(r"\]\(([^)#]+)\)")


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what it writes is the reader's, not ours
    text = page.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "page"}
    random = torch.random.get_rng_state()
    try:
        for block in BLOCK.finditer(text):
            # Empty lines before it: a traceback then has the page's own line numbers.
            before = "\n" * text[: block.start(1)].count("\n")
            exec(compile(before + block[1], str(page), "exec"), names)  # noqa: S102
    finally:
        torch.random.set_rng_state(random)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "optimizers"], ids=name_of)
def test_every_page_of_an_optimiser_has_an_example_that_proves_something(page: Path) -> None:
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    assert any("assert " in block for block in blocks)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=name_of)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_optimiser_has_a_page() -> None:
    from hesse import optim

    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("optimizers/*.md"))
    assert [name for name in optim.__all__ if f"hesse.optim.{name}(" not in text] == []


def test_the_tables_of_newton_are_those_of_its_script() -> None:
    program = (
        "from benchmarks.primers import newton\n"
        "print(*newton.quadratic_table(), *newton.scale_table(), *newton.alpha_table(), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", cwd=DOCS.parent, env=UTF8, check=False
    )
    assert done.returncode == 0, done.stderr
    page = (DOCS / "newton.md").read_text(encoding="utf-8").splitlines()
    rows = done.stdout.splitlines()
    assert len(rows) == 4 + 6 + 5
    assert [row for row in rows if row not in page] == []
