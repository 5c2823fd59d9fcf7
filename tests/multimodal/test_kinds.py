"""Dates, places and sequences of pictures: what is taken for one, and what it becomes."""

from __future__ import annotations

import json
import math
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hesse import InputError
from hesse.multimodal import FusedModel, Schema, Table, encode, make_schema, read_table
from hesse.multimodal.columns import describe
from hesse.multimodal.dates import are_dates, day_first, days_of, measures, plan
from hesse.multimodal.encoders import images
from hesse.multimodal.sequences import evenly, paths_in, sequences

N = 60
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def table_of(**columns: Any) -> Table:
    return read_table(pa.table(columns))


def schema_of(root: Path = Path(), overrides: dict[str, str] | None = None, **columns: Any) -> tuple[Schema, Table]:
    columns.setdefault("y", ["yes", "no"] * (N // 2))
    table = table_of(**columns)
    return make_schema(table, "y", root=root, overrides=overrides)[0], table


def kinds(schema: Schema) -> dict[str, str]:
    return {column.name: column.kind if column.role == "input" else column.role for column in schema.columns}


def cells(*values: str | None) -> pa.Array:
    return pa.array(values, pa.large_string())


# ---------------------------------------------------------------- dates

MOMENT = datetime(2023, 11, 5, 17, 4, 9, tzinfo=UTC)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2023-11-05", MOMENT.replace(hour=0, minute=0, second=0)),
        ("2023/11/5", MOMENT.replace(hour=0, minute=0, second=0)),
        ("2023-11", MOMENT.replace(day=1, hour=0, minute=0, second=0)),
        ("20231105", MOMENT.replace(hour=0, minute=0, second=0)),
        ("2023-11-05T17:04:09Z", MOMENT),
        ("2023-11-05 17:04:09.500", MOMENT + timedelta(seconds=0.5)),
        ("2023-11-05 17:04:09+02:00", MOMENT.replace(tzinfo=timezone(timedelta(hours=2)))),
        ("2023-11-05T17:04:09-0530", MOMENT.replace(tzinfo=timezone(-timedelta(hours=5, minutes=30)))),
        ("5.11.2023 17:04", MOMENT.replace(second=0)),
        ("05.11.23", MOMENT.replace(hour=0, minute=0, second=0)),
        ("05.11.68", datetime(2068, 11, 5, tzinfo=UTC)),
        ("05.11.69", datetime(1969, 11, 5, tzinfo=UTC)),
        ("5/11/2023, 5:04 PM", MOMENT.replace(second=0)),
        ("5/11/2023 12:04 a.m.", MOMENT.replace(hour=0, second=0)),
        ("5 Nov 2023", MOMENT.replace(hour=0, minute=0, second=0)),
        ("November 5th, 2023", MOMENT.replace(hour=0, minute=0, second=0)),
        ("Sun, 05 Nov 2023 17:04:09 GMT", MOMENT),
    ],
)
def test_a_date_is_the_moment_it_says(written: str, meant: datetime) -> None:
    expected = (meant - EPOCH) / timedelta(days=1)
    assert days_of(cells(written), day_first=True)[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "written",
    [
        "2023-02-29", "2023-13-01", "2023-00-10", "0000-00-00", "31.4.2023", "2023-01-01 24:00", "2023-01-01 10:60",
        "1.2.3", "5/6", "5 Foo 2023", "13:45", "2023", "", "2023-01-01 13:00 PM", "x" * 100,
    ],
)  # fmt: skip
def test_what_is_no_date(written: str) -> None:
    assert math.isnan(days_of(cells(written), day_first=True)[0])
    assert not are_dates(cells(written))


@given(st.datetimes(min_value=datetime(1, 1, 1), max_value=datetime(9999, 12, 31)))
@settings(max_examples=60, deadline=None)
def test_any_moment_in_every_form_against_datetime(moment: datetime) -> None:
    moment = moment.replace(microsecond=0)
    expected = (moment.replace(tzinfo=UTC) - EPOCH) / timedelta(days=1)
    clock = f"{moment.hour:02d}:{moment.minute:02d}:{moment.second:02d}"
    day, month, year = moment.day, moment.month, f"{moment.year:04d}"
    forms = [
        f"{year}-{month:02d}-{day:02d}T{clock}Z",
        f"{day}.{month}.{year} {clock}",
        f"{day} {moment.strftime('%b')} {year} {clock}",
    ]
    assert days_of(cells(*forms), day_first=True) == pytest.approx([expected] * 3, abs=1e-8)
    assert days_of(cells(f"{month}/{day}/{year} {clock}"), day_first=False)[0] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("written", "first"),
    [
        (["3/4/2024", "12/31/2024"], False),
        (["3/4/2024", "31/12/2024"], True),
        (["3.4.2024"], True),
        (["3/4/2024"], False),
        (["3-4-2024", "5-6-2024"], True),
    ],
    ids=["12/31", "31/12", "points", "slashes", "hyphens"],
)
def test_whether_the_day_comes_first_is_told_by_the_column(written: list[str], first: bool) -> None:
    assert day_first(cells(*written)) is first
    column = describe(table_of(d=written * 10), "d", Path())
    if len(written) > 1:
        assert column.kind == "date"
        assert f"the {'day' if first else 'month'} first" in column.reason
    april = days_of(cells(written[0]), first)[0] == (date(2024, 4, 3) - date(1970, 1, 1)).days
    assert april == (first and "3" in written[0] and written[0][2] == "4")


