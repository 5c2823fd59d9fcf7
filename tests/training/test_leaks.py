"""Columns that give the answer away are named, good columns are not; modalities without content are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hesse import demo
from hesse.finding import Finding
from hesse.multimodal import encode, make_schema, read_table
from hesse.training.leaks import constant_modalities, leaks

N = 300
RNG = np.random.default_rng(0)
SPECIES = RNG.choice(["cat", "dog", "fox"], N)
CODE = np.array(["cat", "dog", "fox"]).searchsorted(SPECIES)
PRICE = RNG.lognormal(size=N)
NOISE = RNG.normal(size=N)


def found(target: Any, root: Path = Path(), overrides: dict[str, str] | None = None, **columns: Any) -> list[Finding]:
    n = len(target)
    columns.setdefault("noise", NOISE[:n])
    columns.setdefault("noise2", ["a", "b", "c", "d"] * (n // 4) + ["a"] * (n % 4))
    table = read_table(pa.table({**{k: pa.array(list(v)) for k, v in columns.items()}, "y": pa.array(list(target))}))
    schema, parts = make_schema(table, "y", root=root, overrides=overrides)
    data = encode(schema, table, root=root)
    positions = {name: data.positions(rows) for name, rows in parts.items()}
    return leaks(schema, data, positions) + constant_modalities(schema, data, positions)


@pytest.mark.parametrize(
    "leak",
    [
        SPECIES,
        [f"the {s}" for s in SPECIES],
        [f"picture {i} of a {s}, taken at noon" for i, s in enumerate(SPECIES)],
        CODE * 1.5,
        CODE + RNG.uniform(-0.2, 0.2, N),
        [f"2024-{1 + c:02d}-{1 + i % 28:02d}" for i, c in enumerate(CODE)],
        [None if i % 3 == 0 else s for i, s in enumerate(SPECIES)],
    ],
    ids=["copy", "other words", "caption", "code", "with noise", "date", "a third missing"],
)
def test_a_column_that_gives_the_class_away_is_named(leak: Any) -> None:
    (finding,) = found(SPECIES, leak=leak)
    assert (finding.kind, finding.where, finding.severity) == ("leak", "column 'leak'", "warning")
    assert "predicts the target alone" in finding.message
    assert "--column leak=ignore" in finding.remedy


@pytest.mark.parametrize(
    ("leak", "overrides"),
    [
        (PRICE * 1.19, None),
        (1 - PRICE, None),
        ([f"EUR {p}" for p in np.round(PRICE).clip(0, 5)], {"leak": "category"}),
        ([f"price {p}" for p in np.round(PRICE).clip(0, 5)], {"leak": "text"}),
    ],
    ids=["tax", "negative", "category", "text"],
)
def test_a_column_that_gives_the_quantity_away_is_named(leak: Any, overrides: dict[str, str] | None) -> None:
    target = PRICE if overrides is None else np.round(PRICE).clip(0, 5) + 0.5
    (finding,) = found(target, overrides=overrides, leak=leak)
    assert finding.where == "column 'leak'"
    assert finding.value is not None and float(finding.value) > 0.999


def mostly(share: float) -> Any:
    """The class, right in a share of the rows."""
    return np.where(RNG.random(N) < share, SPECIES, RNG.permutation(SPECIES))


@pytest.mark.parametrize(
    "columns",
    [
        {"good": mostly(0.9)},
        {"good": mostly(0.97)},
        {"weight": CODE + RNG.normal(size=N) * 0.4},
        {"identifier": [f"row {i} of many" for i in range(N)]},
        {"owner": [f"owner {i % 100}" for i in range(N)]},
        {"story": [f"{s}s number {i} of a long row" for i, s in enumerate(SPECIES)]},
        {"story": [f"cat, dog or {s}: number {i}" for i, s in enumerate(SPECIES)]},
        {"rare": [s if i < 40 else None for i, s in enumerate(SPECIES)]},
    ],
    ids=["90 %", "97 %", "overlapping", "identifier", "owner", "beginning", "all classes", "few values"],
)
def test_good_columns_are_not_suspected(columns: dict[str, Any]) -> None:
    assert found(SPECIES, **columns) == []


def test_columns_of_several_numbers_do_not_hide_the_next() -> None:
    """A place is five of the network's numbers and a date up to seven."""
    days = [f"2024-{1 + i % 12:02d}-{1 + i % 28:02d}" for i in RNG.permutation(N)]
    places = {"lat": RNG.uniform(40, 50, N), "lon": RNG.uniform(0, 9, N)}
    (finding,) = found(SPECIES, day=days, **places, leak=CODE * 1.5)
    assert finding.where == "column 'leak'"


def test_a_strong_column_of_a_regression_is_not_suspected() -> None:
    assert found(PRICE, good=PRICE + RNG.normal(size=N) * 0.1) == []


def test_small_tables_single_columns_and_rare_classes_are_left_alone() -> None:
    assert found(SPECIES[:40], leak=CODE[:40] * 1.5) == []  # 36 rows that train or validate
    table = read_table(pa.table({"weight": CODE * 1.5, "y": SPECIES}))
    schema, parts = make_schema(table, "y", root=Path())
    data = encode(schema, table, root=Path())
    assert leaks(schema, data, {name: data.positions(rows) for name, rows in parts.items()}) == []
    rare = np.where(np.arange(N) < 4, "ill", "well")
    assert found(rare, good=np.where(rare == "ill", "high", "low")) == []  # four rows may be chance


def test_the_built_in_data_give_no_alarm(tmp_path: Path) -> None:
    table = read_table(demo.write(tmp_path, rows=300))
    schema, parts = make_schema(table, "digit", root=tmp_path)
    data = encode(schema, table, root=tmp_path)
    positions = {name: data.positions(rows) for name, rows in parts.items()}
    assert leaks(schema, data, positions) + constant_modalities(schema, data, positions) == []


def test_pictures_that_are_all_the_same_are_named(tmp_path: Path) -> None:
    for i in range(40):
        Image.new("L", (9, 9), 77).save(tmp_path / f"{i}.png")
        Image.new("L", (9, 9), 5 * i).save(tmp_path / f"b{i}.png")
    photo = [f"{i % 40}.png" if i % 10 else None for i in range(N)]
    (finding,) = found(SPECIES, tmp_path, photo=photo, other=[f"b{i % 40}.png" for i in range(N)])
    assert (finding.kind, finding.where, finding.severity) == ("constant modality", "column 'photo'", "warning")


def test_several_targets_are_judged_one_by_one() -> None:
    table = read_table(pa.table({"a": SPECIES, "b": PRICE, "x": PRICE * 2, "n": NOISE}))
    schema, parts = make_schema(table, ["a", "b"], root=Path())
    data = encode(schema, table, root=Path())
    (finding,) = leaks(schema, data, {name: data.positions(rows) for name, rows in parts.items()})
    assert finding.where == "column 'x'"
    assert "('b')" in finding.message


def test_the_same_file_in_every_row_is_named_though_it_is_left_out(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 9).save(tmp_path / "a.png")
    (finding,) = found(SPECIES, tmp_path, photo=["a.png"] * N)
    assert (finding.kind, finding.where) == ("constant modality", "column 'photo'")
    assert finding.message == "Every row has the same file: that tells nothing."


def test_texts_beside_a_quantity_are_judged_without_classes() -> None:
    said = [f"about {i % 7} of {i}" for i in range(N)]
    assert found(PRICE, said=said) == []
    (finding,) = found(PRICE, said=said, leak=PRICE * 1.19)
    assert finding.where == "column 'leak'"
