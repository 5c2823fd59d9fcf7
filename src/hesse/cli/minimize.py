"""``hesse minimize``: a function of a Python file in, its minimiser and the way there out."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from hesse.cli.code import attribute, blame
from hesse.cli.exits import clean_exit, print_json, print_text
from hesse.finding import Finding, InputError

__all__ = ["minimize"]


def minimize(
    function: Annotated[
        str, typer.Argument(metavar="MODULE:FUNCTION", help="What to minimise; or path/to/file.py:function.")
    ],
    x0: Annotated[
        str | None,
        typer.Option(metavar="NUMBERS", help="Start: numbers with commas (-1.2,1), a .npy file, or module:attribute."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="auto (the default), trust-exact, newton, bfgs, l-bfgs-b, gd ...")
    ] = None,
    least_squares: Annotated[bool, typer.Option("--least-squares", help="The function returns residuals.")] = False,
    l1: Annotated[float, typer.Option(min=0, help="Weight of the sum of magnitudes.")] = 0.0,
    l2: Annotated[float, typer.Option(min=0, help="Weight of half the sum of squares.")] = 0.0,
    lower: Annotated[str | None, typer.Option(metavar="NUMBERS", help="Least x: one number, or one each.")] = None,
    upper: Annotated[str | None, typer.Option(metavar="NUMBERS", help="Largest x: one number, or one each.")] = None,
    rtol: Annotated[float | None, typer.Option(help="Share of the decrease that may be left to gain.")] = None,
    atol: Annotated[float, typer.Option(min=0, help="Stop where no element of the gradient is larger.")] = 0.0,
    max_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Most iterations, those before --resume included: 1000, or ten a variable."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float64 (the default) or float32.")] = None,
    arrays: Annotated[bool, typer.Option("--numpy", help="The function takes NumPy arrays, not tensors.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Hold the gradient against a difference first.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Convergence as a figure: .png, .svg or .pdf.")] = None,
    save: Annotated[Path | None, typer.Option(help="Where to save the state (safetensors), to go on from.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on from a saved state, in place of --x0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Minimise a function: print each iteration, then what was found."""
    if (x0 is None) == (resume is None):
        raise typer.BadParameter("Give a start: either --x0 -1.2,1 or --resume STATE.")
    if resume is not None and (arrays or dtype is not None):
        raise typer.BadParameter("--numpy and --dtype are those of the state that --resume goes on from.")
    if dtype not in (None, "float32", "float64"):
        raise typer.BadParameter(f"--dtype is float64 or float32; got {dtype!r}.")
    least_squares = least_squares or method == "lm"
    if least_squares and (check or l1):
        raise typer.BadParameter(f"Least squares do not go with {'--check' if check else '--l1'}.")
    with clean_exit(as_json):
        # What the user's own code prints must not come between the lines of JSON.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            modules: dict[str, ModuleType] = {}
            fun = attribute(function, modules)
            if not callable(fun):
                raise InputError("no function", function, f"It is {_a(fun)}, not a function.", "Name a function of x.")
            start: Any = _start(x0, dtype, arrays, modules) if x0 is not None else _state(resume)
            settings: dict[str, Any] = {"l2": l2, "rtol": rtol, "atol": atol}
            if max_steps is not None:
                settings["max_steps"] = max_steps
            if lower is not None or upper is not None:
                settings["bounds"] = (_side(lower, "--lower"), _side(upper, "--upper"))
            if not least_squares:
                settings |= {"l1": l1, "check": check}
            known = 0 if resume is None else len(start.trace)
            show = _Table(sys.stderr if as_json else sys.stdout, known)
            try:
                if plot is not None:
                    from hesse.minimizers.plot import ready

                    ready(plot)
                result = _solve(fun, start, method, least_squares, settings, show)
            except BrokenPipeError:
                raise
            except Exception as error:
                blame(error, function)
                raise
        show.rest(result.trace)
        if not as_json:  # before the files: a full disk does not lose what was found
            print_text("\n".join(["", repr(result), *_digits(result.x)]))
        if save is not None:
            result.state.save(save)
        if plot is not None and len(result.trace):
            result.trace.plot(plot)
        interrupted = result.status.name == "INTERRUPTED"
        problem = None
        if not result.success:
            kind = "interrupted" if interrupted else "no success"
            remedy = f"Go on with --resume {save} in place of --x0." if save and interrupted else ""
            problem = Finding(kind, "", f"{result.message}.", remedy, "error")
        if as_json:
            print_json(_record(result, problem, plot, save))
        if problem is not None:
            typer.echo(f"hesse: {problem}", err=True)
            raise typer.Exit(130 if interrupted else 1)


def _solve(
    fun: Callable[..., Any],
    start: Any,
    method: str | None,
    least_squares: bool,
    settings: dict[str, Any],
    show: _Table,
) -> Any:
    import hesse
    from hesse.minimizers import State

    if least_squares:
        # A fit goes on by the way that it was begun.
        known = start.method if isinstance(start, State) else "auto"
        return hesse.least_squares(fun, start, method=method or known, **settings)

    def after(intermediate_result: Any) -> None:
        show.rest(intermediate_result.trace)

    return hesse.minimize(fun, start, method=method or "auto", callback=after, **settings)


