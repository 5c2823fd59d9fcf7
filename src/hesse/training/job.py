"""The main job: a table in, a run folder out.

Read the table, find out what its columns are, check the gradients on real rows, train while watching them, keep the
averaged weights of the best epoch, judge them on rows that were held out, write the page.
"""

from __future__ import annotations

import os
import platform
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import hesse
from hesse import check
from hesse.files import write_json
from hesse.finding import Finding, InputError
from hesse.multimodal import Dataset, FusedModel, Schema, Table, encode, make_schema, read_table
from hesse.objective import closure
from hesse.training import checkpoint
from hesse.training.evaluate import LOSSES, SCORES, evaluate
from hesse.training.loop import Plan, State, batches, finished, judge, out_of_time, start, take_step
from hesse.training.optimizers import make_optimizer
from hesse.training.run import Run, clear, write_model
from hesse.training.screen import Screen

__all__ = ["train"]

EPOCHS = 40
PATIENCE = 8  # epochs without a better validation loss; the average lags behind, so a few are not yet a verdict
CHECKED_ROWS = 32  # of the first batch, for the gradient check: derivatives are wrong for few rows as for many


def train(
    table: Any,
    target: str,
    *,
    out: str | os.PathLike[str] | None = None,
    optimizer: str = "kfac",
    lr: float | None = None,
    epochs: int | None = None,
    seconds: float | None = None,
    batch_size: int | None = None,
    columns: Mapping[str, str] | None = None,
    split_column: str | None = None,
    data_root: str | os.PathLike[str] | None = None,
    delimiter: str | None = None,
    skip_bad_rows: bool = False,
    compare: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    notes: Sequence[str] = (),
    verbose: bool = True,
) -> Run:
    """Train a model that predicts ``target`` from the other columns of a table.

    Args:
        table: a path (CSV, TSV, JSON lines, Parquet) or any data frame with ``__arrow_c_stream__`` (pandas, polars,
            duckdb, pyarrow).
        target: the column to predict: classes, or a number.
        out: the run folder; by default ``runs/NAME-TARGET``.
        optimizer: "kfac" (needs no learning rate), "adamw", "adam", "adagrad", "sgd" or "lbfgs".
        lr: learning rate, for those that take one; by default torch's.
        epochs: most epochs. By default 40, or no limit when ``seconds`` is given.
        seconds: most seconds of training (wall time of the steps; validation is not counted).
        batch_size: rows a step; by default about a 32nd of the training rows, 16 to 512.
        columns: kinds to use instead of those found: column name to "image", "audio", "text", "number", "category"
            or "ignore".
        split_column: a column that says train, valid or test; otherwise 80/10/10, stratified by class and seeded.
        data_root: the folder that paths in cells are relative to and may not leave; by default the table's own.
        delimiter: of a CSV file, when it cannot be told.
        skip_bad_rows: leave out rows with unreadable files instead of raising.
        compare: optimisers to train beside it, each from the same start for the same wall time.
        resume: go on with the run in ``out``: only ``table``, ``target`` and ``epochs``, ``seconds`` matter then.
        overwrite: replace a run that is in ``out``.
        seed: of split, initial weights, order of rows.
        notes: sentences to show at the top of the page.
        verbose: progress on stderr.

    Returns:
        The run: ``.predict(table)``, ``.report()``, ``.evaluation``, ``.folder``.

    Raises:
        InputError: the table or an argument cannot be used; nothing is half-written.
        KeyboardInterrupt: after the state has been saved; ``resume=True`` goes on, and ends as if never interrupted.

    Example:
        >>> import tempfile, pyarrow
        >>> table = pyarrow.table({"weight": [4.0, 21.5, 3.8, 23.5] * 25, "species": ["cat", "dog"] * 50})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = train(table, "species", out=folder + "/pets", epochs=5, verbose=False)
        ...     run.evaluation["value"], run.predict(table)["species"][:2].to_pylist()
        (1.0, ['cat', 'dog'])
    """
    screen = Screen(quiet=not verbose)
    if compare and resume:
        raise InputError("two wishes", "compare", "A resumed run keeps its comparison.", "Leave out compare.")
    source = read_table(table, delimiter=delimiter)
    folder = Path(out) if out is not None else Path("runs") / f"{Path(source.name).stem}-{target}"
    root = Path(data_root) if data_root is not None else source.folder or Path.cwd()

    if resume:
        config, schema, parts = _resumed(folder, source, root, target, epochs, seconds)
    else:
        _refuse_used(folder, overwrite)
        for name in (optimizer, *compare):
            make_optimizer(name, torch.nn.Linear(1, 1), lr if name == optimizer else None)  # refuse before reading
        overrides = dict(columns or {})
        schema, parts = make_schema(
            source, target, overrides=overrides, split_column=split_column, root=root, seed=seed
        )
        call = {
            "table": str(table) if isinstance(table, str | os.PathLike) else source.name,
            "target": target,
            "out": str(folder),
            "optimizer": optimizer,
            "lr": lr,
            "epochs": epochs,
            "seconds": seconds,
            "batch_size": batch_size,
            "columns": overrides,
            "split_column": split_column,
            "data_root": None if data_root is None else str(data_root),
            "delimiter": delimiter,
            "skip_bad_rows": skip_bad_rows,
            "compare": list(compare),
            "seed": seed,
        }
        config = _config(call, schema, source, notes)
    screen.columns(schema, source.name, len(source))

    with screen.decoding("reading files") as progress:
        data = encode(schema, source, root=root, skip_bad_rows=config["skip_bad_rows"], progress=progress)
    plan = _plan(config, schema, data, parts)
    if overwrite and not resume:
        clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _own_random_numbers(), _interruptible() as interrupted:
        state = _started(config, plan, screen)
        config["parameters"] = sum(p.numel() for p in state.model.parameters())
        if resume:
            checkpoint.restore(folder, state)
        write_json(folder / "columns.json", schema.to_json())
        _train(folder, config, plan, state, screen, interrupted)
        if not resume:
            for name in config["compare"]:
                _beside(folder, config, plan, state.seconds, name, screen, interrupted)
    run = Run(folder)
    screen.done(run.evaluation, run.report(), state)
    return run


