"""Python that the user named on the command line: found, run, and blamed for its own errors.

What goes wrong in the user's code becomes a sentence with the file and the line; what goes wrong in hesse keeps its
trace.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from hesse.finding import InputError

__all__ = ["attribute", "blame"]


def attribute(target: str, modules: dict[str, ModuleType] | None = None) -> Any:
    """``module:name`` or ``path/to/file.py:name``, imported; a module that is in ``modules`` already is not run again.

    Raises:
        InputError: there is no such module, file or name, or its code fails; with the line.
    """
    modules = {} if modules is None else modules
    place, _, name = target.rpartition(":")
    if not place or not name:
        remedy = "Write module:name, for instance problems:rosenbrock, or path/to/problems.py:rosenbrock."
        raise InputError("no function", target, "There is no colon between a module and a name.", remedy)
    if place not in modules:
        modules[place] = _file(Path(place)) if place.endswith(".py") else _module(place)
    found: Any = modules[place]
    for part in name.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, [n for n in dir(found) if not n.startswith("_")], 3)
            remedy = f"Did you mean {' or '.join(near)}?" if near else "Check the spelling."
            raise InputError("no such name", target, f"There is no {part!r} in {place}.", remedy)
        found = getattr(found, part)
    return found


def _module(name: str) -> ModuleType:
    """A module of the current folder or an installed one."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            blame(error, name)
            raise
        message = f"There is no module {name!r} in {here}, and none is installed."
        remedy = "Run the command in its folder, or give its path: path/to/file.py:function."
        raise InputError("no such module", name, message, remedy) from None
    except (Exception, SystemExit) as error:
        blame(error, name)
        raise


def _file(path: Path) -> ModuleType:
    """A module by its path; its own imports find their neighbours, as if it were run."""
    if not path.is_file():
        raise InputError("missing file", str(path), "There is no such file.", "Check the path.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Data classes and pickles look for their module by its name.
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if sys.modules[path.stem] is module:
            del sys.modules[path.stem]
        blame(error, str(path))
        raise
    return module


def blame(error: BaseException, where: str) -> None:
    """Raise a sentence for what hesse refused, or what the user's own code raised; return for an error of ours."""
    import hesse

    if isinstance(error, InputError) or (isinstance(error, ImportError) and "pip install" in str(error)):
        return
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(hesse.__file__).parent)
    if isinstance(error, TypeError | ValueError) and frames[-1].filename.startswith(ours):
        raise InputError("refused", where, f"{error}") from error
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        raise InputError("error in the code", f"{error.filename}:{error.lineno}", f"{what}.") from error
    theirs = [f for f in frames if not f.filename.startswith((ours, "<frozen")) and not _library(f.filename)]
    if theirs:
        place = f"{theirs[-1].filename}:{theirs[-1].lineno} ({theirs[-1].name})"
        raise InputError("error in the code", place, f"{what}.") from error
    if not frames[-1].filename.startswith(ours):  # torch refuses what a model of its own layers was given
        raise InputError("error in the code", where, f"{what}.") from error


def _library(filename: str) -> bool:
    return any(f"/{name}/" in filename.replace("\\", "/") for name in ("torch", "numpy", "importlib"))
