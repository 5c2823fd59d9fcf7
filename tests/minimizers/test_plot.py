"""A trace plots itself: into every format, whatever its numbers, and without touching pyplot."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hesse.minimizers import Row, Trace, minimize
from hesse.minimizers.plot import plot

NAN = math.nan
MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


def rows(*columns: tuple[float, float, float]) -> Trace:
    """A trace of values, gradients and lengths."""
    return Trace([Row(i, f, g, length, 1.0, NAN, i, i, i, 0) for i, (f, g, length) in enumerate(columns)])


def solved() -> Trace:
    def rosenbrock(x: Tensor) -> Tensor:
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    trace = minimize(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64)).trace
    assert isinstance(trace, Trace)
    return trace


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "PNG"])
def test_the_suffix_says_the_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "neu" / f"Verlauf ä.{suffix}"
    solved().plot(path)
    assert path.read_bytes().startswith(MAGIC[suffix.lower()])
    assert [found.name for found in path.parent.iterdir()] == [path.name]


TRACES = {
    "one row": rows((3.0, 1.0, 0.0)),
    "one row of zeros": rows((0.0, 0.0, 0.0)),
    "constant": rows((2.0, 0.0, 0.0), (2.0, 0.0, 1.0)),
    "values that rise": rows((1.0, 1.0, 0.0), (5.0, 2.0, 1.0), (1e200, 1e100, 1e50)),
    "not finite": rows((1.0, 1.0, 0.0), (math.inf, NAN, 1.0), (-math.inf, math.inf, math.inf)),
    "nowhere finite": rows((NAN, NAN, 0.0), (math.inf, NAN, NAN)),
    "as small and large as floats are": rows((1e308, 1e308, 0.0), (1e-308, 5e-324, 5e-324), (0.0, 0.0, 0.0)),
    "long": rows(*((0.9**i, 0.8**i, 0.7**i) for i in range(500))),
}


@pytest.mark.parametrize("name", TRACES)
def test_every_trace_can_be_drawn(name: str, tmp_path: Path) -> None:
    plot(TRACES[name], tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 5000


def texts(trace: Trace, folder: Path) -> list[str]:
    """The words in the figure, read from the comments that matplotlib leaves in an SVG."""
    plot(trace, folder / "trace.svg")
    return re.findall("<!-- (.*?) -->", (folder / "trace.svg").read_text(encoding="utf-8"))


def test_the_panels_say_what_they_show(tmp_path: Path) -> None:
    words = texts(rows((3.5, 1.0, 0.0), (1.25, 0.5, 1.0)), tmp_path)
    assert words.count("iteration") == 3
    assert {"value above the least", "largest element of the gradient", "length of the step", "least value 1.25"} <= {
        *words
    }


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    words = texts(TRACES["not finite"], tmp_path)
    assert "least value 1" in words
    assert words.count("hollow: 0") == 1


def test_zeros_are_marked_and_said(tmp_path: Path) -> None:
    # Only the least value is 0 above itself; then gradient and step are 0 too.
    assert texts(rows((3.0, 1.0, 0.0), (1.0, 0.5, 1.0)), tmp_path).count("hollow: 0") == 1
    assert texts(rows((3.0, 1.0, 0.0), (1.0, 0.0, 0.0)), tmp_path).count("hollow: 0") == 3


def test_the_same_trace_is_the_same_file(tmp_path: Path) -> None:
    for suffix in ("png", "pdf"):
        a, b = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
        solved().plot(a)
        solved().plot(b)
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("name", ["trace.gif", "trace", ".png", "trace.png.bak"])
def test_other_suffixes_are_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        solved().plot(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_trace_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        Trace().plot(tmp_path / "trace.png")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path = tmp_path / "trace.png"
    path.write_bytes(b"old")

    def fail(self: Figure, where: Path, **settings: object) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        solved().plot(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_without_matplotlib_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hesse\[minimize\]'"):
        solved().plot(tmp_path / "trace.png")


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from hesse.minimizers import Row, Trace\n"
        "assert 'matplotlib' not in sys.modules\n"
        "Trace([Row(0, 1.0, 1.0, 0.0, 0.0, 1.0, 1, 1, 0, 0)]).plot(Path(sys.argv[1]) / 'a.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "import matplotlib\n"
        "assert matplotlib.get_backend(auto_select=False) is None\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], check=True)
