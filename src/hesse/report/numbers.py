"""Numbers as a page writes them: shares, durations, what a score is called, and how sure one can be of it."""

from __future__ import annotations

import math

from hesse.report.figure import percent

__all__ = ["brief", "duration", "is_share", "plotly_format", "score_name", "seen", "signed", "value", "wilson"]

# Scores that are written otherwise than their key, and those that are shares of one.
NAMES = {"r2": "R²", "f1": "F1", "auc": "AUC", "roc auc": "ROC AUC", "mae": "MAE", "rmse": "RMSE", "ece": "ECE"}
SHARES = {"accuracy", "balanced accuracy", "exact match", "subset accuracy"}


def score_name(score: str) -> str:
    """The name of a score or a metric, from its key in the records.

    Example:
        >>> score_name("r2"), score_name("balanced_accuracy"), score_name("mean score"), score_name("f1_macro")
        ('R²', 'balanced accuracy', 'mean score', 'F1 macro')
    """
    words = " ".join(score.replace("_", " ").split())
    if words.lower() in NAMES:
        return NAMES[words.lower()]
    return " ".join(NAMES.get(word.lower(), word) for word in words.split())


def is_share(score: str) -> bool:
    """Whether a score is a share of the rows, written in percent."""
    return score.replace("_", " ").lower() in SHARES


def plotly_format(score: str) -> str:
    """How plotly writes a value of this score."""
    return ".1%" if is_share(score) else ".3f"


def value(number: float | None, score: str = "") -> str:
    """A number for a table: a share, a coefficient, a loss, or a dash.

    Example:
        >>> value(0.871, "accuracy"), value(0.871, "r2"), value(31250.4), value(None)
        ('87.1%', '0.871', '31,250', '–')
    """
    if number is None or not math.isfinite(number):
        return "–"
    if is_share(score):
        return percent(number)
    if number and (abs(number) < 0.001 or abs(number) >= 1e7):
        return f"{number:.3g}"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3f}"


def signed(number: float | None, score: str = "") -> str:
    """A part of a score, with its sign.

    Example:
        >>> signed(0.302, "accuracy"), signed(-0.01, "r2")
        ('+30.2%', '−0.010')
    """
    if number is None or not math.isfinite(number):
        return "–"
    return ("−" if number < 0 else "+") + value(abs(number), score)


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


def seen(value: float | int | str) -> str:
    """What a finding has seen, or held it against."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def brief(text: object, width: int = 80) -> str:
    """A name or an example, cut where it would fill the page."""
    whole = str(text)
    return whole if len(whole) <= width else whole[: width - 1] + "…"
