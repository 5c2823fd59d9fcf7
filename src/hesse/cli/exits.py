"""How a command ends: a clear sentence and an exit code, whatever happened."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from hesse.finding import InputError

__all__ = ["clean_exit", "print_json"]


@contextmanager
def clean_exit(json_wanted: bool = False, after_interrupt: str = "") -> Iterator[None]:
    """Turn refusals into exit code 1 and Ctrl-C into 130, each with a sentence on stderr (and, if wanted, JSON)."""
    try:
        yield
    except InputError as error:
        if json_wanted:
            print_json({"ok": False, "error": error.finding.to_dict()})
        typer.echo(f"hesse: {error}", err=True)
        raise typer.Exit(1) from error
    except ImportError as error:
        if "pip install" not in str(error):
            raise
        typer.echo(f"hesse: {error}", err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        typer.echo(f"hesse: {error.strerror or error}: {error.filename or ''}".rstrip(": "), err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo(f"\nhesse: interrupted. {after_interrupt}".rstrip(), err=True)
        raise typer.Exit(130) from None


def print_json(value: object) -> None:
    """One line of JSON on stdout."""
    import json

    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
