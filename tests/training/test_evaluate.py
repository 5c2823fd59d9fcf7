"""Scores and metrics of every kind of target, against scikit-learn on the probabilities that are answered with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn import metrics
from torch import Tensor, nn

from hesse.multimodal import Dataset, Schema
from hesse.multimodal.columns import Column
from hesse.multimodal.target import Target
from hesse.training.answers import answer
from hesse.training.calibration import calibrate, probabilities, reliability
from hesse.training.evaluate import evaluate, mean_score, outputs, score, score_name
from hesse.training.losses import loss_of
from hesse.training.metrics import report

N = 120
BINARY = Target("b", "classification", ("no", "yes"))
CLASSES = Target("c", "classification", ("a", "b", "c", "d"))
LABELS = Target("l", "multilabel", ("x", "y", "z"))
VALUE = Target("v", "regression", (), 10.0, 2.5)
NAN = float("nan")


def random_rows(target: Target, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs and what they say with some errors."""
    torch.manual_seed(seed)
    out = 2 * torch.randn(N, target.width)
    noisy = out + torch.randn(N, target.width)
    if target.task == "classification":
        return out, noisy.argmax(1)
    return out, (noisy > 0.5).float() if target.task == "multilabel" else noisy


class Table(nn.Module):
    """Gives the outputs that it is asked about, or zeros where the modality is hidden."""

    def forward(self, **inputs: tuple[Any, Tensor]) -> Tensor:
        total = sum(values[0] * present[:, None] for values, present in inputs.values())
        assert isinstance(total, Tensor)
        return total


def dataset(*out: Tensor, targets: Any) -> Dataset:
    present = torch.ones(len(out[0]), dtype=torch.bool)
    inputs = {f"m{i}": ((part,), present) for i, part in enumerate(out)}
    return Dataset(inputs, targets, torch.arange(len(out[0])))  # type: ignore[arg-type]


def schema(*targets: Target, modalities: int = 1) -> Schema:
    """With texts called m0, m1, ..., whose modalities are replaced below."""
    return Schema(tuple(Column(f"m{i}", "text", "input", "", 0, 2, "") for i in range(modalities)), targets)


@pytest.fixture(autouse=True)
def plain_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Schema, "modalities", property(lambda self: {c.name: [c] for c in self.columns}))


def test_scores_are_scikit_learns() -> None:
    out, actual = random_rows(CLASSES)
    assert score("classification", out, actual) == pytest.approx(metrics.accuracy_score(actual, out.argmax(1)))
    out, actual = random_rows(LABELS)
    out = (2 * out).round() / 2  # with ties
    assert score("multilabel", out, actual) == pytest.approx(metrics.average_precision_score(actual, out))
    out, actual = random_rows(VALUE)
    assert score("regression", out, actual) == pytest.approx(metrics.r2_score(actual, out))