class _Table:
    """The rows of a trace on a stream, each when it comes."""

    def __init__(self, stream: Any, known: int) -> None:
        self.stream, self.shown, self.headed = stream, known, False

    def rest(self, trace: Any) -> None:
        """Print what has not been printed."""
        if len(trace) > self.shown:
            head, *lines = type(trace)(trace.rows[self.shown :]).table()
            print_text("\n".join(lines if self.headed else [head, *lines]), self.stream)
            self.shown, self.headed = len(trace), True


# --- where to start ---------------------------------------------------------------------------------------------------


def _start(text: str, dtype: str | None, arrays: bool, modules: dict[str, ModuleType]) -> Any:
    """The start: numbers and files as tensors, or as arrays under ``--numpy``; what a module holds as it is."""
    import numpy as np
    import torch

    if text.endswith(".npy"):
        value: Any = _array(Path(text))
    elif ":" in text:
        value = attribute(text, modules)
        if not isinstance(value, int | float | list | tuple):
            if arrays and isinstance(value, torch.Tensor):
                value = value.detach().numpy()
            if dtype is not None and isinstance(value, torch.Tensor | np.ndarray):
                return value.to(getattr(torch, dtype)) if isinstance(value, torch.Tensor) else value.astype(dtype)
            return value
    else:
        value = _numbers(text, "--x0")
    try:
        array = np.asarray(value)
        array = array.astype(dtype or ("float32" if array.dtype == np.float32 else "float64"))
    except (TypeError, ValueError) as error:
        raise InputError("x0", text, f"It holds no numbers: {error}.", "x0 must be real numbers.") from None
    return array if arrays else torch.from_numpy(array)


def _array(path: Path) -> Any:
    import numpy as np

    if not path.is_file():
        raise InputError("missing file", str(path), "There is no such file.", "Check the path.")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError("x0", str(path), f"It is not an array: {error}.", "Write it with numpy.save.") from None
    if array.dtype.kind not in "fiu":
        raise InputError("x0", str(path), f"It holds {array.dtype}.", "x0 must be real numbers.")
    return array


def _numbers(text: str, option: str) -> list[float]:
    parts = [part for part in re.split(r"[,;\s]+", text.strip("[]() \t\n")) if part]
    try:
        found = [float(part) for part in parts]
    except ValueError as error:
        message = f"{error}".replace("could not convert string to float", "not a number") + "."
        remedy = f"Write numbers with commas between them: {option} -1.2,1"
        remedy += ". Or name a .npy file or module:attribute." if option == "--x0" else "."
        raise InputError(option, text, message, remedy) from None
    if not found:
        raise InputError(option, text, "There are no numbers.", f"Write for instance {option} -1.2,1.")
    return found


def _side(text: str | None, option: str) -> Any:
    """A bound: None, a number, or one for each element."""
    import torch

    if text is None:
        return None
    found = _numbers(text, option)
    return found[0] if len(found) == 1 else torch.tensor(found, dtype=torch.float64)


def _state(path: Path | None) -> Any:
    from hesse.minimizers import State

    assert path is not None
    if not path.is_file():
        raise InputError("missing file", str(path), "There is no such state.", "Check the path.")
    try:
        return State.load(path)
    except ValueError as error:
        raise InputError("no state", str(path), f"{error}", "Write it with --save.") from None


# --- what is printed --------------------------------------------------------------------------------------------------


def _a(value: Any) -> str:
    return f"a {type(value).__name__}"


def _digits(x: Any) -> list[str]:
    """x with all its digits, as ``--x0`` reads it; nothing where that would fill the screen."""
    values = _plain(x)
    if not isinstance(values, list) or not 0 < len(values) <= 100 or any(isinstance(v, list) for v in values):
        return []
    return ["", f"x = {','.join('nan' if v is None else repr(v) for v in values)}"]


def _record(result: Any, problem: Finding | None, plot: Path | None, save: Path | None) -> dict[str, Any]:
    """Every field of the result; infinite and missing numbers are null."""
    fields = ("x", "fun", "cost", "jac", "grad", "optimality", "active_mask", "success", "message", "method")
    counts = ("nit", "nfev", "njev", "nhev", "nhvp")
    found = {name: _plain(getattr(result, name)) for name in (*fields, *counts) if hasattr(result, name)}
    return {
        "ok": problem is None,
        **({} if problem is None else {"error": problem.to_dict()}),
        **found,
        "status": int(result.status),
        "status_name": result.status.name.lower(),
        "trace": [_plain(row._asdict()) for row in result.trace],
        "plot": None if plot is None else str(plot),
        "state": None if save is None else str(save),
    }


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or callable(value) or isinstance(value, bool | int | str):
        return None if callable(value) else value
    import numpy as np

    return _plain(np.asarray(value).tolist())
