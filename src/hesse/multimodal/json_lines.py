"""JSON lines: one object a line, read by pyarrow, with errors that name the line and the value.

pyarrow reports positions relative to an internal block, and overflows the stack on deeply nested values; so
each line is looked at briefly beforehand, and looked at again, slowly, only when pyarrow has refused the
file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import json as arrow_json

from hesse.finding import InputError
from hesse.multimodal.encoding import require_utf8
from hesse.multimodal.native import opened

__all__ = ["explain", "read_json_lines", "require_object"]

_BLOCK = 64 << 20
_DEEPEST = 64
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_BOM = b"\xef\xbb\xbf"


def read_json_lines(path: Path, name: str) -> pa.Table:
    """The objects of a JSON lines file as a table; a key that a line lacks is a missing value.

    Raises:
        InputError: not UTF-8, not one object a line, a key with values of different types, or nothing in the
            file.
    """
    require_utf8(path, name)
    row = 0
    for row, line in _lines(path):
        require_object(line, f"{name}, row {row}")
    if not row:
        raise InputError("empty table", name, "The file is empty.", "Check that it was written completely.")
    try:
        with opened(path) as file:
            return arrow_json.read_json(file, read_options=arrow_json.ReadOptions(block_size=_BLOCK))
    except pa.ArrowException as error:
        raise explain(path, name, str(error)) from error


def require_object(line: bytes, where: str) -> None:
    """Raise InputError unless the line can be one JSON object that pyarrow can parse."""
    if not (line.startswith(b"{") and line.endswith(b"}")):
        raise InputError(
            "not JSON lines",
            where,
            f"Every line must be one JSON object, {{...}}; this one reads {_short(line)}.",
            "Write one object a line without commas between them; jq -c '.[]' does it to an array.",
        )
    if line.count(b"[") + line.count(b"{") > _DEEPEST and _depth(line) > _DEEPEST:
        raise InputError(
            "not JSON lines",
            where,
            f"The values are nested more than {_DEEPEST} deep.",
            "Columns hold plain numbers and texts; leave nested values out.",
        )


def _lines(path: Path) -> Any:
    """(row from 1, line) of every line with something on it."""
    row = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            line = (raw.removeprefix(_BOM) if number == 0 else raw).strip(b" \t\r\n")
            if line:
                row += 1
                yield row, line


def _depth(line: bytes) -> int:
    depth = deepest = 0
    for byte in _STRING.sub(b"", line):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def explain(path: Path, name: str, message: str) -> InputError:
    """Read line by line in Python to find what pyarrow stumbled over."""
    seen: dict[str, str] = {}
    for row, line in _lines(path):
        try:
            pairs: list[tuple[str, Any]] = json.loads(line, object_pairs_hook=list)
        except ValueError as error:
            return InputError(
                "damaged file",
                f"{name}, row {row}",
                f"The line is not JSON ({error}): {_short(line)}.",
                "Correct the line or delete it.",
            )
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            return InputError(
                "duplicate column",
                f"{name}, row {row}, column '{twice}'",
                f"The object has the key '{twice}' twice.",
                "Rename one of the two.",
            )
        for key, value in pairs:
            kind = _json_type(value)
            if kind != seen.setdefault(key, kind) and kind != "null":
                if seen[key] != "null":
                    shown = _short(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
                    return InputError(
                        "mixed column",
                        f"{name}, row {row}, column '{key}'",
                        f"{shown} is a {kind}; the rows before hold {seen[key]}s.",
                        "Put all values of the column into quotes, or correct this one.",
                    )
                seen[key] = kind
    return InputError(
        "damaged file", name, message.strip().splitlines()[0], "Check that every line is one JSON object."
    )


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    return "number" if isinstance(value, int | float) else "nested value"


def _short(line: bytes) -> str:
    text = line[:60].decode("utf-8", errors="ignore")
    return repr(text + "..." if len(line) > 60 else text)