def test_what_has_no_score() -> None:
    assert math.isnan(score("multilabel", torch.zeros(3, 2), torch.zeros(3, 2)))
    assert math.isnan(score("multilabel", torch.full((3, 1), NAN), torch.ones(3, 1)))
    assert score("multilabel", torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == 1.0


def test_the_mean_score_is_over_targets_and_rows_that_have_them() -> None:
    both = Schema((), (CLASSES, VALUE))
    (a, classes), (b, values) = random_rows(CLASSES), random_rows(VALUE)
    out, targets = torch.cat([a, b], 1), (classes.clone(), values.clone())
    targets[0][:30], targets[1][60:] = -100, NAN
    expected = (score("classification", a[30:], classes[30:]) + score("regression", b[:60], values[:60])) / 2
    assert mean_score(both, out, targets) == pytest.approx(expected)
    assert (score_name(both), score_name(Schema((), (LABELS,)))) == ("mean score", "mAP")
    targets[1][:] = NAN
    assert mean_score(both, out, targets) == pytest.approx(score("classification", a[30:], classes[30:]))
    targets[0][:] = -100
    assert math.isnan(mean_score(both, out, targets))


def test_metrics_of_two_classes() -> None:
    out, actual = random_rows(BINARY)
    calibration = {"b": {"temperature": 1.7, "threshold": 0.3}}
    record = report(BINARY, out, actual, calibration)
    p = probabilities("classification", out, 1.7).numpy()
    y, guess = actual.numpy(), p.argmax(1)
    assert record["metrics"] == pytest.approx(
        {
            "accuracy": (y == guess).mean(),
            "balanced_accuracy": metrics.balanced_accuracy_score(y, guess),
            "f1_macro": metrics.f1_score(y, guess, average="macro"),
            "log_loss": -np.log(p[range(N), y]).mean(),
            "roc_auc": metrics.roc_auc_score(y, p[:, 1]),
            "average_precision": metrics.average_precision_score(y, p[:, 1]),
            "f1_at_threshold": metrics.f1_score(y, p[:, 1] >= 0.3),
        }
    )
    assert record["threshold"] == 0.3
    assert record["confusion"] == [[int(((y == i) & (guess == j)).sum()) for j in range(2)] for i in range(2)]
    right = record["confusion"][1][1]
    assert record["by_class"]["yes"]["precision"] == pytest.approx(right / (guess == 1).sum())
    assert record["by_class"]["yes"]["recall"] == pytest.approx(right / (y == 1).sum())
    assert record["by_class"]["yes"]["n"] == (y == 1).sum()
    assert record["calibration"]["log_loss"] == pytest.approx(record["metrics"]["log_loss"])
    assert record["calibration"]["log_loss_before"] == pytest.approx(float(nn.functional.cross_entropy(out, actual)))
    before, after = (reliability(q.max(1).values, q.argmax(1) == actual)[1] for q in (out.softmax(1), torch.tensor(p)))
    assert record["calibration"]["bins_before"] == [pytest.approx(each, abs=1e-6) for each in before]
    assert record["calibration"]["bins"] == [pytest.approx(each) for each in after]
    assert before != after and sum(each["n"] for each in after) == N


def test_metrics_of_many_classes_one_of_which_is_absent() -> None:
    out, actual = random_rows(CLASSES)
    actual[actual == 2] = 1
    record = report(CLASSES, out, actual, {})
    p, y = out.double().softmax(1).numpy(), actual.numpy()
    present = [0, 1, 3]
    assert record["metrics"]["roc_auc"] == pytest.approx(
        np.mean([metrics.roc_auc_score(y == c, p[:, c]) for c in present])
    )
    assert record["metrics"]["balanced_accuracy"] == pytest.approx(
        np.mean([(p.argmax(1)[y == c] == c).mean() for c in present])
    )
    assert record["by_class"]["c"]["n"] == 0 and record["by_class"]["c"]["recall"] is None
    assert len(record["confusion"]) == 4
    assert "threshold" not in record
    one = report(CLASSES, out[:3], torch.zeros(3, dtype=torch.long), {})["metrics"]
    assert "roc_auc" not in one


def test_metrics_of_labels() -> None:
    out, actual = random_rows(LABELS)
    actual[:, 2] = 0  # a label that no row has
    cuts = {"x": 0.2, "y": 0.5, "z": 0.9}
    record = report(LABELS, out, actual, {"l": {"temperature": 0.5, "threshold": cuts}})
    p, y = (2 * out.double()).sigmoid().numpy(), actual.numpy()
    guess = p >= np.array(list(cuts.values()))
    assert record["metrics"] == pytest.approx(
        {
            "mAP": metrics.average_precision_score(y[:, :2], p[:, :2]),
            "roc_auc": metrics.roc_auc_score(y[:, :2], p[:, :2]),
            "f1_micro": metrics.f1_score(y, guess, average="micro"),
            "f1_macro": metrics.f1_score(y, guess, average="macro", zero_division=0),
            "subset_accuracy": (guess == y).all(1).mean(),
            "hamming_loss": (guess != y).mean(),
            "log_loss": -np.log(np.where(y > 0, p, 1 - p)).mean(),
        }
    )
    assert record["by_class"]["x"]["f1"] == pytest.approx(metrics.f1_score(y[:, 0], guess[:, 0]))
    assert record["threshold"] == cuts


def test_metrics_of_a_quantity_are_in_its_own_units() -> None:
    out, actual = random_rows(VALUE)
    record = report(VALUE, out, actual, {})
    y, guess = 10 + 2.5 * actual[:, 0].double().numpy(), 10 + 2.5 * out[:, 0].double().numpy()
    assert record["metrics"] == pytest.approx(
        {
            "r2": metrics.r2_score(y, guess),
            "rmse": math.sqrt(((y - guess) ** 2).mean()),
            "mae": np.abs(y - guess).mean(),
            "median_absolute_error": np.median(np.abs(y - guess)),
        }
    )
    assert (record["actual"], record["predicted"]) == (pytest.approx(y), pytest.approx(guess))
    assert math.isnan(report(VALUE, out[:1], actual[:1], {})["metrics"]["r2"])


def test_of_many_classes_the_commonest_mistakes_are_told() -> None:
    many = Target("m", "classification", tuple(f"c{i}" for i in range(101)))
    mistakes = {(i, 100 - i): 40 - i for i in range(30)}  # how many rows of class i are taken for class 100 - i
    pairs = [pair for pair, count in mistakes.items() for _ in range(count)] + [(5, 5)] * 99
    actual, predicted = torch.tensor(pairs)[torch.randperm(len(pairs), generator=torch.manual_seed(0))].T
    record = report(many, nn.functional.one_hot(predicted, 101).float(), actual, {})
    assert "confusion" not in record
    assert record["confused"] == [[f"c{i}", f"c{100 - i}", 40 - i] for i in range(20)]
    assert report(many, nn.functional.one_hot(actual, 101).float(), actual, {})["confused"] == []
    few = Target("m", "classification", many.classes[:100])
    assert "confused" not in report(few, nn.functional.one_hot(predicted[:5] % 100, 100).float(), actual[:5] % 100, {})


def test_large_matrices_are_left_out_and_no_rows_have_no_metrics() -> None:
    many = Target("m", "classification", tuple(map(str, range(1001))))
    out, actual = random_rows(many)
    record = report(many, out, actual, {})
    assert "confusion" not in record
    assert record["by_class"] == {}
    assert record["metrics"].keys() == {"accuracy", "balanced_accuracy", "f1_macro", "log_loss"} | (
        {"roc_auc"} if len(actual.unique()) <= 100 else set()
    )
    assert report(BINARY, torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), {}) == {"metrics": {}}
    assert report(BINARY, torch.full((2, 2), NAN), torch.tensor([0, 1]), {}) == {"metrics": {}}


