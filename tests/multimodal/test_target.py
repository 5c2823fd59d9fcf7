"""Targets: labels in lists and texts, several at once, weights, splits, and what cannot be predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from hesse import InputError
from hesse.multimodal import Dataset, Schema, encode, make_schema, read_table
from hesse.multimodal.label_lists import likely_separator
from hesse.multimodal.split import Parts

N = 60
X = np.random.default_rng(0).normal(size=N).tolist()
COLOURS = ("big", "red", "round")


def random_labels(seed: int = 0, rows: int = N) -> list[list[str]]:
    random = np.random.default_rng(seed)
    return [[c for c in COLOURS if random.random() < 0.4] for _ in range(rows)]


def read(targets: str | list[str], columns: dict[str, Any], **options: Any) -> tuple[Schema, Parts, Dataset]:
    table = read_table(pa.table({"x": X[: len(next(iter(columns.values())))], **columns}))
    schema, parts = make_schema(table, targets, root=Path(), **options)
    return schema, parts, encode(schema, table, root=Path())


FORMS = {
    "lists": lambda labels: labels,
    "large lists": lambda labels: pa.array(labels, pa.large_list(pa.large_string())),
    "bars": "|".join,
    "semicolons": "; ".join,
    "commas": ", ".join,
    "JSON": json.dumps,
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_read_from_every_form(form: str) -> None:
    labels = random_labels()
    write = FORMS[form]
    cells = write(labels) if "lists" in form else [write(each) for each in labels]
    schema, _, data = read("y", {"y": cells})
    (target,) = schema.targets
    assert (target.task, target.classes, schema.outputs) == ("multilabel", COLOURS, 3)
    kept = [i for i in range(N) if labels[i] or "lists" in form or form == "JSON"]  # an empty text is a missing cell
    assert data.rows.tolist() == kept
    expected = [[float(c in labels[i]) for c in COLOURS] for i in kept]
    assert data.targets.tolist() == expected


def test_labels_are_normalised_as_classes_are() -> None:
    schema, _, data = read("y", {"y": [[" 1.0", "café"], ["1", "cafe\u0301", ""], []] * 20})
    assert schema.targets[0].classes == ("1", "café")
    assert data.targets[:3].tolist() == [[1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize(
    "cells",
    [
        pytest.param(["Paris, France", "Lyon, France", "Berlin, Germany"] * 20, id="places"),
        pytest.param(["France|Paris", "France|Lyon", "Germany|Berlin"] * 20, id="paths"),
        pytest.param(
            ["red, short", "red, long", "blue, short", "blue, long", "red, wide", "blue, wide"] * 10, id="parts"
        ),
        pytest.param(["a", "b", "a;b"] * 1 + ["a", "b"] * 28, id="one accident"),
        pytest.param([f"w{i}; x{i}" for i in range(N)], id="never again"),
        pytest.param(["yes", "no"] * 30, id="classes"),
        pytest.param(["[1]", "[x"] * 30, id="half a list"),
    ],
)
def test_other_texts_are_no_lists(cells: list[str]) -> None:
    assert likely_separator(pa.array(cells, pa.large_string())) is None


def test_as_asked() -> None:
    labels = random_labels()
    cells = ["|".join(each) or "none" for each in labels]
    schema, _, _ = read("y", {"y": cells}, overrides={"y": "category"})
    assert schema.targets[0].task == "classification"
    assert len(schema.targets[0].classes) == len(set(cells))
    schema, _, data = read("y", {"y": ["a,b", "b", "a", "b"] * 15}, overrides={"y": "labels"})
    assert (schema.targets[0].classes, schema.targets[0].separator) == (("a", "b"), ",")
    assert data.targets[:2].tolist() == [[1, 1], [0, 1]]
    with pytest.raises(InputError, match="A target of lists cannot be read as 'category'"):
        read("y", {"y": labels}, overrides={"y": "category"})
    with pytest.raises(InputError, match="cannot be read as 'image'"):
        read("y", {"y": cells}, overrides={"y": "image"})


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        pytest.param([["a", "b"]] * N, r"one class.*the same, 'a\|b'", id="one set"),
        pytest.param([[]] * N, r"one class.*the same, '\[\]'", id="no label"),
        pytest.param([None] * (N - 1) + [[]], "one class", id="nothing"),
        pytest.param([[f"w{i}"] for i in range(N)], "60 different labels in 60 rows", id="rare"),
        pytest.param([[{"a": i % 2}] for i in range(N)], "not lists of labels", id="structures"),
    ],
)
def test_lists_that_cannot_be_predicted(cells: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read("y", {"y": cells})


def test_too_many_labels_say_so() -> None:
    cells = [[str(i), str(i + 1)] for i in range(2100)] * 3
    table = read_table(pa.table({"x": list(range(len(cells))), "y": cells}))
    with pytest.raises(InputError, match=r"2101 different labels.*Up to 2000"):
        make_schema(table, "y", root=Path())


def test_another_table_is_read_alike() -> None:
    """Trained on lists, evaluated on texts and the other way round; a new label and a broken list are named."""
    labels = random_labels()
    schema, _, _ = read("y", {"y": [json.dumps(each) for each in labels]})
    other = read_table(pa.table({"x": X[:2], "y": [["red"], ["big", "round"]]}))
    assert encode(schema, other, root=Path()).targets.tolist() == [[0, 1, 0], [1, 0, 1]]
    broken = read_table(pa.table({"x": X[:2], "y": ['["red"]', "red"]}))
    with pytest.raises(InputError, match="row 2, column 'y': The value 'red' is not a JSON list"):
        encode(schema, broken, root=Path())
    new = read_table(pa.table({"x": X[:3], "y": [["red"], None, ["green"]]}))
    with pytest.raises(InputError, match=r"row 3, column 'y'.*'green'"):
        encode(schema, new, root=Path())


def test_several_targets_keep_rows_that_have_any() -> None:
    y = [None if i % 5 == 0 else "ab"[i % 2] for i in range(N)]
    z = [None if i % 10 < 3 else i / 7 for i in range(N)]
    labels = [None if i % 10 == 0 else each for i, each in enumerate(random_labels())]
    schema, parts, data = read(["z", "y", "t"], {"y": y, "z": z, "t": labels})
    assert [target.name for target in schema.targets] == ["z", "y", "t"]
    assert (schema.outputs, schema.slices) == (6, (slice(0, 1), slice(1, 3), slice(3, 6)))
    assert [column.role for column in schema.columns] == ["input", "target", "target", "target"]
    kept = [i for i in range(N) if i % 10]
    assert data.rows.tolist() == kept
    assert sorted(np.concatenate(list(parts.values())).tolist()) == kept
    values, classes, several = data.targets
    assert classes.tolist() == [-100 if y[i] is None else "ab".index(y[i]) for i in kept]
    assert np.isnan(values[:, 0].numpy()).tolist() == [z[i] is None for i in kept]
    train = np.array([z[i] for i in parts["train"] if z[i] is not None])
    target = schema.targets[0]
    assert (target.mean, target.scale) == pytest.approx((train.mean(), train.std()))
    assert target.share == pytest.approx(len(train) / len(parts["train"]))
    assert not np.isnan(several.numpy()).any()  # its gaps are those rows that have nothing
    inputs, (one, two, three) = data.batch([1, 2])
    assert (len(one), len(two), len(three), len(inputs["columns"][1])) == (2, 2, 2, 2)
    with pytest.raises(InputError, match="no such target"):
        read(["y", "nobody"], {"y": y})
    with pytest.raises(InputError, match="No column to predict"):
        read([], {"y": y})


def test_a_schema_is_read_back_and_so_is_one_of_the_first_version() -> None:
    schema, _, _ = read(["y", "z"], {"y": ["a", "b", "b"] * 20, "z": X}, class_weights="balanced")
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    schema, _, _ = read("z", {"z": X})
    (target,) = schema.targets
    old = {"target": "z", "task": "regression", "classes": [], "mean": target.mean, "scale": target.scale}
    old["columns"] = schema.to_json()["columns"]
    assert Schema.from_json(old) == schema


def test_balanced_weights_are_scikit_learns() -> None:
    y = ["a"] * 40 + ["b"] * 15 + ["c"] * 5
    schema, parts, _ = read("y", {"y": y}, class_weights="balanced")
    train = np.array(y)[parts["train"]]
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=train)
    assert schema.targets[0].weights == pytest.approx(expected)
    assert read("y", {"y": y})[0].targets[0].weights == ()
    labels = random_labels()
    schema, parts, _ = read("y", {"y": labels}, class_weights="balanced")
    has = np.array([[c in labels[i] for c in COLOURS] for i in parts["train"]])
    assert schema.targets[0].weights == pytest.approx((~has).sum(0) / has.sum(0))
    with pytest.raises(InputError, match="The target is a quantity"):
        read("z", {"z": X}, class_weights="balanced")
    with pytest.raises(InputError, match=r"no class weights 'equal'.*balanced"):
        read("y", {"y": y}, class_weights="equal")


def test_the_prior_is_the_best_constant_answer() -> None:
    """Its loss is at a minimum: no small move along it is better; what never occurs is not impossible."""
    y = ["a"] * 40 + ["b"] * 15 + ["c"] * 5
    labels = random_labels()
    for weigh in (None, "balanced"):
        schema, parts, data = read(["y", "t"], {"y": y, "t": labels}, class_weights=weigh)
        for target, actual, loss in zip(
            schema.targets, data.targets, (F.cross_entropy, F.binary_cross_entropy_with_logits), strict=True
        ):
            rows = actual[data.positions(parts["train"])]
            prior = torch.tensor(target.prior, dtype=torch.float64)
            out = (prior.log() if target.task == "classification" else prior.logit()).requires_grad_()
            options = {"weight" if target.task == "classification" else "pos_weight": torch.tensor(target.weights)}
            options = {name: value.double() for name, value in options.items() if len(value)}
            loss(out.expand(len(rows), -1), rows.double() if rows.is_floating_point() else rows, **options).backward()
            assert out.grad.abs().max() < 1e-6
    part = ["train"] * 50 + ["valid"] * 10
    schema, _, _ = read("y", {"y": ["a", "b"] * 25 + ["c"] * 10, "part": part}, split_column="part")
    assert schema.targets[0].prior == pytest.approx((25 / 50.5, 25 / 50.5, 0.5 / 50.5))
    cells = [["a", "b"] if i % 2 else ["a"] for i in range(50)] + [["c"]] * 10
    schema, _, _ = read("y", {"y": cells, "part": part}, split_column="part")
    assert schema.targets[0].prior == pytest.approx((49.5 / 50, 0.5, 0.5 / 50))


def test_the_rarest_label_is_in_every_part() -> None:
    """Dealt by their rarest label: ten rows have it, so each tenth gets one; by chance it would be missing often."""
    for seed in range(5):
        common = random_labels(seed, 200)
        labels = [[*each, "rare"] if i % 20 == 7 else each for i, each in enumerate(common)]
        table = read_table(pa.table({"x": [i % 7 for i in range(200)], "y": labels}))
        _, parts = make_schema(table, "y", root=Path(), seed=seed)
        rare = {name: sum("rare" in labels[i] for i in rows) for name, rows in parts.items()}
        assert rare["train"] >= 7
        assert rare["valid"] >= 1 or rare["test"] >= 1
        assert sum(len(rows) for rows in parts.values()) == 200


def test_a_split_that_leaves_one_class_to_train_on_is_refused() -> None:
    part = ["train"] * 30 + ["valid"] * 30
    with pytest.raises(InputError, match="Every row that is trained on has the same class, 'a'"):
        read("y", {"y": ["a"] * 30 + ["b"] * 30, "part": part}, split_column="part")
    with pytest.raises(InputError, match="No row that is trained on has the target"):
        columns = {"y": ["a", "b"] * 30, "z": [None] * 30 + X[:30], "part": part}
        read(["y", "z"], columns, split_column="part")
    with pytest.raises(InputError, match="also the split column"):
        read(["y", "part"], {"y": ["a", "b"] * 30, "part": part}, split_column="part")


def test_a_row_without_any_label_says_so_by_the_separator_and_an_empty_cell_is_unknown() -> None:
    table = read_table(pa.table({"x": [i % 9 / 7 for i in range(40)], "tags": ["a|b", "b", "|", "a", ""] * 8}))
    schema, _ = make_schema(table, "tags", root=Path())
    data = encode(schema, table, root=Path())
    assert data.targets is not None and data.targets[:4].tolist() == [[1, 1], [0, 1], [0, 0], [1, 0]]
    (finding,) = data.findings
    assert finding.value == 8 and "If a row has none of the labels, write '|' alone" in finding.remedy
