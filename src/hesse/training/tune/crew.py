"""The workers of a search together: who has nothing to do gets a trial, who dies is replaced.

All that Optuna is asked and told passes through here, in one thread, so that a search with one worker repeats itself.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hesse.finding import Finding, InputError
from hesse.training.tune.record import counted
from hesse.training.tune.space import draw
from hesse.training.tune.worker import Worker

if TYPE_CHECKING:
    import optuna

__all__ = ["Crew"]

MOST_DEATHS = 7  # in a row: three settings in turn that are too large for the memory, each tried twice, may be chance


class Crew:
    """Worker processes on one table.

    Args:
        task: of each, as :class:`~hesse.training.tune.worker.Worker` takes it.
        jobs: how many.
    """

    def __init__(self, task: dict[str, Any], jobs: int) -> None:
        self.task, self.jobs = task, jobs
        self.events: queue.Queue[tuple[Worker, dict[str, Any] | None]] = queue.Queue()
        self.workers: list[Worker] = []
        self.idle: list[Worker] = []
        self.deaths, self.last_words = 0, ""

    def begin(self) -> dict[str, Any]:
        """Start the workers; what the first found in the table.

        Raises:
            InputError: the table or a setting cannot be used.
        """
        self._start()
        while (event := self._next()[1]) is None or event["event"] != "ready":
            pass
        for _ in range(self.jobs - 1):
            self._start()
        return event

    def search(
        self,
        study: optuna.Study,
        space: dict[str, dict[str, Any]],
        sampler: Callable[[int], optuna.samplers.BaseSampler],
        folder: Path,
        trials: int,
        until: float,
        ended: Callable[[int], None],
    ) -> None:
        """Draw and train until so many trials have ended.

        Args:
            study: is asked and told.
            space: to draw from.
            sampler: gives the sampler for the trial of a number: from the number alone, so that a search that was
                interrupted draws as if it had not been.
            folder: trials go into folders of their own in it.
            trials: how many in all, those of earlier sittings counted.
            until: no trial begins after this ``time.monotonic()``.
            ended: called after each trial with its number.
        """
        from optuna.trial import TrialState

        running: dict[Worker, optuna.Trial] = {}
        rows: dict[Worker, dict[str, Any]] = {}
        while True:
            while self.idle and counted(study) + len(running) < trials and time.monotonic() < until:
                worker = self.idle.pop(0)
                study.sampler = sampler(len(study.get_trials(deepcopy=False)))
                trial = running[worker] = study.ask()
                place = str(folder / "trials" / f"{trial.number:04}")
                worker.send({"folder": place, "settings": draw(trial, space), "asks": True})
            if not running and (counted(study) >= trials or time.monotonic() >= until):
                return
            worker, event = self._next()
            trial = running.get(worker)  # type: ignore[assignment]
            if trial is None:
                continue
            if event is not None and event["event"] == "epoch":
                rows[worker] = {name: event[name] for name in ("seconds", "epochs")}
                worker.send({"go on": not _hopeless(trial, event)})
                continue
            del running[worker]
            said = {**rows.pop(worker, {}), **(event or {})}
            if event is None:
                trial.set_user_attr("error", self.last_words)
                again = trial.user_attrs.get("again", False)
                study.tell(trial, state=TrialState.FAIL)
                if not again:  # the fault may have been the machine's
                    study.enqueue_trial(trial.params, user_attrs={"again": True})
            else:
                self.deaths = 0
                for name in ("seconds", "epochs", "score"):
                    trial.set_user_attr(name, said.get(name))
                if event["event"] == "done" and event["value"] is not None:
                    study.set_user_attr("judged", event["judged"])
                    study.tell(trial, event["value"])
                else:
                    if event["event"] == "done":
                        trial.set_user_attr("error", "It diverged: the validation loss was never a number.")
                    study.tell(trial, state=TrialState.PRUNED)
            ended(trial.number)

    def alone(self, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        """One training to its end, while the others wait."""
        while True:
            while not self.idle:
                self._next()
            worker = self.idle.pop(0)
            worker.send({"folder": str(folder), "settings": settings, "asks": False})
            while (found := self._next())[0] is not worker:
                pass
            if found[1] is not None:
                return found[1]

    def end(self) -> None:
        """Stop all workers."""
        for worker in self.workers:
            worker.end()
        self.workers, self.idle = [], []

    def _start(self) -> None:
        threads = max(1, torch.get_num_threads() // self.jobs)
        self.workers.append(Worker(self.task, threads, self.events))

    def _next(self) -> tuple[Worker, dict[str, Any] | None]:
        """The next event; workers that are ready are idle, those that died are replaced.

        Raises:
            InputError: the table or a setting cannot be used, or workers keep dying.
        """
        worker, event = self.events.get()
        if event is None:
            self._replace(worker)
        elif event["event"] == "refused":
            finding = Finding(**event["finding"])
            raise InputError(finding.kind, finding.where, finding.message, finding.remedy, finding.value)
        elif event["event"] != "epoch":
            self.idle.append(worker)
        return worker, event

    def _replace(self, dead: Worker) -> None:
        self.workers.remove(dead)
        if dead in self.idle:
            self.idle.remove(dead)
        self.deaths += 1
        self.last_words = dead.bury()
        if self.deaths > MOST_DEATHS:
            raise InputError(
                "workers die",
                "workers",
                f"{self.deaths} workers ended one after the other. {self.last_words}",
                "If memory is short, use fewer --jobs; if not, see what hesse train says about the same table.",
                self.deaths,
            )
        self._start()


def _hopeless(trial: optuna.Trial, event: dict[str, Any]) -> bool:
    """Whether the pruner would stop the trial after this epoch."""
    if event["value"] is None:
        return False
    trial.report(event["value"], event["epochs"])
    return trial.should_prune()
