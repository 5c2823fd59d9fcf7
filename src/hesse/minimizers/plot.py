"""The convergence of a solve as a figure: what was left to gain, how steep it was and how far each step went.

On logarithmic axes a method shows its order: gradient descent falls along a line, Newton's method bends down and
doubles its digits. What has no logarithm (a value that is the least one itself, a gradient of 0) is drawn as a hollow
mark on the lower edge, not left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesse.files import atomic_path

if TYPE_CHECKING:
    from hesse.minimizers.result import Trace

__all__ = ["plot", "ready"]

FORMATS = ("png", "svg", "pdf")
# Creation times and versions in a file would make each writing of one figure another file.
ANONYMOUS = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def plot(trace: Trace, path: str | Path) -> None:
    """Write the convergence as a figure of three panels, by iteration: value, gradient, step.

    Args:
        trace: rows of a solve; values are shown above the least one seen, which is the last unless steps went up.
        path: of the file, replaced whole or not at all; its suffix says the format (png, svg, pdf).

    Raises:
        ValueError: another suffix, or a trace without rows.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import tempfile, torch
        >>> from hesse.minimizers import minimize
        >>> result = minimize(lambda x: (x**4).sum(), torch.ones(2, dtype=torch.float64))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot(result.trace, Path(folder) / "convergence.svg")
        ...     (Path(folder) / "convergence.svg").read_text(encoding="utf-8")[:5]
        '<?xml'
    """
    path = Path(path)
    kind, new_figure = ready(path)
    if not len(trace):
        raise ValueError("the trace has no rows, so there is nothing to plot: not even the start was finite.")
    figure = new_figure(figsize=(11, 3.3), layout="constrained")
    panels = figure.subplots(1, 3)
    least = min((value for value in trace.fun if math.isfinite(value)), default=math.nan)
    _curve(panels[0], trace.step, [value - least for value in trace.fun], "C0", "value above the least")
    panels[0].set_title(f"least value {least:.10g}", fontsize=9)
    _curve(panels[1], trace.step, trace.gradient, "C3", "largest element of the gradient")
    _curve(panels[2], trace.step[1:], trace.length[1:], "C2", "length of the step")
    for panel in panels:
        panel.set_xlabel("iteration")
        panel.margins(x=0.03)
        panel.set_xlim(-0.03 * max(trace[-1].step, 1), 1.03 * max(trace[-1].step, 1))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
    with atomic_path(path) as part:
        figure.savefig(part, format=kind, dpi=150, metadata=ANONYMOUS[kind])


def ready(path: Path) -> tuple[str, Any]:
    """The format of a figure and matplotlib's class of figures: whether :func:`plot` can be, before a long solve.

    A ``Figure`` of its own instead of pyplot's: no backend is chosen, and no window or list of figures of the user's is
    touched.

    Raises:
        ValueError: a suffix of no known format.
        ModuleNotFoundError: matplotlib is not installed.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        known = ", ".join(f".{name}" for name in FORMATS)
        raise ValueError(f"a figure's path must end in one of {known}, which says its format; got {str(path)!r}.")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a figure needs matplotlib, which cannot be imported: pip install 'hesse[minimize]'.", name=error.name
        ) from error
    return kind, Figure


def _curve(panel: Any, steps: Sequence[float], values: Sequence[float], colour: str, what: str) -> None:
    """One column on a logarithmic axis, zeros as hollow marks on its lower edge."""
    panel.set_ylabel(what)
    # Kept from the ends of what a float can hold, where an axis has no room.
    shown = [min(max(value, 1e-200), 1e200) if 0 < value < math.inf else math.nan for value in values]
    zeros = [step for step, value in zip(steps, values, strict=True) if value == 0]
    known = [value for value in shown if not math.isnan(value)]
    if known:
        low, high = math.log10(min(known)), math.log10(max(known))
        room = max(0.08 * (high - low), 0.15)
        panel.set_yscale("log")
        panel.set_ylim(10.0 ** max(low - room, -220), 10.0 ** min(high + room, 220))
        panel.plot(steps, shown, "-" if len(shown) > 60 else "o-", color=colour, markersize=3.5, linewidth=1.2)
    else:
        panel.set_yticks([])
    if zeros:
        hollow = {"color": colour, "markersize": 5, "markerfacecolor": "white", "clip_on": False, "zorder": 3}
        panel.plot(zeros, [0.0] * len(zeros), "o", transform=panel.get_xaxis_transform(), **hollow)
        where = {"xycoords": "axes fraction", "ha": "right", "va": "top"}
        panel.annotate("hollow: 0", (0.98, 0.97), fontsize=8, color="0.4", **where)
