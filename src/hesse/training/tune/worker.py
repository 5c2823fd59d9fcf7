"""A process that trains one trial after the other, and the wire to it: a line of JSON each way.

The table is read and its files decoded once, then every order is a training in a folder of its own. The process that
searches starts workers, and outlives them: one that is killed, by lack of memory for instance, costs its trial only.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

from hesse.finding import InputError
from hesse.training import call
from hesse.training.build import build_model, refuse_balance
from hesse.training.choose import choose_fusion, refuse_fusion
from hesse.training.course import Course, follow
from hesse.training.job import decided, prepare
from hesse.training.loop import Plan, batches, start, take_step
from hesse.training.optimizers import batch_size, make_optimizer
from hesse.training.run import Run
from hesse.training.screen import Screen
from hesse.training.team import Team

__all__ = ["Worker", "main"]

START = "from hesse.training.tune.worker import main; main()"


class Worker:
    """The process, seen from the one that searches.

    Args:
        task: ``table``, a path; ``name``, the path to be recorded or None; ``target`` and ``settings``.
        threads: that it may use.
        events: gets ``(worker, event)`` for every line that the worker writes, ``(worker, None)`` when it has ended.
    """

    def __init__(
        self, task: dict[str, Any], threads: int, events: queue.Queue[tuple[Worker, dict[str, Any] | None]]
    ) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - stderr, until end(), for the case that it dies
        self.process = subprocess.Popen(
            [sys.executable, "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env={
                "GOMP_SPINCOUNT": "5000",  # as for the command: threads of several workers wait for each other
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            start_new_session=True,  # Ctrl-C is for the search, which ends its workers
        )
        self._events = events
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.send(task)

    def send(self, message: dict[str, Any]) -> None:
        """A line to the worker; if it has ended, the event of its end tells so."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return

    def end(self) -> None:
        """Stop the process, whatever it does, and those that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdout.close()
        with suppress(BrokenPipeError):  # what was not flushed
            self.process.stdin.close()
        self.said.close()

    def bury(self) -> str:
        """Put away what is left of a worker that has ended: with which code, and with which last line on stderr."""
        code = self.process.wait()
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        self.end()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"The worker {how}" + (f": {lines[-1][:300]}" if lines else ".")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put((self, json.loads(line)))
        self._events.put((self, None))


class Pruned(Exception):
    """The search has seen enough of a trial."""


def main() -> None:
    """The worker's own side."""
    wire = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed must not get onto the wire

    def send(event: str, **values: Any) -> None:
        wire.write(json.dumps({"event": event, **values}, allow_nan=False) + "\n")
        wire.flush()

    task = _receive(sys.stdin)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    settings, screen = call.DEFAULTS | task["settings"], Screen(quiet=True)
    try:
        refuse_fusion(settings["fusion"])
        source, _, plan = prepare(task["table"], task["target"], settings, screen, Team())
        for name in (settings["optimizer"], "kfac"):  # which is trained beside the search
            refuse_balance(settings["balance"], name, plan.schema)
        if settings["fusion"] == "auto":
            settings |= choose_fusion(plan, settings, screen)
    except InputError as error:
        send("refused", finding=error.finding.to_dict())
        return
    record = call.record(plan.schema, source)
    digest = hashlib.sha256(json.dumps(plan.schema.to_json(), sort_keys=True).encode()).hexdigest()
    send("ready", train=len(plan.feed), schema=digest, record=record)
    while True:
        order = _receive(sys.stdin)
        now = settings | order["settings"] | {"out": order["folder"]}
        given = {name: value for name, value in now.items() if value != call.DEFAULTS.get(name)}
        own = _plan(plan, now)
        config = record | {"notes": []} | call.repeated(task["name"], task["target"], given) | now | decided(own, now)
        if not order["asks"]:
            _warm(own, now)
        try:
            send("done", **_train(Course(Path(order["folder"]), config, own, _asking(send) if order["asks"] else None)))
        except Pruned:
            send("pruned")


def _receive(stream: IO[str]) -> dict[str, Any]:
    """The next line; the end of the stream is the end of the search, and of this process."""
    line = stream.readline()
    if not line:
        raise SystemExit
    message: dict[str, Any] = json.loads(line)
    return message


def _plan(plan: Plan, settings: dict[str, Any]) -> Plan:
    """The plan of one training on the rows of ``plan``."""
    rows = settings["batch_size"] or batch_size(settings["optimizer"], len(plan.feed))
    if settings["seconds"] is None:
        return replace(plan, batch_size=rows)
    return replace(plan, batch_size=rows, seconds=settings["seconds"], epochs=None, patience=None)


def _asking(send: Callable[..., None]) -> Callable[[dict[str, Any]], None]:
    """Called after each epoch: tell, and stop if the answer is so."""

    def ask(row: dict[str, Any]) -> None:
        loss = row["valid_loss"]
        send(
            "epoch",
            epochs=row["epoch"],
            seconds=row["seconds"],
            value=loss if torch.tensor(loss).isfinite() else None,
        )
        if not _receive(sys.stdin)["go on"]:
            raise Pruned

    return ask


def _warm(plan: Plan, settings: dict[str, Any]) -> None:
    """One step that nobody keeps: an optimiser's first step in a process loads code, for a second, and the trials that
    it is held against had theirs loaded before.
    """
    with torch.random.fork_rng(devices=[]):
        model = build_model(plan.schema, settings)
        state = start(model, make_optimizer(settings["optimizer"], model, settings["lr"]))
        with state.monitor:
            take_step(plan, state, next(batches(plan, state)))


def _train(course: Course) -> dict[str, Any]:
    """Train, judge, and say what came out."""
    with torch.random.fork_rng(devices=[]), course.recorded():
        state = follow(course, Screen(quiet=True), threading.Event(), checked=False)
    evaluation = Run(course.folder).evaluation
    return {
        "value": state.best_loss if state.best else None,
        "seconds": state.seconds,
        "epochs": state.epoch,
        "score": evaluation.get("value"),
        "judged": {name: evaluation.get(name) for name in ("score", "part", "baseline")},
    }
