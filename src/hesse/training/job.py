"""The main job: a table in, a run folder out.

Read the table, find out what its columns are, check the gradients on real rows, train while watching them, keep the
averaged weights of the best epoch, judge them on rows that were held out, write the page.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hesse.finding import InputError
from hesse.multimodal import Dataset, Schema, Table, encode, make_schema, read_table
from hesse.multimodal.split import Parts
from hesse.multimodal.stream import open_source
from hesse.training import call
from hesse.training.build import build_model, refuse_balance
from hesse.training.checkpoint import CHECKPOINT
from hesse.training.choose import choose_fusion, refuse_fusion
from hesse.training.contribution import contribute
from hesse.training.course import Course, beside, follow
from hesse.training.feed import Feed
from hesse.training.interrupt import interruptible
from hesse.training.loop import Plan
from hesse.training.optimizers import batch_size as usual_batch_size
from hesse.training.optimizers import refuse_optimizer
from hesse.training.owned import owned, refuse_owned
from hesse.training.run import Run, refuse_used
from hesse.training.screen import Screen
from hesse.training.streamed import cells_are_many, decode_large, stream_rows
from hesse.training.team import Team, joined

__all__ = ["decided", "make_plan", "prepare", "train"]

EPOCHS = 40
PATIENCE = 8  # epochs without a better validation loss; the average lags behind, so a few are not yet a verdict


@joined()
def train(
    table: Any,
    target: str | Sequence[str],
    *,
    out: str | os.PathLike[str] | None = None,
    optimizer: str = "kfac",
    lr: float | None = None,
    weight_decay: float | None = None,
    epochs: int | None = None,
    seconds: float | None = None,
    batch_size: int | None = None,
    columns: Mapping[str, str] | None = None,
    encoders: Mapping[str, str] | None = None,
    trainable: Mapping[str, str | int] | None = None,
    split_column: str | None = None,
    class_weights: str | None = None,
    data_root: str | os.PathLike[str] | None = None,
    delimiter: str | None = None,
    skip_bad_rows: bool = False,
    fusion: str = "concat",
    balance: str = "pool",
    stream: bool | None = None,
    workers: int | None = None,
    compare: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    notes: Sequence[str] = (),
    verbose: bool = True,
    on_epoch: Callable[[dict[str, Any]], object] | None = None,
) -> Run:
    """Train a model that predicts ``target`` from the other columns of a table.

    Started by ``torchrun``, several processes share the rows of each batch and take the steps of one. Only the first
    writes and speaks. A run that they resume makes the K-FAC factors anew that other processes than the first kept.

    Args:
        table: a path (CSV, TSV, JSON lines, Parquet; a file or a folder of them) or any data frame with
            ``__arrow_c_stream__`` (pandas, polars, duckdb, pyarrow).
        target: the column to predict: classes, labels (several in a cell: a list, or ``red|round``) or a number. Or
            several columns, which one model predicts together; rows that lack some of them still count for the others.
        out: the run folder; by default ``runs/TABLE-TARGET``.
        optimizer: "kfac" (needs no learning rate), "soap", "shampoo", "adamw", "adam", "adagrad", "sgd" or "lbfgs".
        lr: learning rate, for those that take one; by default torch's.
        weight_decay: pulls the weights to zero; by default the optimiser's own (AdamW's 0.01, otherwise none).
        epochs: how many. By default up to 40, fewer when the validation loss has not improved for 8; no limit when
            ``seconds`` is given.
        seconds: most seconds of training (wall time of the steps; validation is not counted).
        batch_size: rows a step; by default about a 32nd of the training rows, 16 to 512.
        columns: kinds to use instead of those found: column name to "image", "images", "audio", "text", "number",
            "date", "latitude", "longitude", "category" or "ignore"; for a target "category", "labels" or "number".
        encoders: pretrained encoders for columns of pictures, texts or sounds: column name to "hf:" and the folder or
            the name of a checkpoint of transformers.
        trainable: how much of a pretrained encoder trains, by column: "none" (the default; its features are computed
            once), how many of its last blocks, or "all".
        split_column: a column that says train, valid or test; otherwise 80/10/10, stratified by class and seeded.
        class_weights: "balanced" gives rows of rare classes more weight, so that all classes count alike.
        data_root: the folder that paths in cells are relative to and may not leave; by default the table's own.
        delimiter: of a CSV file, when it cannot be told.
        skip_bad_rows: leave out rows with unreadable files instead of raising.
        fusion: how the modalities become one answer: "concat" (side by side), "gated", "bottleneck" (attention),
            "tensor" (products), "late" (each answers for itself), or "auto": whichever has the lowest validation loss
            after a short try of each, on top of ``seconds`` or ``epochs``.
        balance: what keeps a modality that is learnt quickly from starving the others: "pool" (each has a loss of its
            own, and the answer is pooled as validation rows decide), "heads", "gblend", "ogm-ge", "mmpareto", "pmr"
            (:mod:`hesse.multimodal.balance` has a file on each), or "none".
        stream: read the table piece by piece and decode its files while training, instead of all of it before. By
            default so for folders, and where the table or its decoded files would take more than half of the free
            memory.
        workers: processes that decode for a streamed table; by default the processors but one.
        compare: optimisers to train beside it, each from the same start for the same wall time.
        resume: go on with the run in ``out``, with the same table and settings; ``epochs``, ``seconds`` and
            ``compare`` may ask for more than before, and ``data_root``, ``delimiter`` and ``workers`` may differ.
        overwrite: replace a run that is in ``out``.
        seed: of split, initial weights, order of rows.
        notes: sentences to show at the top of the page.
        verbose: progress on stderr.
        on_epoch: called after each epoch with its row of ``metrics.jsonl``. Whatever it raises ends the training, after
            the state has been saved, and is passed on.

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
        weight_decay=weight_decay,
        epochs=epochs,
        seconds=seconds,
        batch_size=batch_size,
        columns=columns,
        encoders=encoders,
        trainable=trainable,
        split_column=split_column,
        class_weights=class_weights,
        data_root=data_root,
        delimiter=delimiter,
        skip_bad_rows=skip_bad_rows,
        fusion=fusion,
        balance=balance,
        stream=stream,
        workers=workers,
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
    if team.first:
        refuse_owned(folder)
    settings = call.DEFAULTS | given
    refuse_optimizer(settings["optimizer"], settings["lr"], settings["weight_decay"])
    refuse_fusion(settings["fusion"])
    refuse_balance(settings["balance"], settings["optimizer"])
    for name in settings["compare"]:
        refuse_optimizer(name)

    source, root, plan = prepare(table, target, settings, screen, team, resumed)
    if resumed is not None:
        settings["fusion"] = resumed.config.get("fusion", "concat")  # what was chosen then
        settings["balance"] = resumed.config.get("balance", "none")
    for name in (settings["optimizer"], *settings["compare"]):
        refuse_balance(settings["balance"], name, plan.schema)
    if settings["fusion"] == "auto":
        settings |= choose_fusion(plan, settings, screen)

    begun = call.record(plan.schema, source) | {"notes": list(notes)} if resumed is None else resumed.config
    config = begun | call.repeated(table, target, given) | settings | decided(plan, settings)
    team.wait()  # until all have seen that the folder may be used
    course = Course(folder, config, plan, on_epoch)
    try:
        with (
            owned(folder, resumed, overwrite) if team.first else nullcontext(),
            torch.random.fork_rng(devices=[]),
            interruptible() as interrupted,
            course.recorded(),
        ):
            state = follow(course, screen, interrupted)
            if state.best and team.first:
                contribute(folder, plan, state, source, root)
            for name in settings["compare"] if state.best else ():
                screen.say(f"for comparison: {name} at its default rate for the same {state.seconds:.1f} s")
                other = beside(course, name, state.seconds)
                with other.recorded():
                    follow(other, screen, interrupted, checked=False)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(folder, table, target, given)) from None
    finally:
        plan.feed.close()
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
    screen.done(run.evaluation, run.compared, plan.schema, state, report)
    return run


