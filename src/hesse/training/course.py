"""One course of training: from wherever its folder stands to the end of its plan, with everything on disk.

A new run is a course in an empty folder; a resumed one finds a checkpoint there; an optimiser trained for comparison is
a course of its own in a folder of its own. The three differ in nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hesse import check
from hesse.files import write_json
from hesse.finding import Finding, InputError
from hesse.multimodal import FusedModel
from hesse.objective import closure
from hesse.objective.replicas import Replicas
from hesse.training import checkpoint
from hesse.training.balance import fallen_back, is_fitted
from hesse.training.build import build_model, plain
from hesse.training.calibration import calibrate
from hesse.training.classes import unseen_classes
from hesse.training.evaluate import evaluate, known_targets, outputs
from hesse.training.feed import Batch
from hesse.training.leaks import constant_modalities, leaks
from hesse.training.loop import Plan, State, batches, epochs, finished, start
from hesse.training.losses import loss_of
from hesse.training.optimizers import batch_size, make_optimizer
from hesse.training.run import Run, write_model
from hesse.training.screen import Screen

__all__ = ["Course", "beside", "follow"]

CHECKED_ROWS = 32  # of the first batch, for the gradient check: derivatives are wrong for few rows as for many

SAVED = 1.0  # seconds between saves, at the ends of epochs; one takes about 40 ms, as long as a short epoch


@dataclass(frozen=True)
class Course:
    """Where the records go, what ``config.json`` says, the plan, and who is told of each epoch."""

    folder: Path
    config: dict[str, Any]
    plan: Plan
    on_epoch: Callable[[dict[str, Any]], object] | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write the configuration and the schema, with a status that stays true: running, interrupted, finished."""
        self.write("running")
        if self.plan.team.first:
            write_json(self.folder / "columns.json", self.plan.schema.to_json())
        try:
            yield
        except KeyboardInterrupt:
            self.write("interrupted")
            raise
        self.write("finished")

    def write(self, status: str) -> None:
        """Write the configuration, with what has become of the course."""
        if self.plan.team.first:
            write_json(self.folder / "config.json", {**self.config, "status": status})


def beside(course: Course, name: str, seconds: float) -> Course:
    """Another optimiser at its default rate, from the same start, for the same wall time, in ``compare/NAME``."""
    terms: dict[str, Any] = {"epochs": None, "seconds": seconds, "patience": None}
    if "batch_size" not in course.config["arguments"]:
        terms["batch_size"] = batch_size(name, len(course.plan.feed))
    config = {**course.config, "optimizer": name, "lr": None, "weight_decay": None, "compare": [], **terms}
    return Course(course.folder / "compare" / name, config, replace(course.plan, **terms))


def follow(course: Course, screen: Screen, interrupted: threading.Event, checked: bool = True) -> State:
    """Train to the end of the plan, and judge the model that is kept.

    Args:
        course: what to train and where to keep it.
        screen: shows progress.
        interrupted: looked at after each step.
        checked: whether to check the gradients before the first step.

    Raises:
        KeyboardInterrupt: ``interrupted`` was set; the state has been saved.
    """
    folder, plan = course.folder, course.plan
    state = _begin(course, screen, checked)
    if state.step and finished(plan, state):
        screen.say("nothing is left to train; more --epochs or --seconds would go on")
    saved = time.monotonic()
    with state.monitor, screen.training(plan, course.config["optimizer"]) as bar:

        def stepped(loss: float) -> None:
            bar.step(state, loss)
            if not Replicas(state.replica).all(not interrupted.is_set()):  # any process
                _save(course, state)
                raise KeyboardInterrupt

        for row in epochs(plan, state, stepped, partial(_saving, course)):
            bar.epoch(row)
            _told(course, state, row)
            if time.monotonic() - saved >= SAVED:
                _save(course, state)
                saved = time.monotonic()
    _save(course, state)
    if state.best and plan.team.first:
        part = "test" if len(plan.positions["test"]) else "valid"
        # The model as it lies on disk is judged: it is what predicts.
        model, valid = Run(folder).model(), plan.positions["valid"]
        out, targets = outputs(model, plan.data, valid), known_targets(plan.data, valid)
        calibration = calibrate(plan.schema, out, targets, is_fitted(model))
        write_json(folder / "calibration.json", calibration)
        record = evaluate(plan.schema, model, plan.data, plan.positions, part, calibration)
        if (finding := fallen_back(model)) is not None:
            record["fallback"] = {"modality": finding.where, "reason": finding.message}
            state.earlier = [*(known for known in state.earlier if known.kind != finding.kind), finding]
            screen.findings([finding])
            _save(course, state)
        write_json(folder / "evaluation.json", record)
    return state


def _saving(course: Course, plan: Plan, state: State) -> Iterator[Batch]:
    """The batches; if one of them cannot be read, the state is saved, to go on when that has been mended."""
    try:
        yield from batches(plan, state)
    except InputError:
        _save(course, state)
        course.write("interrupted")
        raise


def _told(course: Course, state: State, row: dict[str, Any]) -> None:
    """Tell the caller of an epoch; whatever he raises ends the training, with the state saved."""
    if course.on_epoch is None or not course.plan.team.first:
        return
    try:
        course.on_epoch(dict(row))
    except BaseException:
        _save(course, state)
        course.write("interrupted")
        raise


def _save(course: Course, state: State) -> None:
    if not course.plan.team.first:
        return
    if state.best:
        write_model(course.folder, state.best)
    checkpoint.save(course.folder, state)


def _begin(course: Course, screen: Screen, checked: bool) -> State:
    """Model, optimiser and state from the seed, or from the checkpoint if there is one."""
    plan = course.plan
    torch.default_generator.manual_seed(plan.seed)  # torch.manual_seed would disturb the caller's devices too
    model = build_model(plan.schema, course.config)
    replica = plan.team.replica(model)
    state = start(model, _optimizer(course.config, replica), replica)
    if (course.folder / checkpoint.CHECKPOINT).exists():
        checkpoint.restore(course.folder, state)
    elif checked:
        state.earlier = _look(plan, model, screen)
    return state


def _optimizer(config: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(config["optimizer"], model, config["lr"], config.get("weight_decay"))  # 0.1.0 had none


def _look(plan: Plan, model: FusedModel, screen: Screen) -> list[Finding]:
    """What is to be said before the first step: about the data, their parts and the gradients.

    A failed gradient check does not stop the run. The model is hesse's own and its user cannot mend it; an optimiser
    that keeps only steps which lower the loss may still get somewhere; and the finding stays on the page.
    """
    findings = list(plan.data.findings)
    if not len(plan.positions["test"]):
        findings.append(
            Finding(
                "no test rows",
                "split",
                "No row is left for a test, so the score is that of the validation rows, which also chose the epoch.",
                "Take it for too good; add rows, or mark some as test in a split column.",
                severity="info",
            )
        )
    if plan.streamed is None:  # otherwise the training rows at hand are a sample
        findings += unseen_classes(plan.schema, plan.data, plan.positions)
    findings += leaks(plan.schema, plan.data, plan.positions)
    findings += constant_modalities(plan.schema, plan.data, plan.positions)
    screen.findings(findings)
    batch = plan.data.batch(plan.positions["train"][:CHECKED_ROWS])
    # Of the model without its cure: some cures change gradients, which is no fault.
    report = check.gradients(closure(plain(model), loss_of(plan.schema), batch))
    screen.gradient_check(report)
    return [*findings, *report.findings]