def _train(
    folder: Path, config: dict[str, Any], plan: Plan, state: State, screen: Screen, interrupted: threading.Event
) -> None:
    """From wherever ``state`` is to the end, with everything on disk after each epoch."""
    write_json(folder / "config.json", {**config, "status": "running"})
    with state.monitor, screen.training(plan, config["optimizer"]) as bar:
        while not finished(plan, state):
            order, hidden = batches(plan, state.epoch)
            for rows, mask in list(zip(order, hidden.split(plan.batch_size), strict=True))[state.batch :]:
                bar.step(state, take_step(plan, state, rows, mask))
                if interrupted.is_set():
                    checkpoint.save(folder, state)
                    write_json(folder / "config.json", {**config, "status": "interrupted"})
                    raise KeyboardInterrupt
                if out_of_time(plan, state):
                    break
            bar.epoch(judge(plan, state), SCORES[plan.schema.task])
            checkpoint.save(folder, state)
            write_model(folder, state.best)
    part = "test" if len(plan.positions["test"]) else "valid"
    best = state.average.module
    current = {name: tensor.clone() for name, tensor in best.state_dict().items()}
    best.load_state_dict(state.best)
    write_json(folder / "evaluation.json", evaluate(plan.schema, best, plan.data, plan.positions, part))
    best.load_state_dict(current)
    write_json(folder / "config.json", {**config, "status": "finished"})


def _beside(
    folder: Path,
    config: dict[str, Any],
    plan: Plan,
    seconds: float,
    name: str,
    screen: Screen,
    interrupted: threading.Event,
) -> None:
    """Train another optimiser from the same start for the same wall time, into ``compare/NAME``."""
    other = {**config, "optimizer": name, "lr": None, "epochs": None, "seconds": seconds, "compare": []}
    timed = Plan(plan.schema, plan.data, plan.positions, plan.batch_size, plan.seed, None, seconds, patience=None)
    state = _started(other, timed, None)
    place = folder / "compare" / name
    place.mkdir(parents=True, exist_ok=True)
    screen.say(f"for comparison: {name} at its default rate for the same {seconds:.1f} s")
    _train(place, other, timed, state, screen, interrupted)


def _started(config: dict[str, Any], plan: Plan, screen: Screen | None) -> State:
    """Model, optimiser and state from the seed; with a screen, the gradients are checked before the first step."""
    torch.manual_seed(config["seed"])
    model = FusedModel(plan.schema.model_settings(), plan.schema.outputs)
    earlier: list[Finding] = []
    if screen is not None:
        inputs, targets = plan.data.batch(plan.positions["train"][:CHECKED_ROWS])
        report = check.gradients(closure(model, LOSSES[plan.schema.task], (inputs, targets)))
        screen.gradient_check(report)
        earlier = [*plan.data.findings, *report.findings]
        screen.findings(plan.data.findings)
    return start(model, make_optimizer(config["optimizer"], model, config["lr"]), earlier)


