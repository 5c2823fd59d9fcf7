"""Where the model errs, target by target: metrics, confusions, calibration and thresholds.

Several targets stand below each other under a table of all; a single one has the section to itself. What a record
lacks is left out: a run of an older version has a confusion matrix or predictions, and from these alone come the
table of classes and its charts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hesse.report import target_charts
from hesse.report.figure import Chart
from hesse.report.numbers import score_name, value
from hesse.report.records import Records

__all__ = ["View", "views"]

MATRIX = 100  # classes up to which a confusion matrix is a picture
TABLE = 100  # classes in the table; of more, the worst
PAIRS = 3  # most confused pairs in a sentence
MORE_PAIRS = 20  # and in a table, where the matrix has no numbers

# What a metric says, in words for those who do not know it. Keys as scikit-learn has them, in either order of words.
MEANING = {
    "accuracy": "share of the rows with the right answer",
    "balanced accuracy": "recall, averaged over the classes: a rare class counts as much as a frequent one",
    "precision": "share of the predictions of the class that are right",
    "recall": "share of the class that was found",
    "f1": "harmonic mean of precision and recall",
    "log loss": "minus the logarithm of the probability that the actual class was given, on average; lower is better",
    "brier": "squared distance of the probabilities from the truth, on average; lower is better",
    "roc auc": "how often a row of a class is ranked above a row of another; 0.5 is chance",
    "average precision": "precision, averaged over all thresholds",
    "map": "precision, averaged over all thresholds and labels",
    "f1 at threshold": "harmonic mean of precision and recall of the second class, cut where it was best in validation",
    "mcc": "correlation of predicted and actual classes; 0 is chance",
    "kappa": "agreement beyond chance; 0 is chance",
    "top 5 accuracy": "share of the rows whose class is among the five most probable",
    "exact match": "share of the rows with every label right",
    "hamming loss": "share of the labels, over all rows, that are wrong; lower is better",
    "jaccard": "labels rightly given, over labels that were given or should have been",
    "r2": "share of the spread of the target that the predictions explain; 0 for always saying the mean of these rows",
    "explained variance": "as R², apart from a constant error",
    "mae": "distance from the actual value, on average, in the target's own unit; lower is better",
    "rmse": "root of the mean squared distance: large errors count for more; lower is better",
    "median absolute error": "half the rows are closer than this to their actual value",
    "mape": "distance as a share of the actual value, on average; lower is better",
    "ece": "distance between confidence and share of right answers, on average; lower is better",
}
ALIASES = {
    "subset accuracy": "exact match",
    "matthews corrcoef": "mcc",
    "matthews correlation": "mcc",
    "cohen kappa": "kappa",
    "brier score": "brier",
    "mean absolute error": "mae",
    "root mean squared error": "rmse",
    "mean absolute percentage error": "mape",
    "auc": "roc auc",
}
AVERAGES = {
    "macro": "averaged over the classes",
    "micro": "over all classes together",
    "weighted": "averaged over the classes by their rows",
    "samples": "averaged over the rows",
}


@dataclass(frozen=True, slots=True)
class View:
    """All that the page says about one target; what is empty is left out."""

    name: str
    task: str
    number: int  # from 1, which makes names in the page unique
    score: str
    value: float | None
    baseline: float | None
    loss: float | None
    n: int | None
    metrics: list[tuple[str, str, str]]  # name, value, meaning
    confused: list[dict[str, Any]]
    classes: list[dict[str, Any]]
    left_out: int  # classes that the table does not show
    calibration: dict[str, Any]
    threshold: float | None
    charts: list[Chart]  # without that of reliability
    reliability: Chart | None


def views(run: Records) -> list[View]:
    """Every target of the run, in the order of the model's outputs."""
    several = run.evaluation.get("targets") or {}
    alone = len(run.targets) == 1
    return [
        _view(target, (run.evaluation if alone else {}) | several.get(target["name"], {}), number)
        for number, target in enumerate(run.targets, 1)
    ]


def _view(target: Mapping[str, Any], record: Mapping[str, Any], number: int) -> View:
    classes = [str(name) for name in record.get("classes") or target["classes"]]
    matrix = record.get("confusion") or []
    table = _by_class(record, classes, matrix)
    worst = sorted(table, key=lambda row: (row["f1"] is None, row["f1"] or 0.0))
    threshold = record.get("threshold")
    mark = f"-{number}" if number > 1 else ""
    return View(
        name=target["name"],
        task=target["task"],
        number=number,
        score=record.get("score") or ("r2" if target["task"] == "regression" else "accuracy"),
        value=record.get("value"),
        baseline=record.get("baseline"),
        loss=record.get("loss"),
        n=record.get("n"),
        metrics=[
            (score_name(key), value(number, key), meaning(key)) for key, number in (record.get("metrics") or {}).items()
        ],
        confused=_confused(record, classes, MORE_PAIRS if len(classes) > target_charts.ANNOTATED else PAIRS),
        classes=table if len(table) <= TABLE else worst[:TABLE],
        left_out=max(0, len(table) - TABLE),
        calibration=_calibration(record.get("calibration") or {}),
        threshold=None if isinstance(threshold, Mapping) else threshold,
        charts=_charts(target, record, classes, matrix, mark),
        reliability=_reliability(record.get("calibration") or {}, mark),
    )


