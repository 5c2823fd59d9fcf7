"""Measure every row and write the page."""

from __future__ import annotations

from covered.table import NAMES, PAGE, measure, page

if __name__ == "__main__":
    PAGE.write_text(page({name: measure(name) for name in NAMES}))
