"""The main job: a table in, a run folder out.

Read the table, find out what its columns are, check the gradients on real rows, train while watching them, keep the
averaged weights of the best epoch, judge them on rows that were held out, write the page.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hesse.finding import InputError
from hesse.multimodal import Dataset, Schema, Table, encode, make_schema, read_table
from hesse.training import call
from hesse.training.build import build_model
from hesse.training.checkpoint import CHECKPOINT
from hesse.training.course import Course, beside, follow
from hesse.training.interrupt import interruptible
from hesse.training.loop import Plan
from hesse.training.optimizers import batch_size as usual_batch_size
from hesse.training.optimizers import refuse_optimizer
from hesse.training.run import Run, clear, refuse_used
from hesse.training.screen import Screen
from hesse.training.team import Team, joined

__all__ = ["train"]

EPOCHS = 40
PATIENCE = 8  # epochs without a better validation loss; the average lags behind, so a few are not yet a verdict


@joined()
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

    Started by ``torchrun``, several processes share the rows of each batch and take the steps of one. Only the first
    writes and speaks. A run that they resume makes the K-FAC factors anew that other processes than the first kept.

    Args:
        table: a path (CSV, TSV, JSON lines, Parquet) or any data frame with ``__arrow_c_stream__`` (pandas, polars,
            duckdb, pyarrow).
        target: the column to predict: classes, or a number.
        out: the run folder; by default ``runs/TABLE-TARGET``.
        optimizer: "kfac" (needs no learning rate), "soap", "shampoo", "adamw", "adam", "adagrad", "sgd" or "lbfgs".
        lr: learning rate, for those that take one; by default torch's.
        epochs: how many. By default up to 40, fewer when the validation loss has not improved for 8; no limit when
            ``seconds`` is given.
        seconds: most seconds of training (wall time of the steps; validation is not counted).
        batch_size: rows a step; by default about a 32nd of the training rows, 16 to 512.
        columns: kinds to use instead of those found: column name to "image", "audio", "text", "number", "category"
            or "ignore".
        split_column: a column that says train, valid or test; otherwise 80/10/10, stratified by class and seeded.
        data_root: the folder that paths in cells are relative to and may not leave; by default the table's own.
        delimiter: of a CSV file, when it cannot be told.
        skip_bad_rows: leave out rows with unreadable files instead of raising.
        compare: optimisers to train beside it, each from the same start for the same wall time.
        resume: go on with the run in ``out``, with the same table and settings; ``epochs``, ``seconds`` and
            ``compare`` may ask for more than before.
        overwrite: replace a run that is in ``out``.
        seed: of split, initial weights, order of rows.
        notes: sentences to show at the top of the page.
        verbose: progress on stderr.

    Returns:
        The run: ``.predict(table)``, ``.report()``, ``.evaluation``, ``.folder``.

    Raises:
        InputError: the table or an argument cannot be used, and nothing has been written; or training diverged
            in its first epoch, and there is no model.
        KeyboardInterrupt: after the state has been saved; ``resume=True`` goes on, and ends as if never interrupted.
            The message says how.

    Example:
        >>> import tempfile, pyarrow
        >>> table = pyarrow.table({"weight": [4.0, 21.5, 3.8, 23.5] * 25, "species": ["cat", "dog"] * 50})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = train(table, "species", out=folder + "/pets", epochs=5, verbose=False)
        ...     run.evaluation["value"], run.predict(table)["species"][:2].to_pylist()
        (1.0, ['cat', 'dog'])
    """
    if resume and overwrite:
        raise InputError("two wishes", "resume, overwrite", "A run is resumed or replaced, not both.", "Choose one.")
    given = call.given(
        out=out,
        optimizer=optimizer,
        lr=lr,
        epochs=epochs,
        seconds=seconds,
        batch_size=batch_size,
        columns=columns,
        split_column=split_column,
        data_root=data_root,
        delimiter=delimiter,
        skip_bad_rows=skip_bad_rows,
        compare=compare,
        seed=seed,
    )
    folder = call.default_folder(table, target) if out is None else Path(out)
    team = Team.present()
    screen = Screen(quiet=not (verbose and team.first))
    resumed = Run(folder) if resume else None
    if resumed is None:
        refuse_used(folder, overwrite)
    else:
        given = call.extended(resumed.config, given, folder)
    settings = call.DEFAULTS | given
    refuse_optimizer(settings["optimizer"], settings["lr"])
    for name in settings["compare"]:
        refuse_optimizer(name)

    source = read_table(table, delimiter=settings["delimiter"])
    root = Path(settings["data_root"]) if settings["data_root"] else source.folder or Path.cwd()
    schema, parts = make_schema(
        source,
        target,
        overrides=settings["columns"],
        split_column=settings["split_column"],
        root=root,
        seed=settings["seed"],
    )
    if resumed is not None:
        _refuse_other_table(resumed, schema, source)
    screen.columns(schema, source.name, len(source))
    with screen.decoding("reading files") as progress:
        data = encode(schema, source, root=root, skip_bad_rows=settings["skip_bad_rows"], progress=progress)
    plan = _plan(settings, schema, data, parts, source.name, team)

    begun = call.record(schema, source) | {"notes": list(notes)} if resumed is None else resumed.config
    config = begun | call.repeated(table, target, given) | settings | _decided(plan, settings)
    team.wait()  # until all have seen that the folder may be used
    if overwrite and team.first:
        clear(folder)
    course = Course(folder, config, plan)
    try:
        with torch.random.fork_rng(devices=[]), interruptible() as interrupted, course.recorded():
            state = follow(course, screen, interrupted)
            for name in settings["compare"] if state.best else ():
                screen.say(f"for comparison: {name} at its default rate for the same {state.seconds:.1f} s")
                other = beside(course, name, state.seconds)
                with other.recorded():
                    follow(other, screen, interrupted, checked=False)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(folder, table, target, given)) from None
    team.wait()  # until all is written
    run = Run(folder)
    report = run.report() if team.first else folder / "report.html"
    if not state.best:
        raise InputError(
            "diverged",
            settings["optimizer"],
            f"The validation loss was never a number, so there is no model; {report} shows what happened.",
            "Give a lower --lr, or use kfac, which finds its own."
            if settings["lr"] is not None
            else "Look for extreme values in the columns, or use another --optimizer.",
        )
    screen.done(run.evaluation, run.compared, schema, state, report)
    return run


