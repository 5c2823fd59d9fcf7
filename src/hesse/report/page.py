"""The page as a whole: records in, one HTML file out.

The page is a list of sections. Each has a sentence on how to read it, its charts, and a sentence that stands
in their place when the run left no record of them. The template puts them in order; numbers and words come
from here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hesse.files import write_text
from hesse.finding import Finding
from hesse.report import charts, layer_curves, layers
from hesse.report.figure import Chart, percent
from hesse.report.records import Records, read

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs
except ImportError as error:
    raise ImportError(f"The report needs {error.name}: pip install 'hesse[train]'", name=error.name) from error

__all__ = ["build", "render"]

GRAVITY = ("error", "warning", "info")  # findings in this order


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page made of charts: what it is called, how to read it, what to say when it is empty."""

    name: str
    title: str
    lead: str
    charts: list[Chart]
    absent: str


def build(folder: Path) -> Path:
    """Write ``report.html`` into a run folder, from the run's records.

    Args:
        folder: a folder that ``hesse train`` has written.

    Returns:
        The path of the page: one file that opens without network, in light and dark, on screens and on paper.

    Raises:
        InputError: the folder is not a run folder, or one of its records is damaged.
    """
    run = read(Path(folder))
    path = Path(folder) / "report.html"
    write_text(path, _render(run))
    return path


def render(template: str, drawn: Sequence[Chart], **values: Any) -> str:
    """A page from a template of this folder, with its charts and the script that draws them."""
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Strict JSON in the order given; jinja's tojson escapes what could end the script element it stands in.
    page.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": False, "separators": (",", ":")}
    page.filters |= {"percent": percent, "duration": duration, "value": _value, "brief": _brief, "seen": _seen}
    figures = {chart.name: chart.figure for chart in drawn}
    return page.get_template(template).render(figures=figures, plotly=get_plotlyjs(), **values)


# ---------------------------------------------------------------------------------------------------- content


def _render(run: Records) -> str:
    sections = list(_sections(run))
    return render(
        "page.html.j2",
        [chart for section in sections for chart in section.charts],
        run=run,
        config=run.config,
        headline=_headline(run),
        what="accuracy" if run.score == "accuracy" else "R²",
        findings=sorted((Finding(**f) for f in run.findings), key=lambda f: GRAVITY.index(f.severity)),
        sections=sections,
        runs=[_summary(each) for each in (run, *run.beside)],
        classes=_classes(run),
        confused=_confused(run),
        columns=run.columns.get("columns", []),
    )


def _sections(run: Records) -> Iterator[Section]:
    curves = [charts.Curve(each.label, each.metrics) for each in (run, *run.beside)]
    drawn = [
        draw
        for against in ("seconds", "epoch")
        for draw in (charts.score(curves, run.score, against), charts.loss(curves, against))
    ]
    yield Section(
        "curves",
        "Learning curves",
        "Against wall time, one sees what a second of training buys; against epochs, what one pass over the "
        "rows buys. Higher is better for the score, lower for the loss; the large marker is the epoch with "
        "the best validation score. Loss is solid on validation rows and dotted on training rows: where "
        "the first rises while the second falls, the model overfits.",
        _drawn(*drawn),
        "No epoch was completed: metrics.jsonl is missing or empty.",
    )
    yield _errors(run)
    yield _modalities(run)
    findings = [Finding(**f) for f in run.findings]
    yield Section(
        "gradients",
        "Gradients, layer by layer",
        "One row is a layer, from the inputs at the top to the output at the bottom; one column is a moment "
        "of the training. Colour is the norm of the gradient divided by that of the weight. A row that "
        "fades into the page learns less and less (vanishing); one that stands out ever more may be "
        "exploding; where there was no gradient at all, the cell is grey. A cross is an error, a triangle a "
        "warning and a circle a note, at its layer and step: point at it to read it. Click on a row, or choose "
        "from the list, to see a layer's own curves below.",
        _drawn(layers.gradients(run.layers, findings), layer_curves.curves(run.layers, findings)),
        "No gradient was recorded: layers.jsonl is missing or empty.",
    )
    yield Section(
        "updates",
        "Updates, layer by layer",
        "How far a step moves a layer, as a share of its weights: a faint line is a layer, a bold one the "
        "median of a part of the network. Parts that lie far apart learn at different speeds; a line that "
        "ends has come to rest. Point at a line to read its name.",
        _drawn(layers.updates(run.layers)),
        "No update was recorded: layers.jsonl is missing or empty.",
    )
    yield Section(
        "steps",
        "Damping and step size",
        "What the optimiser decided at every step. Damping falls while the quadratic model foretells the "
        "loss well, and rises when it does not; the trust ratio is the decrease found over the decrease "
        "foretold, 1 where they agree. A cross is a step that was taken back.",
        _drawn(layers.steps(run.steps)),
        f"{run.label} recorded no damping, step size or momentum: steps.jsonl is missing, empty or holds losses alone.",
    )