def test_timestamps_of_parquet_are_dates_like_their_texts() -> None:
    moments = [datetime(2024, 1, 1, 6 * (i % 4), tzinfo=UTC) + timedelta(days=i) for i in range(N)]
    naive = pa.array([m.replace(tzinfo=None) for m in moments], pa.timestamp("ms"))
    schema, table = schema_of(
        a=naive, b=[m.isoformat() for m in moments], c=naive.cast(pa.timestamp("ns")), d=naive.cast(pa.date32())
    )
    assert set(kinds(schema).values()) == {"date", "target"}
    (numbers, _), _ = encode(schema, table, root=Path()).inputs["columns"]
    assert numbers.shape == (N, 5 + 5 + 5 + 3)  # time, weekday and hour; dates alone have no hour, two months no season
    assert torch.equal(numbers[:, :5], numbers[:, 5:10])
    assert torch.equal(numbers[:, :5], numbers[:, 10:15])


def test_circles_close_and_are_left_out_where_they_say_nothing() -> None:
    days = days_of(cells("2023-12-31 23:59", "2024-01-01 00:00", "2024-07-01 12:00"), day_first=False)
    circles = plan(days)
    assert circles == {"season": True, "weekday": True, "hour": True}
    shape = {"mean": 0.0, "std": 1e9, **circles}
    eve, new_year, summer = measures(days, shape)
    assert np.abs(eve - new_year)[[1, 2, 5, 6]].max() < 0.02  # the season and the hour; the weekday has changed
    assert np.abs(eve - new_year)[3:5].max() > 0.5
    assert np.linalg.norm(summer[1:3] - new_year[1:3]) == pytest.approx(2, abs=0.02)
    assert np.linalg.norm(summer[5:7] - new_year[5:7]) == pytest.approx(2)
    mondays = days_of(cells("2024-01-01", "2024-01-08"), day_first=False)
    assert plan(mondays) == {"season": False, "weekday": False, "hour": False}


def test_a_missing_date_is_missing_and_a_wrong_one_costs_its_row() -> None:
    written = [f"2024-{1 + i % 12:02d}-01" if i % 5 else None for i in range(N)]
    schema, table = schema_of(d=written)
    (numbers, _), present = encode(schema, table, root=Path()).inputs["columns"]
    assert torch.equal(present, torch.tensor([cell is not None for cell in written]))
    assert torch.equal(numbers.isnan().all(1), ~present)
    new = table_of(d=["2024-05-01", "soon", None])
    with pytest.raises(InputError, match=r"not a date at data frame, row 2, column 'd' ?: The value 'soon'"):
        encode(schema, new, root=Path(), with_target=False)
    data = encode(schema, new, root=Path(), with_target=False, skip_bad_rows=True)
    assert data.rows.tolist() == [0, 2]


def test_dates_with_a_few_words_among_them_are_refused() -> None:
    written = [f"2024-{1 + i % 12:02d}-{1 + i % 28:02d}" for i in range(N)]
    written[16] = "unknown"
    with pytest.raises(InputError, match=r"row 17, column 'd'.*59 values are dates, but 1 is not: 'unknown'"):
        schema_of(d=written)
    assert kinds(schema_of(d=written, overrides={"d": "text"})[0])["d"] == "text"
    with pytest.raises(InputError, match=r"row 17, column 'd': The value 'unknown' is not a date"):
        schema_of(d=written, overrides={"d": "date"})
    whole = [20240101 + i % 28 for i in range(N)]
    assert kinds(schema_of(d=whole)[0])["d"] == "number"
    assert kinds(schema_of(d=whole, overrides={"d": "date"})[0])["d"] == "date"


# ---------------------------------------------------------------- places


def angles(top: float, n: int = N) -> list[float]:
    return [round(float(v), 3) for v in np.random.default_rng(int(top)).uniform(-top, top, n)]


