"""Entrants of one task and seed, side by side: after each epoch of the pacemaker all others get the time that it took.

The pacemaker is AdamW at its searched rate, for ten epochs. Interleaved like this, a slow minute of the machine hits
all alike. The clock is the processor time of steps and averaging; drawing a batch and evaluating are outside. All start
from the same weights. What is evaluated are averaged weights, after each of the ten rounds; the round is chosen by
accuracy on validation rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hesse
from benchmarks.multimodal import measures
from benchmarks.multimodal.entrants import CURES, OPTIMIZERS, Entrant
from benchmarks.multimodal.tasks import Data, Task
from hesse.training.average import averaged

__all__ = ["ROUNDS", "Result", "Runner", "race"]

ROUNDS = 10
WARM = 0.05  # seconds
LOOK = 6  # batches of each part that a cure looks at before an epoch
CHUNK = 500  # rows a forward pass where nothing is trained


@dataclass
class Result:
    """One run. ``trace``: a row a round: processor seconds, validation accuracy and loss."""

    task: str
    optimizer: str
    cure: str
    seed: int
    rate: float | None
    accuracy: float = 0.0
    log_loss: float = 0.0
    calibration: float = 0.0
    probes: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0  # processor time
    wall: float = 0.0
    epochs: float = 0.0
    steps: int = 0
    chosen: int = 0
    trace: list[list[float]] = field(default_factory=list)
    alone: dict[str, list[float]] = field(default_factory=dict)  # a modality's own head, if any: validation, test
    shares: dict[str, float] = field(default_factory=dict)  # of hesse's pool
    refused: str | None = None


class Runner:
    """One entrant under way."""

    def __init__(self, task: Task, data: Data, entrant: Entrant, seed: int) -> None:
        self.data, self.size, self.entrant = data, task.batch, entrant
        rate = entrant.rate if entrant.rate == entrant.rate else None
        self.result = Result(task.name, entrant.optimizer, entrant.cure, seed, rate)
        torch.manual_seed(seed)
        model = data.make()
        self.cure = CURES[entrant.cure](model, entrant.optimizer)
        self.optimizer = OPTIMIZERS[entrant.optimizer](self.cure, entrant.rate)
        self.loss = self.cure.loss(F.cross_entropy) if hasattr(self.cure, "loss") else F.cross_entropy
        self.average = averaged(self.cure)
        self.average.module.eval()  # cures answer in eval mode
        self.random = torch.manual_seed(seed).get_state()
        self.batches = self._batches()
        self.best: dict[str, Any] = {}

    def epoch(self) -> float:
        """One epoch; the seconds that it took."""
        before, end = self.result.seconds, self.result.steps + self.steps_an_epoch
        self._go(lambda: self.result.steps < end)
        return self.result.seconds - before

    def spend(self, until: float) -> None:
        """Steps as long as the clock is before ``until``."""
        self._go(lambda: self.result.seconds < until)

    @property
    def steps_an_epoch(self) -> int:
        return -(-len(self.data.parts["train"]) // self.size)

    def evaluate(self) -> None:
        """A row of the trace; the weights are kept if they are the best so far."""
        result = self.result
        part, module = self.data.parts["valid"], self.average.module
        shares = module.fit(F.cross_entropy, part.batches(CHUNK)) if hasattr(module, "fit") else {}
        logits = measures.answers(module, part)
        row = [result.seconds, measures.accuracy(logits, part.labels), measures.log_loss(logits, part.labels)]
        result.trace.append(row)
        if hasattr(self.average.module, "heads"):
            self._by_modality()
        if len(result.trace) == 1 or row[1] > result.trace[result.chosen][1]:
            result.chosen, result.shares = len(result.trace) - 1, shares
            self.best = {name: value.clone() for name, value in self.average.module.state_dict().items()}

    def _by_modality(self) -> None:
        """Accuracy of each modality alone at the round where it is best on validation rows."""
        part = self.data.parts["valid"]
        for key, logits in measures.alone(self.average.module, part).items():
            reached = measures.accuracy(logits, part.labels)
            if reached > self.result.alone.get(key, [0.0])[0]:
                test = self.data.parts["test"]
                told = measures.alone(self.average.module, test)[key]
                self.result.alone[key] = [reached, measures.accuracy(told, test.labels)]

    def finish(self) -> Result:
        """Judge the chosen weights."""
        result, train, test = self.result, self.data.parts["train"], self.data.parts["test"]
        module = self.average.module
        module.load_state_dict(self.best)
        logits = measures.answers(module, test)
        result.accuracy = measures.accuracy(logits, test.labels)
        result.log_loss = measures.log_loss(logits, test.labels)
        result.calibration = measures.calibration_error(logits, test.labels)
        result.probes = measures.probes(getattr(module, "model", module), train, test)
        result.epochs = result.steps / self.steps_an_epoch
        return result

    def _go(self, more: Callable[[], bool]) -> None:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.random)
        while more():
            batch = self.data.parts["train"].batch(next(self.batches))
            wall, cpu = perf_counter(), process_time()
            if self.result.steps % self.steps_an_epoch == 0 and hasattr(self.cure, "begin_epoch"):
                train, valid = (self.data.parts[name].batches(self.size) for name in ("train", "valid"))
                few = slice(None if self.entrant.cure == "PMR" else LOOK)  # prototypes are means of all rows
                self.cure.begin_epoch(F.cross_entropy, train[few], valid[few])
            self.optimizer.step(hesse.closure(self.cure, self.loss, batch))
            self.average.update_parameters(self.cure)
            self.result.wall += perf_counter() - wall
            self.result.seconds += process_time() - cpu
            self.result.steps += 1
        self.random = torch.get_rng_state()
        torch.set_rng_state(outside)

    def _batches(self) -> Iterator[Tensor]:
        order = torch.Generator().manual_seed(self.result.seed)
        while True:
            yield from torch.randperm(len(self.data.parts["train"]), generator=order).split(self.size)


def race(task: Task, pacemaker: Entrant, entrants: Sequence[Entrant], seed: int) -> list[Result]:
    """All entrants of a task and seed, the pacemaker's result first. One that refuses says why and is out."""
    data = task.load(seed)
    for first in {entrant.optimizer: entrant for entrant in entrants}.values():
        with suppress(Exception):  # who refuses does so again below
            Runner(task, data, first, seed).spend(WARM)  # what is loaded at a first step is no optimiser's cost
    leader = Runner(task, data, pacemaker, seed)
    runners, done = [], []
    for entrant in entrants:
        try:
            runners.append(Runner(task, data, entrant, seed))
        except Exception as error:  # noqa: BLE001 - a cure may refuse in any way; its reason is in the table
            done.append(_refused(task, entrant, seed, error))
    for _ in range(ROUNDS):
        leader.epoch()
        leader.evaluate()
        for runner in list(runners):
            try:
                runner.spend(leader.result.seconds)
                runner.evaluate()
            except Exception as error:  # noqa: BLE001 - as above
                runners.remove(runner)
                done.append(_refused(task, runner.entrant, seed, error))
    return [runner.finish() for runner in (leader, *runners)] + done


def _refused(task: Task, entrant: Entrant, seed: int, error: Exception) -> Result:
    reason = f"{type(error).__name__}: {error}"[:300]
    return Result(task.name, entrant.optimizer, entrant.cure, seed, None, refused=reason)