def _errors(run: Records) -> Section:
    record = run.evaluation
    if run.config["task"] == "classification":
        matrix = record.get("confusion")
        return Section(
            "errors",
            "Where it errs",
            "A row is an actual class, a column a predicted one, a number the count of test rows; colour is "
            "the share of the actual class. What lies off the diagonal is a mistake. Recall is the share "
            "of a class that was found, precision the share of its predictions that were right.",
            [charts.confusion(run.config["classes"], matrix)] if matrix else [],
            "The test rows were not evaluated: evaluation.json is missing or holds no confusion matrix.",
        )
    pairs = zip(record.get("actual") or (), record.get("predicted") or (), strict=True)
    known = [pair for pair in pairs if None not in pair]
    drawn = []
    if known:
        actual, predicted = zip(*known, strict=True)
        drawn = [
            charts.predictions(actual, predicted, run.config["target"]),
            charts.residuals(actual, predicted),
        ]
    return Section(
        "errors",
        "Where it errs",
        "Each dot is a test row; on the dashed diagonal the prediction is right, above it too high. The "
        "residuals should be centred on zero; a long tail means that a few rows are far off.",
        drawn,
        "The test rows were not evaluated: evaluation.json is missing or holds no predictions.",
    )


def _modalities(run: Records) -> Section:
    seen = run.evaluation.get("modalities") or {}
    rows = [
        (
            modality["name"] + (f" ({modality['kind']})" if modality["kind"] != modality["name"] else ""),
            seen[modality["key"]].get("alone"),
            seen[modality["key"]].get("without"),
        )
        for modality in run.config["modalities"]
        if modality["key"] in seen
    ]
    value = run.evaluation.get("value")
    drawn = []
    if rows and value is not None:
        drawn = [charts.modalities(rows, run.score, value, run.evaluation.get("baseline"))]
    return Section(
        "modalities",
        "What each modality brings",
        "The same model, with parts of its input hidden: a modality alone, and all others without it. One "
        "that carries information stands high alone; one that nothing else can replace leaves a gap to the "
        "dashed line when it is missing. The model was not trained again for these numbers.",
        drawn,
        "No modality was masked: evaluation.json is missing or holds no such scores.",
    )


def _drawn(*drawn: Chart | None) -> list[Chart]:
    return [chart for chart in drawn if chart is not None]


def _headline(run: Records) -> dict[str, Any]:
    """The score in large: on the test rows, or the best validation score where there was no test."""
    if run.evaluation.get("value") is not None:
        value, n = run.evaluation["value"], run.evaluation.get("n")
        interval = wilson(value, n) if run.score == "accuracy" and n else None
        return {
            "value": value,
            "rows": f"{n:,} {run.evaluation.get('part', 'test')} rows" if n else "the test rows",
            "interval": interval,
            "baseline": run.evaluation.get("baseline"),
        }
    best = _best(run.metrics)
    return {"value": best, "rows": "the validation rows, at best", "interval": None, "baseline": None}


def _best(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    return max((row["valid_score"] for row in metrics if row.get("valid_score") is not None), default=None)


def _summary(run: Records) -> dict[str, Any]:
    last = run.metrics[-1] if run.metrics else {}
    return {
        "label": run.label,
        "value": run.evaluation.get("value"),
        "loss": run.evaluation.get("loss"),
        "best": _best(run.metrics),
        "epochs": last.get("epoch"),
        "seconds": last.get("seconds"),
    }


def _classes(run: Records) -> list[dict[str, Any]]:
    """Recall and precision of every class, None where nothing was to be found or nothing was predicted."""
    matrix = run.evaluation.get("confusion") or []
    predicted = [sum(column) for column in zip(*matrix, strict=True)]
    return [
        {
            "name": name,
            "rows": sum(row),
            "recall": row[i] / sum(row) if sum(row) else None,
            "precision": row[i] / predicted[i] if predicted[i] else None,
        }
        for i, (name, row) in enumerate(zip(run.config["classes"] if matrix else [], matrix, strict=True))
    ]


def _confused(run: Records, most: int = 3) -> list[tuple[str, str, int]]:
    """The commonest mistakes: actual class, predicted class, count; single rows are no pattern."""
    classes = run.config["classes"]
    mistakes = [
        (classes[i], classes[j], count)
        for i, row in enumerate(run.evaluation.get("confusion") or [])
        for j, count in enumerate(row)
        if i != j and count > 1
    ]
    return sorted(mistakes, key=lambda mistake: -mistake[2])[:most]


# ---------------------------------------------------------------------------------------------------- numbers


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share counted on ``n`` rows (Wilson 1927), sound for small ``n`` too.

    Example:
        >>> low, high = wilson(0.9, 100)
        >>> round(low, 3), round(high, 3)
        (0.826, 0.945)
    """
    z = 1.959964  # the normal quantile that leaves 2.5 % above it
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def duration(seconds: float) -> str:
    """Seconds as one reads them.

    Example:
        >>> duration(7.25), duration(24), duration(95), duration(7500)
        ('7.2 s', '24 s', '1 min 35 s', '2 h 5 min')
    """
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _value(value: float | None, score: str = "") -> str:
    """A number for a table: a share, a coefficient, a loss, or a dash."""
    if value is None:
        return "–"
    return percent(value) if score == "accuracy" else f"{value:.3f}"


def _seen(value: float | int | str) -> str:
    """What a finding has seen, or held it against."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _brief(text: object, width: int = 80) -> str:
    """A name or an example, cut where it would fill the page."""
    whole = str(text)
    return whole if len(whole) <= width else whole[: width - 1] + "…"
