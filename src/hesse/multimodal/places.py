"""Places: a latitude and a longitude are one point on a sphere, not two quantities.

The point is given by its unit vector, in which Fiji's two sides of the date line are neighbours and the poles are
points, and by both angles, standardised, in which a town's streets are still apart. Two number columns make a place if
their names say so in one of the words below and differ in nothing else (``pickup_lat`` and ``pickup_lon``), and all
values are angles; ``--column lat=number`` undoes it, ``--column y=latitude --column x=longitude`` does it for other
names.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.columns import Column, Kind
from hesse.multimodal.table import Table
from hesse.multimodal.values import numbers

__all__ = ["WIDTH", "WORDS", "measures", "not_an_angle", "off_the_globe", "pair_places", "turned"]

WIDTH = 5
"""How many numbers a place becomes."""

WORDS = {
    "latitude": {
        "lat", "latitude", "latitud", "latitudine", "breite", "breitengrad", "breedtegraad", "breddegrad",
        "szerokość", "enlem", "широта", "纬度", "緯度", "위도", "عرض",
    },
    "longitude": {
        "lon", "lng", "long", "longitude", "longitud", "longitudine", "länge", "längengrad", "lengtegraad",
        "længdegrad", "długość", "boylam", "долгота", "经度", "經度", "経度", "경도", "طول",
    },
}  # fmt: skip
"""What halves of places are called."""


def pair_places(table: Table, columns: Sequence[Column], overrides: Mapping[str, str]) -> list[Column]:
    """The columns, with those that make places as ``latitude`` and ``longitude``, each knowing the other's name.

    Args:
        table: has the values.
        columns: as found one by one.
        overrides: kinds that the user asked for, by column: these stay.

    Raises:
        InputError: a latitude or a longitude was asked for and there is no other half, or a value is no angle.
    """
    asked = {c.name: c.kind for c in columns if c.role == "input" and c.kind in WORDS}
    halves: dict[str, dict[str, str]] = {}  # the columns by what is left of their names, and by part
    for column in columns:
        stem, part = _split(column.name)
        by_name = column.role == "input" and column.kind == "number" and column.name not in overrides
        part = asked.get(column.name, part if by_name else "")
        if part:
            halves.setdefault(stem, {}).setdefault(part, column.name)
    pairs = [(half["latitude"], half["longitude"]) for half in halves.values() if len(half) == 2]
    paired = {name for pair in pairs for name in pair}
    left = {part: [name for name, kind in asked.items() if kind == part and name not in paired] for part in WORDS}
    for name in left["latitude"][len(left["longitude"]) :] + left["longitude"][len(left["latitude"]) :]:
        raise InputError(
            "half a place",
            table.where(name),
            f"The column is to be read as the {asked[name]} of a place, and no column gives the other half.",
            "Name both: --column NAME=latitude --column NAME=longitude, or read it as a number.",
        )
    pairs += zip(left["latitude"], left["longitude"], strict=True)

    found: dict[str, tuple[Kind, str]] = {}
    for latitude, longitude in pairs:
        if _are_angles(table, latitude, longitude, bool({latitude, longitude} & asked.keys())):
            found[latitude], found[longitude] = ("latitude", longitude), ("longitude", latitude)
    return [_half(column, *found[column.name]) if column.name in found else column for column in columns]


def measures(latitude: NDArray[np.float64], longitude: NDArray[np.float64], settings: dict[str, Any]) -> NDArray[Any]:
    """x, y, z and both standardised angles ``[rows, 5]``; NaN where what it takes is missing.

    Example:
        >>> settings = {"mean": [0.0, 0.0], "std": [10.0, 10.0]}
        >>> measures(np.array([0.0, 90.0]), np.array([270.0, np.nan]), settings).round(2) + 0
        array([[ 0., -1.,  0.,  0., -9.],
               [nan, nan, nan,  9., nan]])
    """
    longitude = turned(longitude)
    phi, lam = np.radians(np.where(np.isnan(longitude), np.nan, latitude)), np.radians(longitude)
    sphere = [np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi + 0 * lam)]
    angles = [(a - m) / s for a, m, s in zip((latitude, longitude), settings["mean"], settings["std"], strict=True)]
    return np.stack([*sphere, *angles], axis=1)


def turned(longitude: NDArray[np.float64]) -> NDArray[np.float64]:
    """Longitudes from -180 to 180: some tables count them from 0 to 360."""
    return np.where(longitude > 180, longitude - 360, longitude)


def off_the_globe(part: str, values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which values are no latitude (-90 to 90) or longitude (-180 to 360); missing ones are not among them."""
    low, high = (-90, 90) if part == "latitude" else (-180, 360)
    return np.asarray((values < low) | (values > high), bool)


def not_an_angle(where: str, part: str, value: float) -> InputError:
    """The error about one cell."""
    limits = "-90 to 90" if part == "latitude" else "-180 to 180 (or 0 to 360)"
    return InputError(
        "not an angle",
        where,
        f"The value {value:g} is no {part}: these are degrees from {limits}.",
        "Correct the cell, empty it if the place is unknown, or train with --column NAME=number for both columns.",
        value=value,
    )


def _split(name: str) -> tuple[str, str]:
    """What is left of a name without the word that makes it half of a place, and which half; "" if none."""
    breaks = r"(?<=[a-z])(?=[A-Z])|(?<=[^\W\d_])(?=\d)"  # pickupLat, lat2
    spaced = re.sub(breaks, " ", unicodedata.normalize("NFC", name))
    words = re.split(r"[\W_]+", spaced.casefold())
    for i, word in enumerate(words):
        part = next((part for part, known in WORDS.items() if word in known), "")
        if part:
            return " ".join([*words[:i], "*", *words[i + 1 :]]), part
    return name, ""


def _are_angles(table: Table, latitude: str, longitude: str, asked: bool) -> bool:
    """Whether all values of two columns are angles; an error for one that is not, if the place was asked for."""
    for part, name in (("latitude", latitude), ("longitude", longitude)):
        values = numbers(table, name)
        off = np.flatnonzero(off_the_globe(part, values))
        if off.size and asked:
            raise not_an_angle(table.where(name, int(off[0])), part, float(values[off[0]]))
        if off.size:
            return False
    return True


def _half(column: Column, kind: Kind, other: str) -> Column:
    reason = f"with '{other}' a place; if it is none: --column {column.name}=number"
    return replace(column, kind=kind, reason=reason, settings={"with": other})
