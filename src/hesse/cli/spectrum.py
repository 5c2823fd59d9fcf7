"""``hesse spectrum``: the curvature of a trained run, as a table, a record and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hesse.cli.exits import clean_exit, print_json, print_text

__all__ = ["spectrum"]


def spectrum(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    split: Annotated[
        str | None, typer.Option(help="train, valid or test; by default test, or valid if there is no test row.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Most rows of it, drawn by the seed.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once: fewer take less memory and more time.")] = 512,
    k: Annotated[int, typer.Option("-k", min=1, help="How many of the largest eigenvalues.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows and the estimates.")] = 0,
    table: Annotated[Path | None, typer.Option(help="The run's table, if it has moved.")] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder that paths in cells are in; by default as in training.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for spectrum.json and .html; by default the run's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Show how the loss of a trained run curves: eigenvalues, trace, density, and each modality's block."""
    with clean_exit(as_json):
        from hesse.training import Run

        record = Run(run).spectrum(
            table=table,
            data_root=data_root,
            split=split,
            rows=rows,
            batch_size=batch_size,
            k=k,
            seed=seed,
            out=out,
            verbose=True,
        )
        page = (run if out is None else out) / "spectrum.html"
        if as_json:
            print_json({"ok": True, "page": str(page), "spectrum": record})
        else:
            print_text(f"{_text(record)}\npage: {page}")


def _text(record: dict[str, Any]) -> str:
    """What the record says, as two tables."""
    from hesse.report.figure import percent
    from hesse.report.spectrum import measured, short

    whole, hessian = record["gauss_newton"], record["hessian"]
    pairs = zip(whole["eigenvalues"], hessian["eigenvalues"], strict=True)
    matrices = [
        ["", "Gauss-Newton", "Hessian"],
        *([f"eigenvalue {i}", measured(a), measured(b)] for i, (a, b) in enumerate(pairs, 1)),
        ["most negative", "–", measured(hessian["lowest"])],
        ["trace", measured(whole["trace"]), measured(hessian["trace"])],
    ]
    everything = {"name": "whole model", "parameters": record["parameters"], "share": 1.0, **whole}
    everything["largest"] = whole["eigenvalues"][0]
    blocks = [
        ["block", "parameters", "trace", "share", "largest", "effective dimension"],
        *(
            [
                " ".join(block["name"].split()),
                f"{block['parameters']:,}",
                measured(block["trace"]),
                "–" if block["share"] is None else percent(block["share"]),
                measured(block["largest"]),
                short(block["effective_dimension"]),
            ]
            for block in (*record["blocks"], everything)
        ),
    ]
    head = f"{record['loss']} {short(record['loss_value'])} on {record['rows']} of {record['available']} "
    head += f"{record['part']} rows, {record['parameters']:,} parameters"
    return "\n".join([head, "", *_aligned(matrices), "", *_aligned(blocks), ""])


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines of columns, the first to the left and the numbers to the right, by what a terminal shows."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        numbers = (" " * (width - cell_len(cell)) + cell for width, cell in zip(widths[1:], rest, strict=True))
        lines.append("  ".join([first + " " * (widths[0] - cell_len(first)), *numbers]))
    return lines
