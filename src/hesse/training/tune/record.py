"""What a search has found so far, as one JSON object for people and pages: ``tune.json``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

__all__ = ["counted", "record", "trials_of"]

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


def record(study: optuna.Study) -> dict[str, Any]:
    """The object. What does not come from trials is kept with the study: what was asked, the space, K-FAC's result."""
    trials = trials_of(study)
    complete = [trial for trial in trials if trial["state"] == "complete"]
    best = min(complete, key=lambda trial: float(trial["value"]), default=None)
    asked: dict[str, Any] = study.user_attrs["search"]
    return {
        **asked,
        **study.user_attrs.get("judged", {"score": None, "part": None, "baseline": None}),
        "direction": "minimize",
        "objective": "validation loss",
        "trials": trials,
        "best": best and {key: best[key] for key in ("number", "params", "value", "score", "seconds", "folder")},
        "kfac": study.user_attrs.get("kfac"),
        "seconds": math.fsum(trial["seconds"] or 0.0 for trial in trials),
    }


def trials_of(study: optuna.Study) -> list[dict[str, Any]]:
    """The trials that have ended, in the order of their numbers.

    One that diverged is "failed", and so is one whose worker died; the search itself counts the first as pruned, lest
    it draw such settings again.
    """
    found: list[dict[str, Any]] = []
    least = None
    for trial in study.get_trials(deepcopy=False):
        said = trial.user_attrs
        if trial.state.name not in STATES or _lost(trial):
            continue
        state = "failed" if said.get("error") else STATES[trial.state.name]
        value = trial.value if state == "complete" else None
        if value is not None:
            least = value if least is None else min(least, value)
        found.append(
            {
                "number": trial.number,
                "state": state,
                "params": dict(trial.params),
                "value": value,
                "score": said.get("score"),
                "seconds": said.get("seconds"),
                "epochs": said.get("epochs"),
                "best_so_far": least,
                "folder": f"trials/{trial.number:04}",
                "error": said.get("error"),
            }
        )
    return found


def counted(study: optuna.Study) -> int:
    """How many trials have ended for good: not those that were lost with their worker and go to another."""
    trials = study.get_trials(deepcopy=False)
    return sum(t.state.name in STATES and (t.state.name != "FAIL" or bool(t.user_attrs.get("again"))) for t in trials)


def _lost(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether the search ended before the trial did."""
    return trial.state.name == "FAIL" and "error" not in trial.user_attrs
