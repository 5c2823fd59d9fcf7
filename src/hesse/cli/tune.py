"""``hesse tune``: a table in, settings for an optimizer out, with K-FAC beside it, which needs none."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hesse.cli import options
from hesse.cli.exits import clean_exit, print_json

__all__ = ["tune"]


class Sampler(StrEnum):
    """How settings are drawn."""

    tpe = "tpe"
    random = "random"


def tune(
    table: Annotated[Path, typer.Argument(help="CSV, TSV, JSON lines or Parquet: a file, or a folder of them.")],
    target: options.Target,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the search.", show_default="runs/TABLE-TARGET-tune")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    sampler: Annotated[Sampler, typer.Option(help="How settings are drawn.")] = Sampler.tpe,
    optimizer: Annotated[str, typer.Option(help="soap, shampoo, adamw, adam, adagrad, sgd or lbfgs.")] = "adamw",
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each trial.", show_default="at most 40")] = None,
    seconds_per_trial: Annotated[float | None, typer.Option(min=0, help="Of training, instead of epochs.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at once, each in a process of its own.")] = 1,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds after which no trial begins.")] = None,
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the search in the folder.")] = False,
    seed: Annotated[int, typer.Option(help="Of the search and of every training.")] = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Search for an optimizer's settings; train K-FAC once beside it, without a search.

    Searched are the learning rate (adamw, adam: 0.00001 to 0.1; soap, shampoo: 0.0001 to 0.1; adagrad: 0.0001 to 1;
    sgd: 0.00001 to 1; lbfgs: 0.01 to 1), the weight decay (0.000001 to 0.1; not lbfgs) and the rows a step (16 to 512;
    not lbfgs), for the lowest validation loss. Each trial is a run in trials/NUMBER of the folder.
    """
    columns, encoders, shares = options.kinds_of(column), options.encoders_of(encoder), options.shares_of(trainable)
    with clean_exit(as_json):
        from hesse.training.tune import tune as search

        result = search(
            table,
            target,
            out=out,
            trials=trials,
            sampler=sampler.value,
            optimizer=optimizer,
            epochs=epochs,
            seconds_per_trial=seconds_per_trial,
            jobs=jobs,
            timeout=timeout,
            resume=resume,
            overwrite=overwrite,
            seed=seed,
            verbose=not quiet,
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
        )
        if as_json:
            print_json({"ok": True, **result})
