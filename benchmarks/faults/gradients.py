"""``hesse.check`` beside ``torch.autograd.gradcheck``: faults, their repaired twins, healthy models that look odd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import process_time
from typing import Any

import torch

from benchmarks.faults.gradcheck import notices
from blind import corpus
from blind.case import judged
from gradient_faults import estimators, losses, numbers, paths, pointwise, second, settings, structured
from gradient_faults.case import Fault, Healthy
from gradient_faults.healthy import HEALTHY
from gradient_faults.models import MODELS
from hesse import check

MODULES = (pointwise, structured, settings, losses, estimators, paths, numbers, second)
CORPORA: dict[str, tuple[list[Fault], list[Healthy]]] = {
    "development": ([fault for module in MODULES for fault in module.FAULTS], [*HEALTHY, *MODELS]),
    "blind": (corpus.FAULTS, corpus.HEALTHY),
}


@dataclass
class Score:
    """What a tool said of a corpus.

    Args:
        wrong: of each fault, by its name, what was wrong in the answer, by aspect.
        twins, healthy: names of cases in which an alarm is false, with what was said.
        seconds: of each case.
    """

    wrong: dict[str, dict[str, Any]] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)
    healthy: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def right(self, aspect: str) -> int:
        """Faults that were found and are right in this aspect."""
        return sum("found" not in wrong and aspect not in wrong for wrong in self.wrong.values())


def main() -> None:
    """Print the table, and every miss and false alarm by name."""
    print("### Gradient checks\n")
    print(
        "| corpus | tool | found | right place first | right kind | file | alarms on repaired twins "
        "| alarms on healthy models | median, s | slowest, s |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    misses = []
    for name, (faults, healthy) in CORPORA.items():
        for tool, ask in {"hesse.check": _hesse, "gradcheck": _gradcheck}.items():
            score = _score(faults, healthy, ask)
            named = [f"{score.right(a)}/{len(faults)}" for a in ("place", "kind", "file")]
            cells = [
                f"{score.right('found')}/{len(faults)}",
                *(named if tool == "hesse.check" else ["says none"] * 3),
                f"{len(score.twins)}/{len(faults)}",
                f"{len(score.healthy)}/{len(healthy)}",
                f"{median(score.seconds):.2f}",
                f"{max(score.seconds):.2f}",
            ]
            print(f"| {name} | {tool} | " + " | ".join(cells) + " |", flush=True)
            misses += [f"- {name}, {tool}, {case}: {wrong}" for case, wrong in score.wrong.items() if wrong]
            misses += [f"- {name}, {tool}, false alarm, twin of {case}: {said}" for case, said in score.twins.items()]
            misses += [f"- {name}, {tool}, false alarm, {case}: {said}" for case, said in score.healthy.items()]
    print("\nWhat is not right, and what is said instead:\n")
    print("\n".join(misses) + "\n")


def _score(faults: list[Fault], healthy: list[Healthy], ask: Callable[..., tuple[dict[str, Any], str]]) -> Score:
    score = Score()

    def asked(case: Fault | Healthy, *broken: bool) -> tuple[dict[str, Any], str]:
        torch.manual_seed(0)
        subject, inputs = case.make(*broken)
        began = process_time()
        answer = ask(case, subject, inputs)
        score.seconds.append(process_time() - began)
        return answer

    for fault in faults:
        score.wrong[fault.name] = asked(fault, True)[0]
        if said := asked(fault, False)[1]:
            score.twins[fault.name] = said
    for case in healthy:
        if said := asked(case)[1]:
            score.healthy[case.name] = said
    return score


def _hesse(case: Fault | Healthy, subject: Any, inputs: Any) -> tuple[dict[str, Any], str]:
    report = getattr(check, case.check)(subject, inputs)
    said = "; ".join(f"{finding.kind} at {finding.where}" for finding in report.culprits)
    return (judged(case, report) if isinstance(case, Fault) else {}), said


def _gradcheck(case: Fault | Healthy, subject: Any, inputs: Any) -> tuple[dict[str, Any], str]:
    answer = notices(subject, inputs, case.check)
    reason = " ".join(answer.split())[:100] if isinstance(answer, str) else "nothing"
    return ({} if answer is True else {"found": reason}), ("wrong" if answer is True else "")
