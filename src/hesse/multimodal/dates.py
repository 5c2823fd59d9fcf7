"""Dates as numbers: how long ago, and where in the year, the week and the day.

A date is a point on a line and on three circles. The line is its time in days, standardised; a circle is a sine and a
cosine, so that December lies next to January and 23:59 next to 0:00. A circle is left out where it says nothing: the
season of a table that spans a month, the hour of dates without one.

Dates are read in ISO's form, in the forms with the day or the month first, and with English names of months; a time of
day may follow, and an offset from UTC, which is taken off. Whether the day comes first is judged by the whole column:
one 31/12 tells. Where nothing tells, points and hyphens have the day first and slashes the month.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

__all__ = ["are_dates", "day_first", "days_of", "measures", "plan", "width"]

LONGEST = 60  # characters: longer cells are no dates, and are not looked at
SEASONS = 90.0  # days that training rows must span before the time of the year can say anything of its own
YEAR = 365.2425  # days

_TIME = (
    r"(?:(?:[T ]|, ?)(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2}(?:[.,]\d+)?))?"
    r"(?: ?(?P<half>[AaPp])\.?[Mm]\.?)?(?: ?(?P<zone>Z|UTC|GMT|[+-]\d{2}(?::?\d{2})?))?)?$"
)
_WEEKDAY = r"^(?:(?i:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?,? )?"
_FORMS = (
    r"^(?P<year>\d{4})[-/.](?P<month>\d{1,2})[-/.](?P<day>\d{1,2})" + _TIME,
    r"^(?P<year>\d{4})[-/](?P<month>\d{1,2})$",
    r"^(?P<year>\d{4})(?P<month>\d{2})(?P<day>\d{2})$",
    r"^(?P<one>\d{1,2})[-/.](?P<two>\d{1,2})[-/.](?:(?P<year>\d{4})|(?P<short>\d{2}))" + _TIME,
    _WEEKDAY + r"(?P<day>\d{1,2})\.?[ -](?P<name>[A-Za-z]{3,9})\.?,?[ -](?P<year>\d{4})" + _TIME,
    _WEEKDAY + r"(?P<name>[A-Za-z]{3,9})\.? (?P<day>\d{1,2})(?:st|nd|rd|th)?,? (?P<year>\d{4})" + _TIME,
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def are_dates(texts: pa.Array) -> bool:
    """Whether all of some texts, none missing, are dates.

    Example:
        >>> are_dates(pa.array(["2024-02-29", "2024-03-01T08:30:00Z"], pa.large_string()))
        True
        >>> are_dates(pa.array(["2023-02-29"], pa.large_string())), are_dates(pa.array(["3/4"], pa.large_string()))
        (False, False)
    """
    if not len(texts) or pc.max(pc.utf8_length(texts)).as_py() > LONGEST:
        return False
    first = texts.slice(0, 1)
    if np.isnan(days_of(first, day_first(first)))[0]:  # most columns hold no dates, and are told by one cell
        return False
    return bool(np.isfinite(days_of(texts, day_first(texts))).all())


def day_first(values: pa.Array) -> bool:
    """Whether 3/4/2024 is in April, judged by all values.

    Example:
        >>> [day_first(pa.array(cells, pa.large_string())) for cells in (["3/4/24", "31/1/24"], ["3/4/24"], ["3.4.24"])]
        [True, False, True]
    """
    texts = pc.drop_null(pc.unique(_texts(values)))
    fields = pc.extract_regex(texts, r"^(?P<one>\d{1,2})(?P<mark>[-/.])(?P<two>\d{1,2})[-/.]\d{2}")
    one, two = (_integers(pc.struct_field(fields, name)) for name in ("one", "two"))
    if (one > 12).any() or (two > 12).any():
        return bool((one > 12).sum() >= (two > 12).sum())
    marks = pc.drop_null(pc.struct_field(fields, "mark"))
    return bool(len(marks)) and marks[0].as_py() != "/"


def days_of(values: pa.Array, day_first: bool) -> NDArray[np.float64]:
    """Days since 1970 ``[rows]``, NaN where a value is missing or is no date; texts, or whole numbers like 20241231.

    Example:
        >>> days_of(pa.array(["1970-01-02", "2.1.70 12:00", None, "never"], pa.large_string()), day_first=True)
        array([1. , 1.5, nan, nan])
    """
    coded = pc.dictionary_encode(_texts(values))
    words = coded.dictionary
    days = np.full(len(words) + 1, np.nan)  # the last for missing values
    for form in _FORMS:
        left = np.flatnonzero(np.isnan(days[:-1]))
        if not left.size:
            break
        fields = pc.extract_regex(words.take(pa.array(left)), form)
        days[left] = _days({f.name: pc.struct_field(fields, f.name) for f in fields.type}, day_first)
    return days[pc.fill_null(coded.indices, len(words)).to_numpy(zero_copy_only=False)]


def plan(days: NDArray[np.float64]) -> dict[str, Any]:
    """Which circles the known days of the training rows go round: ``season``, ``weekday``, ``hour``."""
    whole = np.floor(days)
    return {
        "season": bool(np.ptp(days) >= SEASONS),
        "weekday": len(np.unique(whole % 7)) > 1,
        "hour": len(np.unique(days - whole)) > 1,
    }


def width(settings: dict[str, Any]) -> int:
    """How many numbers a date becomes."""
    return 1 + 2 * sum(settings[circle] for circle in ("season", "weekday", "hour"))


def measures(days: NDArray[np.float64], settings: dict[str, Any]) -> NDArray[np.float64]:
    """Standardised time and the planned circles, ``[rows, width]``; NaN throughout where the day is.

    Example:
        >>> settings = {"mean": 100.0, "std": 50.0, "season": False, "weekday": False, "hour": True}
        >>> measures(np.array([150.25]), settings).round(2)
        array([[1., 1., 0.]])
    """
    columns = [(days - settings["mean"]) / settings["std"]]
    turns = {"season": days / YEAR, "weekday": np.floor(days) / 7, "hour": days}
    for circle, turn in turns.items():
        if settings[circle]:
            angle = 2 * np.pi * (turn - np.floor(turn))
            columns += [np.sin(angle), np.cos(angle)]
    return np.stack(columns, axis=1)


def _texts(values: pa.Array) -> pa.Array:
    if values.type == pa.float64():
        whole = pc.equal(values, pc.round(values))
        values = pc.cast(pc.if_else(pc.and_(whole, pc.less(pc.abs(values), 1e15)), values, None), pa.int64())
    return pc.cast(values, pa.large_string())


def _days(fields: dict[str, pa.Array], day_first: bool) -> NDArray[np.float64]:
    """Days since 1970 from the groups of one form; NaN where they make no date."""
    parts = {name: _integers(f) for name, f in fields.items() if name not in ("name", "half", "zone", "second")}
    year = parts["year"]
    if "one" in parts:
        # POSIX's rule for years of two digits: 69 to 99 are of the last century.
        short = parts["short"]
        year = np.where(short < 0, year, np.where(short < 69, short + 2000, short + 1900))
        parts["day"], parts["month"] = (parts[n] for n in (("one", "two") if day_first else ("two", "one")))
    if "name" in fields:
        three = pc.utf8_lower(pc.utf8_slice_codeunits(fields["name"], 0, 3))
        place = pc.index_in(three, value_set=pa.array(_MONTHS, three.type))
        parts["month"] = 1 + np.asarray(pc.fill_null(place, -1).to_numpy(zero_copy_only=False), np.int64)
    month, day = parts["month"], parts.get("day", np.ones(len(year), np.int64))
    good = (year >= 1) & (month >= 1) & (month <= 12) & (day >= 1)
    first = _first_day(np.where(good, year, 1970), np.where(good, month, 1))
    after = _first_day(np.where(good, year, 1970) + (month == 12), np.where(good, month, 1) % 12 + 1)
    good &= day <= after - first
    result = (first + day - 1).astype(np.float64)
    if "hour" in parts:
        hour, minute = parts["hour"].clip(0), parts["minute"].clip(0)
        second = _floats(pc.replace_substring(fields["second"], ",", "."))
        half = pc.utf8_lower(fields["half"])
        late, early = (np.asarray(pc.equal(half, h).to_numpy(zero_copy_only=False), bool) for h in ("p", "a"))
        good &= (minute < 60) & (second < 61) & np.where(late | early, (hour >= 1) & (hour <= 12), hour < 24)
        hour = np.where(late | early, hour % 12 + 12 * late, hour)
        result += (hour * 3600 + minute * 60 + second - _offset(fields["zone"])) / 86400
    return np.where(good, result, np.nan)


def _first_day(year: NDArray[np.int64], month: NDArray[np.int64]) -> NDArray[np.int64]:
    """Days from 1970 to the first of a month."""
    months = (12 * (year - 1970) + month - 1).astype("datetime64[M]")
    return months.astype("datetime64[D]").astype(np.int64)


def _offset(zone: pa.Array) -> NDArray[np.float64]:
    """Seconds east of UTC; 0 where no offset is written."""
    fields = pc.extract_regex(zone, r"^(?P<sign>[+-])(?P<hours>\d{2}):?(?P<minutes>\d{2})?$")
    hours, minutes = (_integers(pc.struct_field(fields, n)).clip(0) for n in ("hours", "minutes"))
    west = pc.fill_null(pc.equal(pc.struct_field(fields, "sign"), "-"), False).to_numpy(zero_copy_only=False)
    return np.asarray((3600.0 * hours + 60.0 * minutes) * np.where(west, -1, 1), np.float64)


def _integers(field: pa.Array) -> NDArray[np.int64]:
    """-1 where the group did not take part."""
    plain = pc.if_else(pc.equal(field, ""), None, field)
    return np.asarray(pc.fill_null(pc.cast(plain, pa.int64()), -1).to_numpy(zero_copy_only=False), np.int64)


def _floats(field: pa.Array) -> NDArray[np.float64]:
    plain = pc.if_else(pc.equal(field, ""), None, field)
    return np.asarray(pc.fill_null(pc.cast(plain, pa.float64()), 0.0).to_numpy(zero_copy_only=False), np.float64)
