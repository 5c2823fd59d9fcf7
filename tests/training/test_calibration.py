"""Temperature and thresholds, against a grid; calibration errors against the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score, log_loss
from torch import Tensor
from torch.nn import functional as F

from hesse.multimodal import Schema
from hesse.multimodal.target import Target
from hesse.training.calibration import PRIOR, best_threshold, calibrate, fit_temperature, probabilities, reliability

CLASSES = Target("c", "classification", ("a", "b"))
LABELS = Target("l", "multilabel", ("x", "y"))
VALUE = Target("v", "regression")


def drawn(rows: int, sharpened: float, width: int = 3) -> tuple[Tensor, Tensor]:
    """Classes drawn from a model's probabilities, and its outputs, sharpened."""
    generator = torch.Generator().manual_seed(0)
    out = 2 * torch.randn(rows, width, generator=generator)
    return sharpened * out, torch.multinomial(out.softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("sharpened", [0.4, 1.0, 3.0])
def test_what_sharpened_the_outputs_is_found(sharpened: float) -> None:
    out, classes = drawn(5000, sharpened)
    assert fit_temperature("classification", out, classes) == pytest.approx(sharpened, rel=0.06)
    labels = F.one_hot(classes, 3).float()
    yes = (out / sharpened).softmax(1).logit() * sharpened
    assert fit_temperature("multilabel", yes, labels) == pytest.approx(sharpened, rel=0.06)


@pytest.mark.parametrize("rows", [3, 30, 300])
def test_no_temperature_of_a_grid_is_better(rows: int) -> None:
    out, classes = drawn(rows, 2.0)

    def total(t: float) -> float:
        return float(F.cross_entropy(out.double() / t, classes, reduction="sum")) + 0.5 * (math.log(t) / PRIOR) ** 2

    found = fit_temperature("classification", out, classes)
    assert total(found) <= min(total(t) for t in np.geomspace(0.05, 20, 400)) + 1e-9


def test_few_rows_or_perfect_ones_move_little() -> None:
    perfect = 8 * torch.eye(3)
    assert 0.5 < fit_temperature("classification", perfect, torch.arange(3)) < 1
    assert 0.1 < fit_temperature("classification", perfect.repeat(1000, 1), torch.arange(3).repeat(1000)) < 1
    assert 1 < fit_temperature("classification", 100 * torch.tensor([[1.0, 0.0]]), torch.tensor([1])) < 20


def test_the_best_threshold_is_that_of_a_search() -> None:
    random = np.random.default_rng(0)
    for rows in (20, 200):
        actual = random.random(rows) < 0.3
        p = np.clip(0.3 * actual + random.random(rows) * 0.5, 0, 1).round(2)  # with ties
        found = best_threshold(torch.from_numpy(p), torch.from_numpy(actual))
        search = max(f1_score(actual, p >= cut, zero_division=0) for cut in np.unique(p))
        assert f1_score(actual, p >= found) == pytest.approx(search)


def test_too_few_rows_tell_no_threshold() -> None:
    p = torch.linspace(0, 1, 20)
    assert best_threshold(p, p > 0.9) == 0.5
    assert best_threshold(torch.full((20,), 0.3), torch.arange(20) < 10) == pytest.approx(0.15)  # all are equal


def test_the_calibration_error_is_scikit_learns_curve() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator).double()
    right = torch.rand(500, generator=generator) < confidence**2
    error, bins = reliability(confidence, right)
    accuracy, sure = calibration_curve(right.numpy(), confidence.numpy(), n_bins=15)
    assert [one["accuracy"] for one in bins] == pytest.approx(accuracy)
    assert [one["confidence"] for one in bins] == pytest.approx(sure)
    assert error == pytest.approx(sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / 500)
    assert sum(one["n"] for one in bins) == 500
    assert reliability(torch.tensor([1.0, 0.0]), torch.tensor([True, False]))[0] == 0.0


def test_the_record_has_what_each_target_needs() -> None:
    schema = Schema((), (VALUE, CLASSES, LABELS))
    generator = torch.Generator().manual_seed(0)
    out = 3 * torch.randn(200, 5, generator=generator)
    classes = torch.multinomial((out[:, 1:3] / 3).softmax(1), 1, generator=generator)[:, 0]
    labels = (torch.rand(200, 2, generator=generator) < (out[:, 3:] / 3).sigmoid()).float()
    values = torch.zeros(200, 1)
    classes[:50], labels[100:] = -100, float("nan")
    record = calibrate(schema, out, (values, classes, labels))
    assert record.keys() == {"c", "l"}
    assert record["c"].keys() == {"temperature", "threshold"}
    assert record["c"]["temperature"] == fit_temperature("classification", out[50:, 1:3], classes[50:])
    assert record["l"]["temperature"] == fit_temperature("multilabel", out[:100, 3:], labels[:100])
    assert record["l"]["threshold"].keys() == {"x", "y"}
    p = probabilities("classification", out[50:, 1:3], record["c"]["temperature"])
    assert log_loss(classes[50:], p) < log_loss(classes[50:], probabilities("classification", out[50:, 1:3], 1.0))
    fitted = calibrate(schema, out, (values, classes, labels), fitted=True)
    assert fitted["c"]["temperature"] == fitted["l"]["temperature"] == 1
    assert fitted["l"]["threshold"]["x"] == best_threshold(out[:100, 3].double().sigmoid(), labels[:100, 0] > 0)
    assert calibrate(Schema((), (CLASSES,)), torch.full((3, 2), float("nan")), torch.tensor([0, 1, 1])) == {}