def _plan(config: dict[str, Any], schema: Schema, data: Dataset, parts: Mapping[str, Any]) -> Plan:
    positions = {name: data.positions(rows) for name, rows in parts.items()}
    for name in ("train", "valid"):
        if not len(positions[name]):
            raise InputError(
                "no rows left",
                config["table"],
                f"No row of the {name} part could be read.",
                "Mend the unreadable rows that the findings list.",
            )
    config["split"] = {name: len(at) for name, at in positions.items()}
    if config["batch_size"] is None:
        config["batch_size"] = _batch_size(len(positions["train"]))
    if config["epochs"] is None and config["seconds"] is None:
        config["epochs"] = EPOCHS
    patience = PATIENCE if config["seconds"] is None else None
    return Plan(
        schema,
        data,
        positions,
        config["batch_size"],
        config["seed"],
        config["epochs"],
        config["seconds"],
        patience,
    )


def _batch_size(rows: int) -> int:
    """The power of two next to a 32nd of the rows, 16 to 512: an epoch is about 32 steps."""
    return min(512, max(16, 1 << (max(1, rows // 32) - 1).bit_length()))


def _config(call: dict[str, Any], schema: Schema, source: Table, notes: Sequence[str]) -> dict[str, Any]:
    """The record ``config.json``: the call, the versions, and how to repeat it."""
    return {
        "hesse": hesse.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(call),
        "python_call": _python(call),
        **call,
        "rows": len(source),
        "task": schema.task,
        "classes": list(schema.classes),
        "modalities": [
            {
                "key": key,
                "name": columns[0].name if key != "columns" else "columns",
                "kind": columns[0].kind if key != "columns" else "columns",
            }
            for key, columns in schema.modalities.items()
        ],
        "notes": list(notes),
    }


def _given(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments that were not left at their defaults, table and target apart."""
    return {name: v for name, v in call.items() if name not in ("table", "target") and v not in (None, {}, [], False)}


def _command(call: dict[str, Any]) -> str:
    words = ["hesse", "train", call["table"], "--target", call["target"]]
    for name, value in _given(call).items():
        option = "--" + name.replace("_", "-")
        if name == "columns":
            words += [word for column, kind in value.items() for word in ("--column", f"{column}={kind}")]
        elif isinstance(value, list):
            words += [word for item in value for word in (option, item)]
        else:
            words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


def _python(call: dict[str, Any]) -> str:
    arguments = [repr(call["table"]), f"target={call['target']!r}"]
    return f"hesse.train({', '.join(arguments + [f'{name}={value!r}' for name, value in _given(call).items()])})"


def _refuse_used(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError("not a folder", str(folder), "The place for the run is a file.", "Choose another --out.")
    if (folder / "config.json").exists() and not overwrite:
        raise InputError(
            "run exists",
            str(folder),
            "There is a run in this folder already.",
            "Go on with it (--resume), replace it (--overwrite), or choose another --out.",
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise InputError(
            "folder in use",
            str(folder),
            "The folder holds other files, among which a run would get lost.",
            "Choose a new or empty folder.",
        )


def _resumed(
    folder: Path, source: Table, root: Path, target: str, epochs: int | None, seconds: float | None
) -> tuple[dict[str, Any], Schema, Mapping[str, Any]]:
    """Configuration and schema as they were; the rows' parts are drawn again, from the same seed."""
    run = Run(folder)
    config = run.config
    if (target, len(source)) != (config["target"], config["rows"]):
        raise InputError(
            "another table",
            source.name,
            f"The run was trained on {config['rows']} rows to predict {config['target']!r}; "
            f"this is {len(source)} rows and {target!r}.",
            "Resume with the table and target of the run, or train anew with another --out.",
        )
    _, parts = make_schema(
        source,
        target,
        overrides=config["columns"],
        split_column=config["split_column"],
        root=root,
        seed=config["seed"],
    )
    if epochs is not None or seconds is not None:
        config |= {"epochs": epochs, "seconds": seconds}
    return config, run.schema, parts


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Leave the caller's random generator as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that the step under way is finished and saved; a second Ctrl-C stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield event
        return

    def note(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
