"""What a column is, found by looking at its values, with the reason in words.

A column is an image or audio path or several of images, a number, a date, half of a place, a category or text; or it is
left out, because it says nothing (one value throughout) or says which row it is and not what the row is like (an
identifier). The user sees kind and reason before training starts and can overrule them: ``--column zip=category``.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hesse.finding import InputError
from hesse.multimodal import dates
from hesse.multimodal.media import OUTSIDE, find_file
from hesse.multimodal.sequences import is_list_of_texts, paths_in, sequences
from hesse.multimodal.table import Table
from hesse.multimodal.values import is_readable, not_numbers, require_readable, short, try_numbers

__all__ = ["KINDS", "MEDIA", "Column", "Kind", "describe", "is_few", "refuse_mixed"]

Kind = Literal["image", "audio", "text", "number", "category", "date", "latitude", "longitude", "images"]
Role = Literal["input", "target", "split", "ignored"]
KINDS: tuple[str, ...] = get_args(Kind)

MEDIA: dict[Kind, tuple[str, ...]] = {
    "image": ("png", "jpg", "jpeg", "gif", "bmp", "webp", "tif", "tiff", "pgm", "ppm", "pbm", "avif"),
    "audio": ("wav", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc", "au", "w64", "caf"),
}
MOSTLY = 0.8  # share of the values that have to look like paths of files
MOST_CATEGORIES = 1000

_ID_NAME = re.compile(r"(^|[\W_])(id|uuid|guid|index|idx|key|nr|no|row|unnamed)([\W_]*\d*)$", re.IGNORECASE)
_CAMEL_ID = re.compile(r"[a-z]I[dD]$")


@dataclass(frozen=True)
class Column:
    """One column of the table: what it is, what it is for, and why.

    Attributes:
        name: as in the header.
        kind: how its values are read.
        role: "input", "target", "split" or "ignored".
        reason: why this kind or role, a short phrase.
        missing: number of rows without a value.
        unique: number of different values.
        example: the first value, shortened.
        settings: what encoding needs, chosen from the training rows; a JSON object.
    """

    name: str
    kind: Kind
    role: Role
    reason: str
    missing: int
    unique: int
    example: str
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def row(self) -> dict[str, Any]:
        """The column as a row of the table shown to the user: everything but the settings."""
        return {key: value for key, value in asdict(self).items() if key != "settings"}


@dataclass(frozen=True)
class _Facts:
    """What kinds are decided by: the values, how many there are, and how many differ."""

    values: pa.Array
    distinct: pa.Array
    present: int

    @property
    def unique(self) -> int:
        return len(self.distinct)


def describe(table: Table, name: str, root: Path, override: str | None = None) -> Column:
    """Find the kind of one column.

    Args:
        table: the whole table.
        name: the column.
        root: the folder that paths are relative to.
        override: the kind the user asked for, or ``"ignore"``, or None.

    Raises:
        InputError: numbers with a few words among them; paths of which no file exists; an override that does
            not fit.

    Example:
        >>> import pyarrow
        >>> sizes = pyarrow.array(["S", "M", "L", "M"] * 5, pyarrow.large_string())
        >>> table = Table(pyarrow.table({"size": sizes}), "shirts.csv", None)
        >>> column = describe(table, "size", Path())
        >>> column.kind, column.reason
        ('category', '3 different values in 20 rows')
    """
    values = table.column(name)
    if not is_readable(values):
        if is_list_of_texts(values) and override in (None, "images"):
            return _listed(values, name, root, override)
        if override not in (None, "ignore"):
            require_readable(table, name)
        missing = values.null_count
        return Column(name, "text", "ignored", f"{values.type} values are not read", missing, 0, "")
    distinct = pc.drop_null(pc.unique(values))
    facts = _Facts(values, distinct, len(values) - values.null_count)
    if override is None:
        kind, role, reason = _find(table, name, root, facts)
    else:
        kind, role, reason = _obey(table, name, facts, override)
    example = short(distinct[0].as_py()) if facts.unique else ""
    return Column(name, kind, role, reason, values.null_count, facts.unique, example)


def is_few(unique: int, rows: int) -> bool:
    """Whether values repeat enough to be categories: five rows each, or two if there are hardly any."""
    return unique * 5 <= rows or (unique <= 10 and unique * 2 <= rows)


def _obey(table: Table, name: str, facts: _Facts, override: str) -> tuple[Kind, Role, str]:
    is_text = pa.types.is_large_string(facts.values.type)
    if override == "ignore":
        return ("text" if is_text else "number"), "ignored", "as asked"
    if (override in MEDIA or override == "images") and not is_text:
        raise InputError(
            "wrong kind",
            table.where(name),
            f"The column holds numbers, which are not paths of {override.removesuffix('s')} files.",
            f"Leave --column {name}={override} away.",
        )
    if not facts.present:
        return "text", "ignored", "every value is missing"
    for kind in get_args(Kind):
        if kind == override:
            return kind, "input", "as asked"
    raise InputError(
        "unknown kind",
        f"column '{name}'",
        f"There is no kind '{override}'.",
        f"The kinds are: {', '.join(KINDS)}, ignore.",
        value=override,
    )


def _find(table: Table, name: str, root: Path, facts: _Facts) -> tuple[Kind, Role, str]:
    parsed = try_numbers(facts.values)
    kind: Kind = "text" if parsed is None else "number"
    if not facts.present:
        return "text", "ignored", "every value is missing"
    if facts.unique == 1 and facts.present == len(table):
        return _kind_of_files(facts.distinct) or kind, "ignored", "the same value in every row"
    if parsed is not None:
        if _counts_rows(name, parsed, facts):
            return "number", "ignored", "a number for each row: it names rows, it does not describe them"
        return "number", "input", "every value is a number"

    media = _media(table, name, root, facts)
    if media is not None:
        return media, "input", "several paths of image files" if media == "images" else f"paths of {media} files"
    if dates.are_dates(facts.distinct):
        return "date", "input", _of_dates(facts.distinct)
    of = f"{facts.unique} different values in {facts.present} rows"
    category: tuple[Kind, Role, str] = ("category", "input", of)
    if facts.unique <= 20 and is_few(facts.unique, facts.present):
        return category
    _refuse_mixed_media(table, name, facts)
    refuse_mixed(table, name)
    _refuse_mixed_dates(table, name, facts)
    if is_few(facts.unique, facts.present):
        return category
    if _names_rows(name, facts):
        return "text", "ignored", "a different code in each row: it names rows, it does not describe them"
    return "text", "input", f"free text: {of}"


def _counts_rows(name: str, parsed: pa.Array, facts: _Facts) -> bool:
    """Whole numbers, all different, that count the rows from 0 or 1, or go under a name like "id"."""
    if facts.unique < len(facts.values):
        return False
    counts = parsed.to_numpy(zero_copy_only=False)
    if len(counts) < 10 or not np.array_equal(counts, np.rint(counts)):
        return False
    return _is_id(name) or (counts[0] in (0, 1) and bool((np.diff(counts) == 1).all()))


def _names_rows(name: str, facts: _Facts) -> bool:
    """All different, one word each, and called an identifier or written with a digit in every one."""
    if facts.unique < len(facts.values) or facts.unique < 10:
        return False
    word = pc.match_substring_regex(facts.distinct, r"^\S{1,40}$" if _is_id(name) else r"^\S{0,39}\d\S{0,39}$")
    return bool(pc.all(word).as_py()) and pc.max(pc.utf8_length(facts.distinct)).as_py() <= 40


def _is_id(name: str) -> bool:
    return bool(_ID_NAME.search(name) or _CAMEL_ID.search(name))


def _media(table: Table, name: str, root: Path, facts: _Facts) -> Kind | None:
    """The kind of file that nearly all values have the ending of, given that some of the files exist."""
    for kind in MEDIA:
        fits = _fits(facts.distinct, kind)
        if pc.sum(fits).as_py() < MOSTLY * facts.unique:
            continue
        paths = pc.filter(facts.distinct, fits)
        some = _sample(paths)
        if kind == "image":
            parted = pc.filter(paths, pc.match_substring_regex(paths, r"[|;]|^\["))
            if any(_several(root, cell) for cell in _sample(parted)):
                return "images"
        if any(_exists(root, cell) for cell in some):
            return kind
        raise InputError(
            "missing file",
            table.where(name, pc.index(facts.values, pc.cast(some[0], facts.values.type)).as_py()),
            f"The column looks like paths of {kind} files, but none of them exists in {root.resolve()}.",
            "Paths are relative to the table's folder (of a data frame the working directory): name another one with "
            "--data-root (data_root=), "
            f"or use the names alone with --column {name}=text or --column {name}=ignore.",
        )
    return None


def _fits(cells: pa.Array, kind: Kind) -> pa.Array:
    """Which cells have the ending of such files; behind it may be what closes a JSON list."""
    return pc.match_substring_regex(cells, rf"(?i)\.({'|'.join(MEDIA[kind])})(\"\s*\])?$")


def _kind_of_files(cells: pa.Array) -> Kind | None:
    """The kind of file that all cells have the ending of."""
    if not pa.types.is_large_string(cells.type):
        return None
    return next((kind for kind in MEDIA if pc.all(_fits(cells, kind)).as_py()), None)


def _sample(cells: pa.Array) -> list[str]:
    """At most fifty of some texts, evenly spaced."""
    places = np.unique(np.linspace(0, len(cells) - 1, 50).astype(int)) if len(cells) else ()
    return [cells[int(i)].as_py() for i in places]


def _several(root: Path, cell: str) -> bool:
    """Whether a cell names several files, or one in a list, and is not itself the name of one."""
    parts = paths_in(cell)
    return parts != [cell] and any(_exists(root, part) for part in parts) and not _exists(root, cell)


def _listed(values: pa.Array, name: str, root: Path, override: str | None) -> Column:
    """A column of lists of texts: pictures, or nothing that is read."""
    cells = sequences(values)
    missing, distinct = cells.count(None), dict.fromkeys("|".join(cell) for cell in cells if cell)
    paths = [path for cell in cells for path in cell or ()]
    few = _sample(pa.array(paths, pa.large_string()))
    ending = re.compile(rf"\.({'|'.join(MEDIA['image'])})$", re.IGNORECASE)
    are_images = sum(bool(ending.search(p)) for p in few) >= 0.8 * len(few) and any(_exists(root, p) for p in few)
    example = short(next(iter(distinct), ""))
    if paths and (are_images or override):
        reason = "as asked" if override else "lists of paths of image files"
        return Column(name, "images", "input", reason, missing, len(distinct), example)
    return Column(name, "text", "ignored", f"{values.type} values are not read", missing, len(distinct), example)


def _of_dates(distinct: pa.Array) -> str:
    """The reason, which says which of day and month comes first where the form leaves that open."""
    open_form = pc.any(pc.match_substring_regex(distinct, r"^\d{1,2}[-/.]\d{1,2}[-/.]")).as_py()
    if not open_form:
        return "every value is a date"
    return f"every value is a date, the {'day' if dates.day_first(distinct) else 'month'} first"


def _exists(root: Path, cell: str) -> bool:
    """Files outside count as well here: the error about those is more to the point than "no such file"."""
    try:
        return os.path.exists(find_file(root, cell))  # noqa: PTH110 - never raises, however long the name
    except InputError as error:
        return error.finding.kind == OUTSIDE


def refuse_mixed(table: Table, name: str) -> None:
    """Numbers with a few words among them: a slip, or a way to say "unknown", which training must not guess.

    Raises:
        InputError: at least four values are numbers and at most a tenth (or one) are not.
    """
    values = table.column(name)
    rows = not_numbers(values)
    numeric = len(values) - values.null_count - len(rows)
    if numeric < 4 or len(rows) > max(1, (numeric + len(rows)) // 10):
        return
    words = pc.unique(values.take(pa.array(rows))).to_pylist()[:3]
    shown = ", ".join(f"'{short(word, 30)}'" for word in words)
    raise InputError(
        "mixed column",
        table.where(name, int(rows[0])),
        f"{numeric} values are numbers, but {len(rows)} {'is' if len(rows) == 1 else 'are'} not: {shown}.",
        "Correct the cells, empty those that mean 'unknown', "
        f"or read all values as words with --column {name}=category.",
        value=short(words[0]),
    )


def _refuse_mixed_media(table: Table, name: str, facts: _Facts) -> None:
    """Pictures and sounds in one column: two columns were exchanged in some rows, or lists were joined.

    Raises:
        InputError: nearly all values are paths of media files, and enough of each kind that neither is a slip.
    """
    counts = {kind: int(pc.sum(_fits(facts.values, kind)).as_py() or 0) for kind in MEDIA}
    few, many = sorted(counts, key=lambda kind: counts[kind])
    if sum(counts.values()) < MOSTLY * facts.present or not counts[few]:
        return
    row = pc.index(_fits(facts.values, few), pa.scalar(True)).as_py()
    value = short(facts.values[row].as_py())
    raise InputError(
        "mixed column",
        table.where(name, row),
        f"{counts[many]} values are paths of {many} files and {counts[few]} of {few} files, this one among them.",
        "If it was exchanged with another column in some rows, correct those; pictures and sounds need columns of "
        f"their own. Or leave the column out with --column {name}=ignore.",
        value=value,
    )


def _refuse_mixed_dates(table: Table, name: str, facts: _Facts) -> None:
    """Dates with a few other words among them, as :func:`refuse_mixed`."""
    start = facts.distinct.slice(0, 20)
    if np.isfinite(dates.days_of(start, dates.day_first(start))).sum() < 4:
        return
    days = dates.days_of(facts.values, dates.day_first(facts.values))
    others = np.flatnonzero(np.isnan(days) & facts.values.is_valid().to_numpy(zero_copy_only=False))
    if len(others) > max(1, facts.present // 10):
        return
    word = short(facts.values[int(others[0])].as_py())
    raise InputError(
        "mixed column",
        table.where(name, int(others[0])),
        f"{facts.present - len(others)} values are dates, but {len(others)} {'is' if len(others) == 1 else 'are'} not: "
        f"'{word}'.",
        "Correct the cells, empty those that mean 'unknown', "
        f"or read all values as words with --column {name}=category or --column {name}=text.",
        value=word,
    )