@pytest.mark.parametrize(
    ("latitude", "longitude"),
    [
        ("lat", "lon"), ("Latitude", "Longitude"), ("lat", "lng"), ("pickup_lat", "pickup_lon"), ("lat1", "lon1"),
        ("startLat", "startLng"), ("Breitengrad", "Längengrad"), ("широта", "долгота"), ("纬度", "经度"),
    ],
)  # fmt: skip
def test_two_columns_are_a_place_by_name(latitude: str, longitude: str) -> None:
    schema, _ = schema_of(**{latitude: angles(80), longitude: angles(170)})
    assert (kinds(schema)[latitude], kinds(schema)[longitude]) == ("latitude", "longitude")
    assert f"'{longitude}'" in schema.columns[0].reason
    assert schema.model_settings()["columns"]["numbers"] == 5


def test_what_is_no_place() -> None:
    columns = {"flat": angles(80), "colon": angles(170), "lat": angles(80), "y_lon": angles(170), "lon": angles(400)}
    assert set(kinds(schema_of(**columns)[0]).values()) == {"number", "target"}
    words = schema_of(lat=["north", "south"] * 30, lon=angles(170))[0]
    assert kinds(words) == {"lat": "category", "lon": "number", "y": "target"}
    for half in ("lat", "lon"):
        schema, _ = schema_of(lat=angles(80), lon=angles(170), overrides={half: "number"})
        assert kinds(schema) == {"lat": "number", "lon": "number", "y": "target"}


def test_a_place_against_trigonometry() -> None:
    lat, lon = [0.0, 0.0, 90.0, 48.137, None, 10.0], [0.0, 90.0, 17.0, 11.575, 20.0, None]
    schema, _ = schema_of(lat=angles(80), lon=angles(170))
    data = encode(schema, table_of(lat=lat, lon=lon), root=Path(), with_target=False)
    (numbers, _), present = data.inputs["columns"]
    munich = [math.radians(48.137), math.radians(11.575)]
    xyz = [math.cos(munich[0]) * math.cos(munich[1]), math.cos(munich[0]) * math.sin(munich[1]), math.sin(munich[0])]
    expected = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], xyz])
    assert torch.allclose(numbers[:4, :3], expected, atol=1e-6)
    assert numbers[4:].isnan().tolist() == [[True, True, True, True, False], [True, True, True, False, True]]
    assert present.all()
    west = encode(schema, table_of(lat=[1.0, 1.0], lon=[-90.0, 270.0]), root=Path(), with_target=False)
    (both, _), _ = west.inputs["columns"]
    assert torch.equal(both[0], both[1])


def test_places_by_other_names_and_errors() -> None:
    schema, _ = schema_of(n=angles(80), e=angles(170), overrides={"n": "latitude", "e": "longitude"})
    assert kinds(schema) == {"n": "latitude", "e": "longitude", "y": "target"}
    again = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    assert again == schema
    with pytest.raises(InputError, match=r"half a place at data frame, column 'n'"):
        schema_of(n=angles(80), e=angles(170), overrides={"n": "latitude"})
    with pytest.raises(
        InputError, match=r"not an angle at data frame, row 17, column 'n': The value 91 is no latitude"
    ):
        schema_of(
            n=[*angles(80)[:16], 91.0, *angles(80)[17:]], e=angles(170), overrides={"n": "latitude", "e": "longitude"}
        )
    new = table_of(n=[10.0, 95.0], e=[10.0, 400.0])
    with pytest.raises(InputError, match=r"row 2, column 'n'.*-90 to 90"):
        encode(schema, new, root=Path(), with_target=False)
    assert len(encode(schema, new, root=Path(), with_target=False, skip_bad_rows=True)) == 1


def test_a_place_with_half_its_columns_missing_at_prediction() -> None:
    schema, _ = schema_of(lat=angles(80), lon=angles(170), w=angles(3))
    data = encode(schema, table_of(lat=[1.0], w=[2.0]), root=Path(), with_target=False)
    (numbers, _), _ = data.inputs["columns"]
    assert numbers[0].isnan().tolist() == [True, True, True, False, True, False]
    assert [f.value for f in data.findings] == ["lon"]


# ---------------------------------------------------------------- sequences of pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures, each of one brightness."""
    for i in range(10):
        Image.new("L", (9, 8), 20 * i).save(tmp_path / f"{i}.png")
    return tmp_path


def names(i: int) -> list[str]:
    return [f"{(i + k) % 10}.png" for k in range(i % 4)]


