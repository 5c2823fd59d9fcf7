"""The page as a whole: records in, one HTML file out.

The page is a list of sections. Each has a sentence on how to read it, its charts, and a sentence that stands
in their place when the run left no record of them. A section with tables or pictures has a template of its own. The
page's template puts them in order; numbers and words come from here and from the modules of the sections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hesse.files import write_text
from hesse.finding import Finding
from hesse.report import layer_curves, layers, learning, numbers
from hesse.report.figure import Chart, percent
from hesse.report.modalities import contribution
from hesse.report.records import Records, read
from hesse.report.samples import disagreements
from hesse.report.targets import View, views

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs
except ImportError as error:
    raise ImportError(f"The report needs {error.name}: pip install 'hesse[train]'", name=error.name) from error

__all__ = ["build", "render"]

GRAVITY = ("error", "warning", "info")  # findings in this order

LEADS = {  # how to read what there is of a target
    "classification": "A row is an actual class, a column a predicted one, a number the count of rows; colour is the "
    "share of the actual class. What lies off the diagonal is a mistake. Recall is the share of a class that was "
    "found, precision the share of its predictions that were right, F1 their harmonic mean.",
    "classes": "There are too many classes for a picture of all: the tables hold the worst. Recall is the share of a "
    "class that was found, precision the share of its predictions that were right, F1 their harmonic mean.",
    "multilabel": "A row may have any number of labels, so each label is right or wrong by itself. Recall is the share "
    "of the rows with a label that were given it, precision the share of those given it that have it, F1 their "
    "harmonic mean. A label is given from its threshold up, which was chosen on the validation rows.",
    "regression": "Each dot is a row; on the dashed diagonal the prediction is right, above it too high. The residuals "
    "should be centred on zero; a long tail means that a few rows are far off.",
}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: what it is called, how to read it, what to say when it is empty.

    ``template`` shows ``content``, whose charts are among ``charts``; without one, a section is its charts.
    """

    name: str
    title: str
    lead: str
    charts: list[Chart]
    absent: str
    template: str = ""
    content: Any = None


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
    write_text(path, _render(run, Path(folder)))
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
    page.filters |= {"percent": percent, "score_name": numbers.score_name, "value": numbers.value}
    page.filters |= {"duration": numbers.duration, "brief": numbers.brief, "seen": numbers.seen}
    figures = {chart.name: chart.figure for chart in drawn}
    return page.get_template(template).render(figures=figures, plotly=get_plotlyjs(), **values)


# ---------------------------------------------------------------------------------------------------- content


def _render(run: Records, folder: Path) -> str:
    sections = list(_sections(run, folder))
    return render(
        "page.html.j2",
        [chart for section in sections for chart in section.charts],
        run=run,
        config=run.config,
        headline=_headline(run),
        what=numbers.score_name(run.score),
        part=run.evaluation.get("part", "test"),
        lead_of=_lead,
        findings=sorted((Finding(**f) for f in run.findings), key=lambda f: GRAVITY.index(f.severity)),
        sections=sections,
        runs=[_summary(each) for each in (run, *run.beside)],
        fallback=next((each.content.fallback for each in sections if each.name == "modalities"), ""),
        columns=run.columns.get("columns", []),
    )


def _sections(run: Records, folder: Path) -> Iterator[Section]:
    curves = [learning.Curve(each.label, each.metrics) for each in (run, *run.beside)]
    drawn = [
        draw
        for against in ("seconds", "epoch")
        for draw in (learning.score(curves, run.score, against), learning.loss(curves, against))
    ]
    yield Section(
        "curves",
        "Learning curves",
        "Against wall time, one sees what a second of training buys; against epochs, what one pass over the "
        "rows buys. Higher is better for the score, lower for the loss; the large marker is the epoch with "
        "the best validation score. Loss is solid on validation rows and dotted on training rows: where "
        "the first rises while the second falls, the model overfits. The training loss is what the steps saw, over "
        "the whole epoch and with a tenth of the modalities hidden; of several modalities it is the fused head's. "
        "The validation loss is the finished answer's, of averaged weights, and so mostly lower.",
        _drawn(*drawn),
        "No epoch was completed: metrics.jsonl is missing or empty.",
    )
    yield from _results(run, folder)
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


def _results(run: Records, folder: Path) -> Iterator[Section]:
    shown = views(run)
    regression = shown[0].task == "regression"
    yield Section(
        "errors",
        "Where it errs",
        "",
        [chart for view in shown for chart in (*view.charts, view.reliability) if chart is not None],
        "The test rows were not evaluated: evaluation.json is missing or holds no "
        + ("predictions." if regression else "confusion matrix."),
        "targets.html.j2",
        shown,
    )
    brings = contribution(run)
    yield Section(
        "modalities",
        "What each modality brings",
        "The same model, with parts of its input hidden. A modality that carries information stands high alone; one "
        "that nothing else can replace leaves a gap when it is missing. What it adds, averaged over all orders of "
        "adding modalities, shares the score out among them. The model was not trained again for these numbers.",
        [*brings.charts, *([brings.classes] if brings.classes else [])],
        "No modality was masked: evaluation.json is missing or holds no such scores.",
        "modalities.html.j2",
        brings,
    )
    rows = disagreements(run, folder)
    if rows:
        what = "joint answer" if regression else "log-probability of the joint answer"
        explained = f" The pull of a modality is what it adds to the {what}, averaged over all orders of adding."
        pull = explained if any(each.pull for row in rows for each in row.answers) else ""
        yield Section(
            "disagreements",
            "Where the modalities disagree",
            "The rows on which the modalities, each by itself, say the most different things of "
            f"{run.targets[0]['name']}, and what they were looking at. A modality that is wrong and sure here is one "
            "to listen to less; a label that all of them contradict may be wrong in the table."
            f"{pull} Rows are counted from 1, below the header.",
            [],
            "",
            "samples.html.j2",
            rows,
        )


def _lead(view: View) -> str:
    """How to read what there is of a target."""
    if view.task == "classification" and not any(chart.name.startswith("confusion") for chart in view.charts):
        return LEADS["classes"]
    return LEADS[view.task]


def _drawn(*drawn: Chart | None) -> list[Chart]:
    return [chart for chart in drawn if chart is not None]


def _headline(run: Records) -> dict[str, Any]:
    """The score in large: on the test rows, or the best validation score where there was no test."""
    if run.evaluation.get("value") is not None:
        value, n = run.evaluation["value"], run.evaluation.get("n")
        interval = numbers.wilson(value, n) if run.score == "accuracy" and n else None
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
        "waited": (last.get("waited") or 0.0) / last["seconds"] if last.get("seconds") else 0.0,
    }
