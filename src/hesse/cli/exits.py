"""How a command ends: a clear sentence and an exit code, whatever happened."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

import typer

from hesse.files import FULL
from hesse.finding import Finding, InputError

__all__ = ["clean_exit", "print_json", "print_text", "refuse"]


@contextmanager
def clean_exit(as_json: bool = False) -> Iterator[None]:
    """Turn refusals into exit code 1 and Ctrl-C into 130, each with a sentence on stderr (and, if wanted, JSON)."""
    try:
        yield
    except InputError as error:
        refuse(error.finding, 1, as_json)
    except ImportError as error:
        if "pip install" not in str(error):  # not a library of an extra: a fault of ours, which keeps its trace
            raise
        refuse(Finding("missing library", error.name or "", str(error), severity="error"), 1, as_json)
    except BrokenPipeError:  # the reader of a pipe has seen enough: `hesse predict ... | head`
        raise
    except OSError as error:
        message = f"{error.strerror or error}."
        full = "Make room on the disk; what was written before is whole."
        remedy = full if error.errno in FULL else "Check the path, its permissions and the disk."
        refuse(Finding("input or output", str(error.filename or ""), message, remedy, "error"), 1, as_json)
    except KeyboardInterrupt as error:
        refuse(Finding("interrupted", "", str(error) or "Nothing was written.", severity="error"), 130, as_json)


def refuse(finding: Finding, code: int, as_json: bool) -> NoReturn:
    """Say why there is no result, and exit."""
    if as_json:
        print_json({"ok": False, "error": finding.to_dict()})
    typer.echo(f"hesse: {finding}", err=True)
    raise typer.Exit(code)


def print_json(value: object) -> None:
    """One line of JSON on stdout."""
    print_text(json.dumps(value, ensure_ascii=False, allow_nan=False))


def print_text(text: str, stream: TextIO | None = None) -> None:
    """A line on stdout or ``stream``, in UTF-8 whatever the locale says, and at once: a reader at the end of a pipe
    follows what goes on.
    """
    stream = stream or sys.stdout
    stream.flush()  # what the user's own code has printed comes first
    stream.buffer.write(f"{text}\n".encode("utf-8", "surrogateescape"))
    stream.buffer.flush()
