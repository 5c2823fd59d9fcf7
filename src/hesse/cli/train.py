"""``hesse train``: a table in, a run folder out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hesse.cli.exits import clean_exit, print_json

__all__ = ["pair", "train"]


def train(
    table: Annotated[Path, typer.Argument(help="CSV, TSV, JSON lines or Parquet: a file, or a folder of them.")],
    target: Annotated[list[str], typer.Option(help="The column to predict; repeatable.")],
    out: Annotated[Path | None, typer.Option(help="The run folder.  [default: runs/TABLE-TARGET]")] = None,
    optimizer: Annotated[str, typer.Option(help="kfac, soap, shampoo, adamw, adam, adagrad, sgd or lbfgs.")] = "kfac",
    lr: Annotated[float | None, typer.Option(help="Learning rate; kfac finds its own.")] = None,
    weight_decay: Annotated[
        float | None, typer.Option(min=0, help="Pulls weights to zero.  [default: the optimizer's]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="How many.  [default: at most 40]")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Most seconds of training.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows a step.  [default: a 32nd of the rows, 16 to 512]")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=KIND", help="image, audio, text, number, date, category or ignore; labels for a target."
        ),
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
    ] = "pool",
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Read rows while training.  [default: what memory cannot hold]"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode for --stream.  [default: processors - 1]")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Also train this optimizer for the same time; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the run folder.")] = False,
    seed: Annotated[int, typer.Option(help="Of split, initial weights and order.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Train a model on a table and leave a run folder with the model and a report."""
    columns = dict(pair(item, "--column NAME=KIND", "photo=image") for item in column or ())
    encoders = dict(pair(item, "--encoder NAME=hf:PATH", "photo=hf:./vit", "=hf:") for item in encoder or ())
    shares = dict(pair(item, "--trainable NAME=SHARE", "photo=2") for item in trainable or ())
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


def pair(item: str, form: str, example: str, between: str = "=") -> tuple[str, str]:
    """The name of a column and what is said about it."""
    name, found, said = item.rpartition(between)
    if not found or not name:
        raise typer.BadParameter(f"{form.replace(' ', ' takes ')}, for instance {example}; got {item!r}.")
    return name, between[1:] + said
