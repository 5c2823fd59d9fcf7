"""What columns are taken for, what is predicted, how rows are split, and what the schema remembers."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hesse import InputError
from hesse.multimodal import FusedModel, Schema, Table, encode, make_schema, read_table
from hesse.multimodal.columns import describe
from hesse.multimodal.media import find_file
from hesse.multimodal.split import stratified_split
from hesse.multimodal.values import labels, not_numbers, try_numbers

N = 60
WORDS = [f"{a} {b}" for a in ("big", "small", "old", "shy") for b in "abcdefghijklmno"]


def table_of(**columns: list[Any]) -> Table:
    return read_table(pa.table(columns))


def schema_of(root: Path = Path(), target: str = "y", **columns: list[Any]) -> Schema:
    columns.setdefault("y", ["yes", "no"] * (N // 2))
    columns.setdefault("x", [i * i % 97 for i in range(N)])
    return make_schema(table_of(**columns), target, root=root)[0]


@pytest.mark.parametrize(
    ("name", "values", "kind", "role"),
    [
        ("weight", [str(i / 7) for i in range(N)], "number", "input"),
        ("legs", ["2", "4"] * 30, "number", "input"),
        ("+", ["+1", " -.5e3", "inf", None] * 15, "number", "input"),
        ("size", ["S", "M", "L"] * 20, "category", "input"),
        ("more", ["1", "2", "3+"] * 20, "category", "input"),
        ("bool", [True, False, None] * 20, "category", "input"),
        ("story", WORDS, "text", "input"),
        ("first name", [w.split()[1] + w.split()[0] for w in WORDS], "text", "input"),
        ("day", [f"2024-01-{1 + i % 30:02d}" for i in range(N)], "date", "input"),
        ("month", ["2024-01-01", "2024-02-01"] * 30, "date", "input"),
        ("constant", ["a"] * N, "text", "ignored"),
        ("empty", [None] * N, "text", "ignored"),
        ("nested", [[1]] * N, "text", "ignored"),
        ("anything", list(range(1, 1 + N)), "number", "ignored"),
        ("year", list(range(1990, 1990 + N)), "number", "input"),
        ("customer_id", [i * 7 % 1009 for i in range(N)], "number", "ignored"),
        ("humid", [i * 7 % 1009 for i in range(N)], "number", "input"),
        ("code", [f"{i * i:04x}7" for i in range(N)], "text", "ignored"),
        ("petID", [w.replace(" ", "") for w in WORDS], "text", "ignored"),
        ("ticket", [f"A/{i} {i * 37 % 1000}" for i in range(N)], "text", "input"),
    ],
)  # fmt: skip
def test_kinds(name: str, values: list[Any], kind: str, role: str) -> None:
    column = describe(table_of(**{name: values}), name, Path())
    assert (column.kind, column.role) == (kind, role), column.reason
    assert column.reason
    assert column.missing == values.count(None)


def test_numbers_with_a_few_words_are_refused() -> None:
    values = [str(i) for i in range(20, 20 + N)]
    values[16] = "unknown"
    with pytest.raises(InputError, match="59 values are numbers, but 1 is not: 'unknown'") as caught:
        schema_of(age=values)
    assert caught.value.finding.where == "data frame, row 17, column 'age'"
    assert "--column age=category" in caught.value.finding.remedy
    with pytest.raises(InputError, match="row 17"):
        make_schema(table_of(age=values, x=WORDS), "age", root=Path())
    with pytest.raises(InputError, match=r"not a number at data frame, row 17, column 'age': The value 'unknown'"):
        make_schema(table_of(age=values, y=["a", "b"] * 30), "y", overrides={"age": "number"}, root=Path())
    schema, _ = make_schema(table_of(age=values, y=["a", "b"] * 30), "y", overrides={"age": "category"}, root=Path())
    assert schema.columns[0].kind == "category"


def test_media_columns(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "img" / "Ä 1.PNG")
    table = table_of(photo=["img/Ä 1.PNG", None] + [f"img/{i}.png" for i in range(28)])
    assert describe(table, "photo", tmp_path).kind == "image"
    with pytest.raises(InputError, match="none of them exists") as caught:
        describe(table, "photo", tmp_path / "img")
    assert caught.value.finding.where == "data frame, row 1, column 'photo'"
    assert describe(table, "photo", tmp_path / "img", "text").kind == "text"
    assert describe(table_of(s=[f"s{i}.flac" for i in range(30)]), "s", tmp_path, "audio").kind == "audio"


def test_a_path_may_not_leave_the_data_folder(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    outside = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "up/secret.png",
        "..",
        ".",
        "../data2/a.png",
    ]
    for cell in outside:
        with pytest.raises(InputError, match="outside the data folder"):
            find_file(root, cell)
    for cell in ["a.png", "b/../a.png", str(root / "a.png"), "loop", "x" * 5000, "..."]:
        assert root.resolve() in find_file(root, cell).parents
    with pytest.raises(InputError, match=r"outside.*row 1, column 'photo' \(\.\./secret\.png\).*--data-root"):
        schema_of(root, photo=["../secret.png", "a.png"] * 30)
    assert find_file(tmp_path, "data/../secret.png").name == "secret.png"


def test_names_in_either_unicode_form_are_found(tmp_path: Path) -> None:
    (tmp_path / "cafe\u0301.png").write_bytes(b"")
    assert find_file(tmp_path, "caf\u00e9.png").exists()


def test_overrides_and_names_that_do_not_fit() -> None:
    table = table_of(size=["S", "M"] * 30, weight=list(np.linspace(0, 1, N)), y=["a", "b"] * 30)
    cases: list[tuple[dict[str, str], str]] = [
        ({"siez": "text"}, r"no column 'siez'.*Did you mean 'size'"),
        ({"size": "colour"}, "no kind 'colour'.*image, audio, text, number, category, date, .*images, ignore"),
        ({"weight": "image"}, "not paths of image files"),
        ({"size": "number"}, "row 1, column 'size': The value 'S' is not a number"),
        ({"y": "text"}, "target cannot be read as 'text'"),
        ({"size": "ignore", "weight": "ignore"}, r"No column is left to predict from: size \(as asked\)"),
    ]
    for overrides, message in cases:
        with pytest.raises(InputError, match=message):
            make_schema(table, "y", overrides=overrides, root=Path())
    with pytest.raises(InputError, match=r"no such target.*Did you mean 'y'"):
        make_schema(table, "Y", root=Path())
    with pytest.raises(InputError, match=r"column 'a': The column holds list<.*> values, not texts or numbers"):
        make_schema(table_of(a=[[1]] * 10, y=["a", "b"] * 5), "y", overrides={"a": "text"}, root=Path())


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        (["b", "a"] * 30, "classification", ("a", "b")),
        ([10, 9, 2] * 20, "classification", ("2", "9", "10")),
        (["10.0", "9.0"] * 30, "classification", ("9", "10")),
        ([True, False] * 30, "classification", ("false", "true")),
        (["1", "2", "x"] * 20, "classification", ("1", "2", "x")),
        ([0.5, 1.5] * 30, "regression", ()),
        (list(range(N)), "regression", ()),
        ([i % 13 for i in range(N)], "regression", ()),
    ],
)
def test_task(values: list[Any], task: str, classes: tuple[str, ...]) -> None:
    schema = schema_of(y=values)
    assert (schema.targets[0].task, schema.targets[0].classes) == (task, classes)
    assert schema.outputs == (len(classes) or 1)


def test_task_as_asked() -> None:
    table = table_of(y=[i % 13 for i in range(N)], x=WORDS)
    assert make_schema(table, "y", overrides={"y": "category"}, root=Path())[0].outputs == 13
    table = table_of(y=[0, 1] * 30, x=WORDS)
    schema, parts = make_schema(table, "y", overrides={"y": "number"}, root=Path())
    target = np.array([0, 1] * 30)[parts["train"]]
    assert (schema.targets[0].mean, schema.targets[0].scale) == pytest.approx((target.mean(), target.std()))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"y": ["a"] * N, "x": WORDS}, "one class.*the same, 'a'"),
        ({"y": [None] * N, "x": WORDS}, "no target.*missing"),
        ({"y": [1.5] * N, "x": WORDS}, "the same, '1.5'"),
        ({"y": WORDS, "x": WORDS}, "60 different texts in 60 rows are not classes"),
        ({"y": [math.inf, 1.5, 2.5] * 20, "x": WORDS}, "row 1, column 'y': The target is inf"),
        ({"y": [[1]] * N, "x": WORDS}, "the same, '1'"),
        ({"y": [{"a": 1}] * N, "x": WORDS}, "struct"),
        ({"y": ["a", "b"] * 30}, "The target is the only column"),
        ({"y": ["a"], "x": ["b"]}, "one row"),
        ({"y": ["a", "b"], "x": ["c", "d"]}, "too few rows"),
    ],
)
def test_unusable_targets(columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_schema(table_of(**columns), "y", root=Path())


@given(st.lists(st.integers(0, 6), min_size=2, max_size=120), st.integers(0, 5))
def test_stratified_split(strata: list[int], seed: int) -> None:
    """Against the definition: a partition, every class in train, every class's share within one row."""
    rows = np.arange(len(strata)) * 3
    parts = stratified_split(np.array(strata), rows, seed)
    assert sorted(np.concatenate(list(parts.values()))) == rows.tolist()
    count = {name: Counter(strata[row // 3] for row in part) for name, part in parts.items()}
    for stratum, size in Counter(strata).items():
        assert count["train"][stratum] >= 1
        for name in ("valid", "test"):
            assert abs(count[name][stratum] - (size - 1) / 10) <= 1
    assert len(parts["valid"]) == -(-(len(strata) - len(set(strata))) // 10)
    again = stratified_split(np.array(strata), rows, seed)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)


def test_split_depends_on_the_seed() -> None:
    first, second = (stratified_split(np.zeros(100, int), np.arange(100), seed)["valid"] for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_split_column() -> None:
    part = (["Train", "VAL", "test"] * 20)[:N]
    columns: dict[str, list[Any]] = {"y": ["a", "b"] * 30, "x": WORDS, "part": part}
    schema, parts = make_schema(table_of(**columns), "y", split_column="part", root=Path())
    assert [rows.tolist() for rows in parts.values()] == [list(range(k, N, 3)) for k in range(3)]
    assert schema.columns[2].role == "split"

    columns["part"] = ["train", "test"] * 30
    columns["y"] = ["a", "a", "b", "b"] * 15
    _, parts = make_schema(table_of(**columns), "y", split_column="part", root=Path())
    assert (len(parts["train"]), len(parts["valid"]), len(parts["test"])) == (27, 3, 30)
    assert set(parts["test"]) == set(range(1, N, 2))

    for wrong in ("holdout", None):
        columns["part"][16] = wrong
        with pytest.raises(InputError, match="row 17, column 'part'"):
            make_schema(table_of(**columns), "y", split_column="part", root=Path())
    columns["part"] = [["train"]] * N
    with pytest.raises(InputError, match="not texts or numbers"):
        make_schema(table_of(**columns), "y", split_column="part", root=Path())
    columns["part"] = ["test"] * N
    with pytest.raises(InputError, match="No row says train"):
        make_schema(table_of(**columns), "y", split_column="part", root=Path())


def test_rows_without_target_are_in_no_part() -> None:
    table = table_of(y=["a", None, "b"] * 20, x=WORDS)
    _, parts = make_schema(table, "y", root=Path())
    assert not any((rows % 3 == 1).any() for rows in parts.values())


def test_statistics_come_from_training_rows_alone() -> None:
    part = ["train"] * 40 + ["valid"] * 10 + ["test"] * 10
    x = [float(i * i % 31) for i in range(40)] + [1e6] * 20
    c = ["a", "b"] * 10 + ["b"] * 20 + ["z"] * 20
    table = table_of(y=["a", "b"] * 30, part=part, x=x, c=c, late=[None] * 40 + [1.0, 2.0] * 10)
    schema, _ = make_schema(table, "y", split_column="part", root=Path())
    by_name = {column.name: column for column in schema.columns}
    assert by_name["x"].settings == {"mean": np.mean(x[:40]), "std": np.std(x[:40])}
    assert by_name["c"].settings == {"values": ["b", "a"], "other": False}
    assert by_name["late"].reason == "missing in every training row"


def test_one_huge_value_does_not_flatten_the_others() -> None:
    normal = np.random.default_rng(0).normal(5, 2, N)
    settings = schema_of(x=[*normal[:-2], 1e300, -math.inf]).columns
    x = next(column for column in settings if column.name == "x").settings
    assert x["mean"] == pytest.approx(5, abs=2)
    assert x["std"] == pytest.approx(2, rel=1)
    zeros = schema_of(x=[0.0] * 58 + [1e300, 1.0]).columns
    assert all(math.isfinite(column.settings["std"]) for column in zeros if column.name == "x")


def test_modalities_have_names_that_modules_can_have(tmp_path: Path) -> None:
    schema = schema_of(**{"a.b": WORDS, "a b": WORDS, "हिन्दी": WORDS, "size": ["S", "M", "L"] * 20})
    assert list(schema.modalities) == ["text_a_b", "text_a_b_", "text_हिन्दी", "columns"]
    settings = schema.model_settings()
    assert settings["columns"] == {"kind": "columns", "numbers": 1, "categories": [4]}
    FusedModel(settings, schema.outputs)


def test_schema_is_json() -> None:
    schema = schema_of(size=["S", "M", None] * 20, story=WORDS)
    again = Schema.from_json(json.loads(json.dumps(schema.to_json(), allow_nan=False)))
    assert again == schema
    assert list(schema.rows()[0]) == ["name", "kind", "role", "reason", "missing", "unique", "example"]


def test_many_categories_share_a_code() -> None:
    words = [f"w{i}x" for i in range(1200) for _ in range(20 if i < 999 else 2)]
    table = table_of(c=words, y=["a", "b"] * (len(words) // 2))
    schema, _ = make_schema(table, "y", overrides={"c": "category"}, root=Path())
    assert schema.model_settings()["columns"]["categories"] == [1001]
    (_, codes), _ = encode(schema, table, root=Path()).inputs["columns"]
    assert set(codes[-402:, 0].tolist()) == {1000}
    assert 1000 not in codes[:-402]


@given(st.text(max_size=12) | st.from_regex(r"[-+]?[0-9.]*([eE][-+]?[0-9]*)?|-?(inf|nan)", fullmatch=True))
def test_what_is_no_number_is_found(text: str) -> None:
    """The cast that parses and the pattern that locates must agree on every text."""
    values = pa.array([text], pa.large_string())
    assert (try_numbers(values) is None) == bool(len(not_numbers(values)))


def test_labels_do_not_depend_on_the_file_format() -> None:
    expected = ["1", "true", "é", "007", "-3"]
    assert labels(pa.array(["1.0", "TRUE", "e\u0301", "007", "-3.00"], pa.large_string())).to_pylist() == expected
    assert labels(pa.array([1, None])).to_pylist() == labels(pa.array([1.0, None])).to_pylist() == ["1", None]