def test_the_record_of_one_target() -> None:
    out, actual = random_rows(CLASSES)
    data = dataset(out, torch.zeros_like(out), targets=actual)
    positions = {"train": torch.arange(0, 60), "valid": torch.arange(60, 80), "test": torch.arange(80, N)}
    record = evaluate(schema(CLASSES, modalities=2), Table(), data, positions, "test")
    test = actual[80:]
    assert (record["score"], record["n"], record["part"]) == ("accuracy", 40, "test")
    assert record["value"] == pytest.approx(float((out[80:].argmax(1) == test).double().mean()))
    assert record["baseline"] == pytest.approx(float((test == actual[:60].mode().values).double().mean()))
    assert record["loss"] == pytest.approx(float(nn.functional.cross_entropy(out[80:], test)))
    assert record["modalities"]["m0"] == {"alone": record["value"], "without": float((test == 0).double().mean())}
    assert record["confusion"] == record["targets"]["c"]["confusion"]
    assert record["targets"].keys() == {"c"}


def test_the_record_of_several_targets() -> None:
    both = schema(VALUE, CLASSES)
    (a, values), (b, classes) = random_rows(VALUE), random_rows(CLASSES)
    out = torch.cat([a, b], 1)
    classes[85:95], values[100:] = -100, NAN
    data = dataset(out, targets=(values, classes))
    positions = {"train": torch.arange(0, 60), "valid": torch.arange(60, 80), "test": torch.arange(80, N)}
    calibration = calibrate(both, out[60:80], (values[60:80], classes[60:80]))
    record = evaluate(both, Table(), data, positions, "test", calibration)
    each = record["targets"]
    assert [(one["n"], one["score"]) for one in each.values()] == [(20, "r2"), (30, "accuracy")]
    assert record["value"] == pytest.approx((each["v"]["value"] + each["c"]["value"]) / 2)
    assert record["baseline"] == pytest.approx((each["v"]["baseline"] + each["c"]["baseline"]) / 2)
    assert each["v"]["baseline"] == pytest.approx(
        metrics.r2_score(values[80:100, 0], torch.full((20,), float(values[:60].mean())))
    )
    assert each["c"]["calibration"]["temperature"] == calibration["c"]["temperature"]
    assert record["loss"] == pytest.approx(float(loss_of(both)(out[80:], (values[80:], classes[80:]))))
    assert record["actual"] == each["v"]["actual"]  # of the first target
    assert record["modalities"] == {}


def test_the_baseline_of_labels_is_how_often_they_are_there() -> None:
    out, actual = random_rows(LABELS)
    positions = {"train": torch.arange(60), "valid": torch.arange(60, 80), "test": torch.arange(80, N)}
    record = evaluate(schema(LABELS), Table(), dataset(out, targets=actual), positions, "test")
    assert record["baseline"] == pytest.approx(float(actual[80:].mean(0).mean()))


def test_metrics_are_of_what_is_answered() -> None:
    """Labels and classes as ``answer`` gives them have the accuracy and F1 of the record."""
    (a, labels), (b, classes) = random_rows(LABELS), random_rows(BINARY)
    both, out = Schema((), (LABELS, BINARY)), torch.cat([a, b], 1)
    calibration = calibrate(both, out, (labels, classes))
    rows = answer(both, out, calibration)
    assert isinstance(rows, pa.Table)
    guess = np.array([[name in cell for name in LABELS.classes] for cell in rows["l"].to_pylist()])
    record = report(LABELS, a, labels, calibration)["metrics"]
    assert record["f1_micro"] == pytest.approx(metrics.f1_score(labels, guess, average="micro"))
    answered = answer(both, out, calibration, "best")["b"].to_pylist()
    record = report(BINARY, b, classes, calibration)["metrics"]
    guess = np.array([name == "yes" for name in answered])
    assert record["f1_at_threshold"] == pytest.approx(metrics.f1_score(classes, guess))


def test_outputs_hide_modalities() -> None:
    data = dataset(torch.ones(5, 2), 2 * torch.ones(5, 2), targets=None)
    rows = torch.tensor([0, 3])
    assert outputs(Table(), data, rows).tolist() == [[3, 3], [3, 3]]
    assert outputs(Table(), data, rows, {"m1"}).tolist() == [[1, 1], [1, 1]]