def _plan(
    settings: Mapping[str, Any], schema: Schema, data: Dataset, parts: Mapping[str, Any], table: str, team: Team
) -> Plan:
    """What was asked for, and where nothing was asked, what suits the number of rows."""
    positions = {name: data.positions(rows) for name, rows in parts.items()}
    for name in ("train", "valid"):
        if not len(positions[name]):
            raise InputError(
                "no rows left",
                table,
                f"No row of the {name} part could be read.",
                "Mend the unreadable rows: without --skip-bad-rows the first of them is named.",
            )
    free = settings["epochs"] is None and settings["seconds"] is None
    return Plan(
        schema,
        data,
        positions,
        batch_size=settings["batch_size"] or usual_batch_size(settings["optimizer"], len(positions["train"])),
        seed=settings["seed"],
        epochs=EPOCHS if free else settings["epochs"],
        seconds=settings["seconds"],
        patience=PATIENCE if free else None,
        team=team,
    )


def _decided(plan: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says about the plan."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(plan.schema, settings)
    return {
        "batch_size": plan.batch_size,
        "epochs": plan.epochs,
        "patience": plan.patience,
        "split": {name: len(at) for name, at in plan.positions.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _refuse_other_table(run: Run, schema: Schema, source: Table) -> None:
    """A run goes on with the rows it began with: rows, target, and every count and statistic must be as they were."""
    if run.schema.target != schema.target:
        what = f"the target was '{run.schema.target}' and is '{schema.target}'"
    elif run.config["rows"] != len(source):
        what = f"it had {run.config['rows']} rows and has {len(source)}"
    elif run.schema != schema:
        changed = [now.name for now, then in zip(schema.columns, run.schema.columns, strict=False) if now != then]
        what = f"the columns have changed ({', '.join(changed[:5]) or 'their number'})"
    else:
        return
    raise InputError(
        "another table",
        source.name,
        f"This is not what the run was trained on: {what}.",
        "Resume with the table and target of the run, or train anew with another --out.",
    )


def _how_to_go_on(folder: Path, table: Any, target: str, given: Mapping[str, Any]) -> str:
    saved = (folder / CHECKPOINT).exists()
    again = call.repeated(table, target, {**given, "out": str(folder), "resume" if saved else "overwrite": True})
    how = again["command"] if isinstance(table, str | os.PathLike) else again["python_call"]
    return f"The run is saved. Go on with: {how}" if saved else f"Nothing was saved yet. Start again with: {how}"
