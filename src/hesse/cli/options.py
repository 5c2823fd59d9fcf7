"""Options that several commands have, each said once: of a table, of a model, and of what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AsJson",
    "Balance",
    "ClassWeights",
    "Columns",
    "DataRoot",
    "Delimiter",
    "Encoders",
    "Fusion",
    "Quiet",
    "SkipBadRows",
    "SplitColumn",
    "Stream",
    "Target",
    "Trainable",
    "Workers",
    "encoders_of",
    "kinds_of",
    "shares_of",
]

TABLE, MODEL = "Table", "Model"  # headings in --help

Target = Annotated[list[str], typer.Option(help="The column to predict; repeatable.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=KIND",
        help="image, images, audio, text, number, date, latitude, longitude, category or ignore; of a target category, "
        "labels or number; repeatable.",
        show_default="by looking at the cells",
        rich_help_panel=TABLE,
    ),
]
SplitColumn = Annotated[
    str | None,
    typer.Option(
        help="Column that says train, valid or test.", show_default="80/10/10 by class", rich_help_panel=TABLE
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder that paths in cells are in.", show_default="the table's", rich_help_panel=TABLE),
]
Delimiter = Annotated[str | None, typer.Option(help="Of a CSV file, when it cannot be told.", rich_help_panel=TABLE)]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out unreadable rows.", rich_help_panel=TABLE)]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Read rows while training.",
        show_default="what memory cannot hold",
        rich_help_panel=TABLE,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Processes that decode for --stream.",
        show_default="processors - 1",
        rich_help_panel=TABLE,
    ),
]
Encoders = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=hf:PATH",
        help="A pretrained encoder for a column: folder or name; repeatable.",
        rich_help_panel=MODEL,
    ),
]
Trainable = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=SHARE",
        help="How much of it trains: none, all or how many blocks; repeatable.",
        show_default="none",
        rich_help_panel=MODEL,
    ),
]
ClassWeights = Annotated[
    str | None, typer.Option(help="balanced: rows of rare classes weigh more.", rich_help_panel=MODEL)
]
Fusion = Annotated[
    str, typer.Option(help="concat, gated, bottleneck, tensor, late, or auto (tries all).", rich_help_panel=MODEL)
]
Balance = Annotated[
    str,
    typer.Option(
        help="pool, heads, gblend, ogm-ge, mmpareto, pmr: against modalities that starve; or none.",
        rich_help_panel=MODEL,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


def kinds_of(items: Sequence[str] | None) -> dict[str, str]:
    """What ``--column`` says, by column."""
    return dict(_pair(item, "--column NAME=KIND", "photo=image") for item in items or ())


def encoders_of(items: Sequence[str] | None) -> dict[str, str]:
    """What ``--encoder`` says, by column."""
    return dict(_pair(item, "--encoder NAME=hf:PATH", "photo=hf:./vit", "=hf:") for item in items or ())


def shares_of(items: Sequence[str] | None) -> dict[str, str]:
    """What ``--trainable`` says, by column."""
    return dict(_pair(item, "--trainable NAME=SHARE", "photo=2") for item in items or ())


def _pair(item: str, form: str, example: str, between: str = "=") -> tuple[str, str]:
    """The name of a column and what is said about it."""
    name, found, said = item.rpartition(between)
    if not found or not name:
        raise typer.BadParameter(f"{form.replace(' ', ' takes ')}, for instance {example}; got {item!r}.")
    return name, between[1:] + said
