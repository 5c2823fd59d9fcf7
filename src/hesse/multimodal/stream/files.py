"""The files that a large table is: one file, or all tables of one format below a folder, in the order of their names.

A folder with ``part-0.parquet``, ``part-1.parquet``, ... is one table, and so is one whose folders are called
``year=2026``: what stands there is a column. Names that begin with a dot or an underscore are other programs' notes.
"""

from __future__ import annotations

import os
from pathlib import Path

from hesse.finding import InputError
from hesse.multimodal.media import find_file
from hesse.multimodal.table import DELIMITED, JSON, PARQUET, missing, unknown_type

__all__ = ["FORMATS", "find_tables", "format_of"]

FORMATS = {"delimited": DELIMITED, "json": JSON, "parquet": PARQUET}


def format_of(path: Path) -> str | None:
    """The format that a file's ending says, or None.

    Example:
        >>> format_of(Path("pets.TSV")), format_of(Path("pets.xlsx"))
        ('delimited', None)
    """
    suffix = path.suffix.lower()
    return next((name for name, endings in FORMATS.items() if suffix in endings), None)


def find_tables(path: Path, name: str) -> tuple[str, list[Path]]:
    """The format and the files of a table.

    Raises:
        InputError: nothing there, no table in the folder, several formats, or a link that leads out of the folder.
    """
    if not path.exists():
        raise missing(path, name)
    if not path.is_dir():
        found = format_of(path)
        if found is None:
            raise unknown_type(path, name)
        return found, [path]
    files = sorted(file for file in _walk(path) if file.suffix.lower() != ".txt" and format_of(file))
    formats = sorted({format_of(file) or "" for file in files})
    if not files:
        raise InputError(
            "empty table",
            str(path),
            "There is no table in this folder.",
            "Name a file, or a folder with CSV, TSV, JSON lines or Parquet files.",
        )
    if len(formats) > 1:
        raise InputError(
            "mixed folder",
            str(path),
            f"The folder holds tables of several formats: {', '.join(formats)}.",
            "Name one of the files, or put those that belong together into a folder of their own.",
        )
    return formats[0], [find_file(path, str(file.relative_to(path))) for file in files]


def _walk(folder: Path) -> list[Path]:
    found = []
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        found += [Path(top, name) for name in files if not name.startswith((".", "_"))]
    return found