def _charts(
    target: Mapping[str, Any],
    record: Mapping[str, Any],
    classes: Sequence[str],
    matrix: Sequence[Sequence[int]],
    mark: str,
) -> list[Chart]:
    drawn = []
    if matrix and len(classes) <= MATRIX:
        drawn.append(target_charts.confusion(classes, matrix, mark))
    if target["task"] == "regression":
        pairs = zip(record.get("actual") or (), record.get("predicted") or (), strict=True)
        known = [pair for pair in pairs if None not in pair]
        if known:
            actual, predicted = zip(*known, strict=True)
            drawn.append(target_charts.predictions(actual, predicted, target["name"], mark))
            drawn.append(target_charts.residuals(actual, predicted, mark))
    return drawn


def _reliability(calibration: Mapping[str, Any], mark: str) -> Chart | None:
    before, after = calibration.get("bins_before") or [], calibration.get("bins") or []
    if not any(bin["n"] for bin in (*before, *after)):
        return None
    return target_charts.reliability(before, after, mark)


def meaning(metric: str) -> str:
    """A metric in a few words; empty if we know none.

    Example:
        >>> meaning("f1_macro"), meaning("RMSE")[:12], meaning("house points")
        ('harmonic mean of precision and recall, averaged over the classes', 'root of the ', '')
    """
    words = metric.replace("_", " ").lower().split()
    averages = [AVERAGES[word] for word in words if word in AVERAGES]
    plain = " ".join(word for word in words if word not in AVERAGES).removesuffix(" score")
    said = MEANING.get(ALIASES.get(plain, plain), "")
    return ", ".join([said, *averages]) if said else ""


def _by_class(
    record: Mapping[str, Any], classes: Sequence[str], matrix: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Rows, precision, recall and F1 of every class, None where nothing was to be found or nothing was predicted."""
    thresholds = record.get("threshold") if isinstance(record.get("threshold"), Mapping) else {}
    given = record.get("by_class") or {}
    if not given:
        given = _counted(classes, matrix)
    return [
        {"name": name, "threshold": (thresholds or {}).get(name)}
        | {key: found.get(key) for key in ("n", "precision", "f1")}
        | {"recall": found.get("recall") if found.get("n") else None}  # of no rows there is none
        for name in classes
        if (found := given.get(name)) is not None
    ]


def _counted(classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> dict[str, dict[str, float | None]]:
    """The same from a confusion matrix ``[actual, predicted]``, which older runs left alone."""
    predicted = [sum(column) for column in zip(*matrix, strict=True)]
    found: dict[str, dict[str, float | None]] = {}
    for i, (name, row) in enumerate(zip(classes if matrix else [], matrix, strict=True)):
        n = sum(row)
        found[name] = {
            "n": n,
            "precision": row[i] / predicted[i] if predicted[i] else None,
            "recall": row[i] / n if n else None,
            "f1": 2 * row[i] / (n + predicted[i]) if n + predicted[i] else None,
        }
    return found


def _confused(record: Mapping[str, Any], classes: Sequence[str], most: int) -> list[dict[str, Any]]:
    """The commonest mistakes; single rows are no pattern. Of many classes the record has only these."""
    mistakes = [
        (classes[i], classes[j], count)
        for i, row in enumerate(record.get("confusion") or [])
        for j, count in enumerate(row)
        if i != j and count > 1
    ]
    common = sorted(mistakes or record.get("confused") or [], key=lambda mistake: -mistake[2])[:most]
    return [{"actual": actual, "predicted": predicted, "count": count} for actual, predicted, count in common]


def _calibration(record: Mapping[str, Any]) -> dict[str, Any]:
    """Temperature, what it says about the model, and the numbers before and after it."""
    temperature = record.get("temperature")
    if temperature is None:
        return {}
    if temperature == 1:
        said = "It is 1 where answers are pooled: the shares were fitted to these rows, and so is how sure they are."
    elif temperature > 1.02:
        said = "The model was too sure of itself: a temperature above 1 takes its probabilities nearer to each other."
    elif temperature < 0.98:
        said = "The model was less sure than it could be: a temperature below 1 takes its probabilities further apart."
    else:
        said = "The model was as sure as it should be: a temperature of 1 changes nothing."
    rows = [
        (title, value(record.get(f"{key}_before")), value(record.get(key)), says)
        for key, title, says in (("ece", "expected calibration error", meaning("ece")), ("log_loss", "log loss", ""))
        if record.get(key) is not None
    ]
    return {"temperature": f"{temperature:.2f}", "said": said, "rows": rows}
