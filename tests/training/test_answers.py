"""What predictions look like: columns, names, labels in cells, thresholds."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

from hesse import InputError
from hesse.files import read_lines
from hesse.multimodal import Schema, read_table
from hesse.multimodal.target import Target
from hesse.training.answers import answer, flat, refuse_threshold, separators
from hesse.training.predictions import written

BINARY = Target("b", "classification", ("no", "yes"))
LABELS = Target("l", "multilabel", ("x", "y"))
VALUE = Target("v", "regression", (), 10.0, 2.0)


def schema(*targets: Target) -> Schema:
    return Schema((), targets)


def test_a_class_with_calibrated_probabilities() -> None:
    out = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    rows = answer(schema(BINARY), out, {"b": {"temperature": 2.0}})
    assert rows.column_names == ["b", "confidence", "probability of no", "probability of yes"]
    assert rows["b"].to_pylist() == ["no", "yes"]
    p = (out.double() / 2).softmax(1)
    assert rows["confidence"].to_pylist() == pytest.approx(p.max(1).values.tolist())
    assert rows["probability of yes"].to_pylist() == pytest.approx(p[:, 1].tolist())


def test_a_quantity_is_in_its_own_units() -> None:
    assert answer(schema(VALUE), torch.tensor([[0.5], [-1.0]]), {}).to_pydict() == {"v": [11.0, 8.0]}


def test_labels_are_lists_by_their_own_thresholds() -> None:
    out = torch.tensor([[0.1, 0.1], [-3.0, 3.0], [-3.0, -3.0]])
    cuts = {"l": {"temperature": 1.0, "threshold": {"x": 0.5, "y": 0.9}}}
    rows = answer(schema(LABELS), out, cuts)
    assert rows["l"].to_pylist() == [["x"], ["y"], []]
    assert rows.column_names == ["l", "probability of x", "probability of y"]
    assert answer(schema(LABELS), out, {})["l"].to_pylist() == [["x", "y"], ["y"], []]
    assert answer(schema(LABELS), out, cuts, 0.01)["l"].to_pylist() == [["x", "y"]] * 3
    assert answer(schema(LABELS), out, cuts, "best")["l"].to_pylist() == [["x"], ["y"], []]


def test_a_threshold_moves_the_second_of_two_classes_and_no_other() -> None:
    out = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # 27 % and 73 % of "yes"
    fitted = {"b": {"temperature": 1.0, "threshold": 0.2}}
    assert answer(schema(BINARY), out, fitted)["b"].to_pylist() == ["no", "yes"]
    rows = answer(schema(BINARY), out, fitted, "best")
    assert rows["b"].to_pylist() == ["yes", "yes"]
    assert rows["confidence"].to_pylist() == rows["probability of yes"].to_pylist()
    assert answer(schema(BINARY), out, fitted, 0.8)["b"].to_pylist() == ["no", "no"]
    three = Target("c", "classification", ("a", "b", "c"))
    assert answer(schema(three, BINARY), torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]), {}, 0.1).to_pylist()[0]["c"] == "c"


def test_names_never_meet() -> None:
    one = Target("confidence", "classification", ("a", "b"))
    assert answer(schema(one), torch.zeros(1, 2), {}).column_names[:2] == ["confidence", "confidence_"]
    two = Target("b confidence", "regression")
    names = answer(schema(BINARY, two), torch.zeros(1, 3), {}).column_names
    assert names == ["b", "b confidence", "b confidence_", "b probability of no", "b probability of yes"]
    assert (
        len(
            answer(
                schema(Target("w", "classification", tuple("abcdefghijklmnopqrstu"))), torch.zeros(1, 21), {}
            ).columns
        )
        == 2
    )


def test_bad_thresholds_say_so() -> None:
    for threshold in (None, 0, 0.5, 1.0, "best"):
        refuse_threshold(schema(VALUE, BINARY), threshold)
    for bad in (-0.1, 2, "most", float("nan")):
        with pytest.raises(InputError, match=r"a probability from 0 to 1, or best"):
            refuse_threshold(schema(BINARY), bad)
    with pytest.raises(InputError, match="nothing to cut"):
        refuse_threshold(schema(VALUE, Target("c", "classification", ("a", "b", "c"))), 0.5)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("names", [("x", "y"), ("x|1", "y")], ids=["plain", "bars"])
def test_labels_are_written_so_that_they_can_be_read_again(tmp_path: Path, ending: str, names: tuple[str, str]) -> None:
    target = Target("l", "multilabel", names)
    rows = answer(schema(target), torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]]), {})
    path = tmp_path / f"p.{ending}"
    with written(path, separators(schema(target))) as write:
        write(rows.take(pa.array([0, 1, None])))
        write(rows.slice(2))
    found = read_table(path).column("l").to_pylist()
    if ending == "csv":
        cells = [list(names), [names[1]], None, []]
        bars = [None if cell is None else json.dumps(cell) for cell in cells]
        assert found == (bars if "|" in names[0] else ["x|y", "y", None, None])
    else:
        assert found == [list(names), [names[1]], None, []]
    if ending == "jsonl":
        assert read_lines(path)[0]["l"] == list(names)


@pytest.mark.parametrize(
    ("between", "cell"), [(";", "x;y"), (", ", "x, y"), ("json", '["x", "y"]'), ("", "x|y"), ("x", '["x", "y"]')]
)
def test_labels_are_written_as_the_table_had_them(tmp_path: Path, between: str, cell: str) -> None:
    target = Target("l", "multilabel", ("x", "y"), separator=between)
    path = tmp_path / "p.csv"
    with written(path, separators(schema(target))) as write:
        write(answer(schema(target), torch.tensor([[1.0, 1.0]]), {}))
    assert read_table(path).column("l").to_pylist() == [cell]


def test_tables_without_lists_stay_as_they_are() -> None:
    table = pa.table({"a": [1.0, None], "b": ["x", "y"]})
    assert flat(table, {}).equals(table)