def prepare(
    table: Any,
    target: str | Sequence[str],
    settings: Mapping[str, Any],
    screen: Screen,
    team: Team,
    resumed: Run | None = None,
) -> tuple[Table, Path, Plan]:
    """Read a table and its files: the table, the folder that paths are relative to, and the plan of a training."""
    root = Path(settings["data_root"]) if settings["data_root"] else _folder(table)
    understand: Callable[..., tuple[Schema, Parts]] = partial(make_schema, root=root, **call.for_schema(settings))
    of_choice = settings["stream"] is None and resumed is None
    streams = settings["stream"] if resumed is None else resumed.config.get("streamed", False)
    if of_choice:
        streams = team.agreed(cells_are_many(table))
    if not streams:
        source = read_table(table, delimiter=settings["delimiter"])
        schema, parts = understand(source, target, split_column=settings["split_column"])
        streams = of_choice and team.agreed(decode_large(schema, source, root))
    feed: Feed | None = None
    if streams:
        whole = open_source(table, delimiter=settings["delimiter"])
        with screen.decoding("reading files") as progress:
            source, schema, parts, data, feed = stream_rows(
                whole,
                target,
                understand,
                split_column=settings["split_column"],
                root=root,
                seed=settings["seed"],
                skip_bad_rows=settings["skip_bad_rows"],
                workers=settings["workers"],
                progress=progress,
            )
    rows = len(whole) if streams else len(source)
    if resumed is not None:
        _refuse_other_table(resumed, schema, source.name, rows)
    screen.columns(schema, source.name, rows)
    if feed is None:
        with screen.decoding("reading files") as progress:
            data = encode(schema, source, root=root, skip_bad_rows=settings["skip_bad_rows"], progress=progress)
    return source, root, make_plan(settings, schema, data, parts, source.name, team, feed)


