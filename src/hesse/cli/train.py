"""``hesse train``: a table in, a run folder out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hesse.cli import options
from hesse.cli.exits import clean_exit, print_json

__all__ = ["train"]

TRAINING = "Training"  # a heading in --help


def train(
    table: Annotated[Path, typer.Argument(help="CSV, TSV, JSON lines or Parquet: a file, or a folder of them.")],
    target: options.Target,
    out: Annotated[Path | None, typer.Option(help="The run folder.", show_default="runs/TABLE-TARGET")] = None,
    optimizer: Annotated[
        str,
        typer.Option(help="kfac, soap, shampoo, adamw, adam, adagrad, sgd or lbfgs.", rich_help_panel=TRAINING),
    ] = "kfac",
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate; kfac finds its own.", show_default="the optimizer's", rich_help_panel=TRAINING
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(min=0, help="Pulls weights to zero.", show_default="the optimizer's", rich_help_panel=TRAINING),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="How many.", show_default="at most 40", rich_help_panel=TRAINING)
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Most seconds of training.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rows a step.", show_default="a 32nd of the rows, 16 to 512", rich_help_panel=TRAINING
        ),
    ] = None,
    column: options.Columns = None,
    encoder: options.Encoders = None,
    trainable: options.Trainable = None,
    split_column: options.SplitColumn = None,
    class_weights: options.ClassWeights = None,
    data_root: options.DataRoot = None,
    delimiter: options.Delimiter = None,
    skip_bad_rows: options.SkipBadRows = False,
    fusion: options.Fusion = "concat",
    balance: options.Balance = "pool",
    stream: options.Stream = None,
    workers: options.Workers = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="Also train this optimizer for the same time; repeatable.", rich_help_panel=TRAINING),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the run folder.")] = False,
    seed: Annotated[int, typer.Option(help="Of split, initial weights and order.")] = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a model on a table and leave a run folder with the model and a report."""
    columns, encoders, shares = options.kinds_of(column), options.encoders_of(encoder), options.shares_of(trainable)
    with clean_exit(as_json):
        from hesse.training import train as run_training

        run = run_training(
            table,
            target,
            out=out,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            epochs=epochs,
            seconds=seconds,
            batch_size=batch_size,
            columns=columns,
            encoders=encoders,
            trainable=shares,
            split_column=split_column,
            class_weights=class_weights,
            data_root=data_root,
            delimiter=delimiter,
            skip_bad_rows=skip_bad_rows,
            fusion=fusion,
            balance=balance,
            stream=stream,
            workers=workers,
            compare=compare or (),
            resume=resume,
            overwrite=overwrite,
            seed=seed,
            verbose=not quiet,
        )
        if as_json and os.environ.get("RANK", "0") == "0":  # of several processes the first
            print_json(
                {
                    "ok": True,
                    "out": str(run.folder),
                    "report": str(run.folder / "report.html"),
                    "status": run.config["status"],
                    "evaluation": run.evaluation,
                    "findings": run.findings,
                }
            )
