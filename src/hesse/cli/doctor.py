"""``hesse doctor``: what is wrong with a model that does not train, where, and what to do, on one page."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hesse.cli.code import blame
from hesse.cli.exits import clean_exit, print_json, print_text
from hesse.cli.target import Target, target

if TYPE_CHECKING:
    from hesse.doctor import Diagnosis

__all__ = ["doctor"]


def doctor(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A function without arguments that returns (model, loss_fn, data), with an optimizer as a fourth if "
            "you like, or (model, inputs) of a model that computes its loss; or path/to/file.py:factory.",
        ),
    ],
    steps: Annotated[int, typer.Option(min=1, help="Most steps of the training.")] = 100,
    seconds: Annotated[float, typer.Option(min=0.1, help="Most seconds of the training.")] = 30.0,
    out: Annotated[Path | None, typer.Option(help="HTML page to write; by default none.")] = None,
    second_order: Annotated[
        bool, typer.Option("--second-order", help="Check second derivatives and forward mode, too.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random directions.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as JSON on stdout.")] = False,
) -> None:
    """Check derivatives, train a little, look at the curvature; say what is wrong, where and what to do."""
    with clean_exit(as_json):
        # What the user's own code prints must not come between the lines of JSON.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            diagnosis = _visit(factory, steps, seconds, second_order, seed)
            page = None if out is None else diagnosis.save(out)
        if as_json:
            print_json({**diagnosis.to_dict(), "page": None if page is None else str(page)})
        else:
            print_text(str(diagnosis) + ("" if page is None else f"\n\npage: {page}"))
        if not diagnosis.ok:
            raise typer.Exit(1)


def _visit(factory: str, steps: int, seconds: float, second_order: bool, seed: int) -> Diagnosis:
    from hesse.doctor import diagnose

    what = target(factory)
    try:
        model, loss_fn, data = _parts(what)
        return diagnose(
            model,
            loss_fn,
            data,
            what.optimizer,
            steps=steps,
            seconds=seconds,
            second_order=second_order,
            seed=seed,
        )
    except Exception as error:
        blame(error, factory)
        raise


def _parts(what: Target) -> tuple[Any, Any, Any]:
    """Model, loss function and batches; a closure brings its own, a model that computes its loss has no function."""
    from hesse.objective import Closure

    if isinstance(what.model, Closure):
        objective = what.model.objective
        return what.model.model, what.model.loss_fn, [(objective.inputs, objective.targets)]
    if what.loss_fn is None:
        return what.model, None, [what.inputs]
    return what.model, what.loss_fn, what.data
