"""``hesse check``: are the derivatives of a model, of a function or of an optimiser right?"""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from typing import Annotated, Any

import typer

from hesse.cli.code import attribute, blame
from hesse.cli.exits import clean_exit, print_json, print_text
from hesse.cli.target import target

__all__ = ["check"]


def check(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A function without arguments that returns (model, inputs) or (model, loss_fn, data); or an optimizer "
            "class; or path/to/file.py:factory.",
        ),
    ],
    second_order: Annotated[
        bool, typer.Option("--second-order", help="Second derivatives and forward mode too.")
    ] = False,
    parts: Annotated[
        bool, typer.Option("--parts", help="Every module by itself, even where the whole gradient agrees.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random directions.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON on stdout.")] = False,
) -> None:
    """Compare derivatives with differences; say which module, function and line is wrong."""
    with clean_exit(as_json):
        # What the user's own code prints must not come between the lines of JSON.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            reports = _reports(factory, second_order, parts, seed)
        ok = all(report.ok for report in reports)
        if as_json:
            print_json({"ok": ok, "reports": [report.to_dict() for report in reports]})
        else:
            print_text("\n\n".join(map(str, reports)))
        if not ok:
            raise typer.Exit(1)


def _reports(factory: str, second_order: bool, parts: bool, seed: int) -> list[Any]:
    from torch.optim import Optimizer

    import hesse

    found = attribute(factory)
    try:
        if isinstance(found, type) and issubclass(found, Optimizer):
            return [hesse.check.optimizer(found)]
        what = target(factory)
        model, inputs = what.subject()
        settings = {"jac": what.jac} if what.jac is not None else {}
        reports = [hesse.check.gradients(model, inputs, seed=seed, parts=parts, **settings)]
        if second_order and reports[0].ok:
            settings = {"hess": what.hess} if what.hess is not None else {}
            reports.append(hesse.check.hessian(model, inputs, seed=seed, **settings))
    except Exception as error:
        blame(error, factory)
        raise
    return reports