FORMS: dict[str, list[Any]] = {
    "bars": ["|".join(names(i)) or None for i in range(N)],
    "semicolons": ["; ".join(names(i)) or None for i in range(N)],
    "json": [json.dumps(names(i)) for i in range(N)],
    "lists": [names(i) for i in range(N)],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_sequences(folder: Path, form: str) -> None:
    schema, table = schema_of(folder, photos=FORMS[form])
    assert kinds(schema)["photos"] == "images"
    data = encode(schema, table, root=folder)
    (pictures, counts), present = data.inputs["images_photos"]
    assert pictures.shape == (N, 3, 1, 8, 9)
    assert counts.tolist() == [i % 4 for i in range(N)]
    assert present.tolist() == [i % 4 > 0 for i in range(N)]
    for i in range(N):
        shown = [int(pictures[i, k].float().mean()) for k in range(i % 4)]
        assert shown == [20 * ((i + k) % 10) for k in range(i % 4)]
        assert not pictures[i, i % 4 :].any()
    model = FusedModel(schema.model_settings(), schema.outputs)
    inputs, _ = data.batch(slice(0, 8))
    assert torch.equal(model(**inputs), model(**model.prepare(inputs)))


def test_one_path_with_a_semicolon_in_its_name_is_one_picture(folder: Path) -> None:
    (folder / "0.png").rename(folder / "a;b.png")
    (folder / "b.png").write_bytes((folder / "1.png").read_bytes())
    schema, _ = schema_of(folder, photo=[f"{1 + i % 9}.png" for i in range(N - 1)] + ["a;b.png"])
    assert kinds(schema)["photo"] == "image"


def test_one_row_with_several_pictures_is_enough(folder: Path) -> None:
    schema, _ = schema_of(folder, photo=[f"{i % 10}.png" for i in range(N - 3)] + ["1.png|2.png", "3.png", "4.png"])
    assert kinds(schema)["photo"] == "images"


def test_long_sequences_are_thinned_evenly(folder: Path) -> None:
    schema, table = schema_of(folder, photos=["0.png|1.png"] * (N - 1) + ["|".join(f"{i}.png" for i in range(9))])
    assert schema.columns[0].settings["length"] == 2
    (pictures, counts), _ = encode(schema, table, root=folder).inputs["images_photos"]
    assert counts[-1] == 2
    assert [int(p.float().mean()) for p in pictures[-1]] == [0, 160]
    assert evenly(list(range(9)), 3) == [0, 4, 8]


def test_a_picture_of_a_sequence_that_cannot_be_read_costs_its_row(folder: Path) -> None:
    (folder / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    schema, table = schema_of(folder, photos=["0.png|1.png"] * (N - 1) + ["2.png|3.png"])
    with pytest.raises(InputError, match=r"undecodable image at data frame, row 60, column 'photos' \(2.png\|3.png\)"):
        encode(schema, table, root=folder)
    assert len(encode(schema, table, root=folder, skip_bad_rows=True)) == N - 1
    with pytest.raises(InputError, match=r"outside the data folder at data frame, row 1, column 'photos'"):
        encode(schema, table_of(photos=["0.png|../1.png"]), root=folder, with_target=False)


def test_neither_order_nor_what_lies_behind_the_last_matters() -> None:
    shape = {"height": 8, "width": 8, "channels": 1, "mean": [30.0], "std": [60.0], "length": 4}
    encoder = images.Encoder(shape).double()
    pictures = torch.randint(0, 255, (3, 4, 1, 8, 8), dtype=torch.uint8)
    counts = torch.tensor([4, 2, 0])
    out = encoder((pictures, counts))
    pictures[1] = pictures[1][[1, 0, 3, 2]]
    pictures[0] = pictures[0].flip(0)
    pictures[2] = 0
    assert torch.allclose(encoder((pictures, counts)), out)
    for i, count in ((0, 4), (1, 2)):
        each = encoder.tower(pictures[i, :count])
        by_hand = encoder.features(torch.cat([each.mean(0), each.amax(0)])).relu()
        assert torch.allclose(out[i], by_hand)


def test_cells_of_several_paths() -> None:
    assert paths_in(" a.png |b.png;") == ["a.png", "b.png"]
    assert paths_in("[1, 2]") == ["[1, 2]"]
    assert sequences(pa.array([["a", None, " "], [], None, [None]])) == [["a"], None, None, None]


def test_several_columns_of_one_modality_have_an_encoder_each(folder: Path) -> None:
    photo, logo = [f"{i % 10}.png" for i in range(N)], [f"{(3 * i) % 10}.png" if i % 7 else None for i in range(N)]
    schema, table = schema_of(folder, photo=photo, logo=logo)
    data = encode(schema, table, root=folder)
    assert list(data.inputs) == ["image_photo", "image_logo"]
    model = FusedModel(schema.model_settings(), schema.outputs)
    assert model.encoders["image_photo"] is not model.encoders["image_logo"]
    inputs, _ = data.batch(slice(0, 16))
    model(**inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoders.parameters() if p.dim() > 1)