def _folder(table: Any) -> Path:
    """That paths in cells are relative to, if no other is named."""
    if not isinstance(table, str | os.PathLike):
        return Path.cwd()
    path = Path(os.fspath(table))
    return path if path.is_dir() else path.parent


def make_plan(
    settings: Mapping[str, Any],
    schema: Schema,
    data: Dataset,
    parts: Mapping[str, Any],
    table: str,
    team: Team | None = None,
    feed: Feed | None = None,
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
        batch_size=settings["batch_size"] or usual_batch_size(settings["optimizer"], len(feed or positions["train"])),
        seed=settings["seed"],
        epochs=EPOCHS if free else settings["epochs"],
        seconds=settings["seconds"],
        patience=PATIENCE if free else None,
        team=team or Team(),
        streamed=feed,
    )


def decided(plan: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says about the plan."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(plan.schema, settings)
    return {
        "batch_size": plan.batch_size,
        "epochs": plan.epochs,
        "patience": plan.patience,
        "split": {name: len(at) for name, at in plan.positions.items()} | {"train": len(plan.feed)},
        **plan.feed.record,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _refuse_other_table(run: Run, schema: Schema, name: str, rows: int) -> None:
    """A run goes on with the rows it began with: rows, target, and every count and statistic must be as they were."""
    if what := run.unlike(schema, rows, exactly=True):
        raise InputError(
            "another table",
            name,
            f"This is not what the run was trained on: {what}.",
            "Resume with the table and target of the run, or train anew with another --out.",
        )


def _how_to_go_on(folder: Path, table: Any, target: str | Sequence[str], given: Mapping[str, Any]) -> str:
    saved = (folder / CHECKPOINT).exists()
    again = call.repeated(table, target, {**given, "out": str(folder), "resume" if saved else "overwrite": True})
    how = again["command"] if isinstance(table, str | os.PathLike) else again["python_call"]
    return f"The run is saved. Go on with: {how}" if saved else f"Nothing was saved yet. Start again with: {how}"
