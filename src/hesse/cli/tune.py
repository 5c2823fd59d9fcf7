"""``hesse tune``: a table in, settings for an optimizer out, with K-FAC beside it, which needs none."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hesse.cli.exits import clean_exit, print_json
from hesse.cli.train import pair

__all__ = ["tune"]


class Sampler(StrEnum):
    """How settings are drawn."""

    tpe = "tpe"
    random = "random"


def tune(
    table: Annotated[Path, typer.Argument(help="CSV, TSV, JSON lines or Parquet.")],
    target: Annotated[list[str], typer.Option(help="The column to predict; repeatable.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder of the search.  [default: runs/TABLE-TARGET-tune]")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    sampler: Annotated[Sampler, typer.Option(help="How settings are drawn.")] = Sampler.tpe,
    optimizer: Annotated[str, typer.Option(help="soap, shampoo, adamw, adam, adagrad, sgd or lbfgs.")] = "adamw",
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each trial.  [default: at most 40]")] = None,
    seconds_per_trial: Annotated[float | None, typer.Option(min=0, help="Of training, instead of epochs.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at once, each in a process of its own.")] = 1,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds after which no trial begins.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=KIND", help="image, audio, text, number, category or ignore; repeatable."),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=hf:PATH", help="A pretrained encoder for a column: folder or name; repeatable."),
    ] = None,
    trainable: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SHARE", help="How much of it trains: none, all or how many blocks; repeatable."),
    ] = None,
    split_column: Annotated[
        str | None, typer.Option(help="Column that says train, valid or test.  [default: 80/10/10 by class]")
    ] = None,
    class_weights: Annotated[str | None, typer.Option(help="balanced: rows of rare classes weigh more.")] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder that paths in cells are in.  [default: the table's]")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="Of a CSV file, when it cannot be told.")] = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out unreadable rows.")] = False,
    fusion: Annotated[
        str, typer.Option(help="concat, gated, bottleneck, tensor, late, or auto (tries all).")
    ] = "concat",
    balance: Annotated[
        str, typer.Option(help="pool, heads, gblend, ogm-ge, mmpareto, pmr: against modalities that starve; or none.")
    ] = "none",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the search in the folder.")] = False,
    seed: Annotated[int, typer.Option(help="Of the search and of every training.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Search for an optimizer's settings; train K-FAC once beside it, without a search.

    Searched are the learning rate (adamw, adam: 0.00001 to 0.1; soap, shampoo: 0.0001 to 0.1; adagrad: 0.0001 to 1;
    sgd: 0.00001 to 1; lbfgs: 0.01 to 1), the weight decay (0.000001 to 0.1; not lbfgs) and the rows a step (16 to 512;
    not lbfgs), for the lowest validation loss. Each trial is a run in trials/NUMBER of the folder.
    """
    columns = dict(pair(item, "--column NAME=KIND", "photo=image") for item in column or ())
    encoders = dict(pair(item, "--encoder NAME=hf:PATH", "photo=hf:./vit", "=hf:") for item in encoder or ())
    shares = dict(pair(item, "--trainable NAME=SHARE", "photo=2") for item in trainable or ())
    with clean_exit(as_json):
        from hesse.training.tune import tune as search

        result = search(
            table,
            target if len(target) > 1 else target[0],
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
        )
        if as_json:
            print_json({"ok": True, **result})
