"""How long a user waits: for ``hesse --help``, and for the first step on a table of 100 000 rows."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

HESSE = Path(sys.executable).with_name("hesse")
ROWS = 100_000


def main() -> None:
    """Print both, as median and range of whole processes."""
    print("### Start-up\n\n| what | goal, s | median, s | range, s |\n|---|---|---|---|")
    _row("`hesse --help`", 0.3, [_help() for _ in range(11)][1:])
    with tempfile.TemporaryDirectory() as folder:
        table = _write_table(Path(folder) / "big.csv")
        times = [_first_step(table, Path(folder) / f"run{i}") for i in range(5)]
    _row(f"`hesse train` on {ROWS} rows of 10 numbers and 10 categories, to the first step", 5, times)
    print()


def _row(what: str, goal: float, times: list[float]) -> None:
    print(f"| {what} | {goal} | {median(times):.2f} | {min(times):.2f} to {max(times):.2f} |", flush=True)


def _help() -> float:
    began = perf_counter()
    subprocess.run([HESSE, "--help"], check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - began


def _write_table(path: Path) -> Path:
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(ROWS, 10)).round(4)
    categories = rng.integers(0, 20, size=(ROWS, 10))
    target = np.where(numbers[:, 0] + 0.2 * categories[:, 0] + rng.normal(size=ROWS) > 2, "yes", "no")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"number {i}" for i in range(10)), *(f"kind {i}" for i in range(10)), "target"])
        for row in range(ROWS):
            writer.writerow([*numbers[row], *(f"value {c}" for c in categories[row]), target[row]])
    return path


def _first_step(table: Path, out: Path) -> float:
    """From the start of the process to the line that says the gradients are checked: training begins right after it."""
    began = perf_counter()
    command = [HESSE, "train", table, "--target", "target", "--out", out, "--epochs", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "gradient check" in line:
                process.kill()
                return perf_counter() - began
    raise RuntimeError(f"hesse train ended with {process.returncode} before its gradient check")


if __name__ == "__main__":
    main()
