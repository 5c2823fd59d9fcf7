"""The corpus of planted faults: each is found, named and placed, its repaired twin is not, nor is a healthy model."""

from __future__ import annotations

import random

import pytest
import torch

from gradient_faults import estimators, losses, numbers, paths, pointwise, second, settings, structured
from gradient_faults.case import Fault, Healthy
from gradient_faults.healthy import HEALTHY
from gradient_faults.models import MODELS
from hesse import check

FAULTS = [
    *pointwise.FAULTS,
    *structured.FAULTS,
    *settings.FAULTS,
    *losses.FAULTS,
    *estimators.FAULTS,
    *paths.FAULTS,
    *numbers.FAULTS,
    *second.FAULTS,
]


def checked(case: Fault | Healthy, *broken: bool) -> check.Report:
    torch.manual_seed(0)
    random.seed(0)
    return getattr(check, case.check)(*case.make(*broken))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found_placed_and_named_and_its_repaired_twin_is_well(fault: Fault) -> None:
    report = checked(fault, True)
    assert not report.ok
    first = report.culprits[0]
    assert first.where == fault.where, str(report)
    assert first.kind in fault.kinds.split(), str(report)
    if fault.function:
        assert any(name in str(first.function) for name in fault.function.split()), str(report)
        assert first.file and first.line
    repaired = checked(fault, False)
    assert repaired.ok, str(repaired)


@pytest.mark.parametrize("case", [*HEALTHY, *MODELS], ids=lambda case: case.name)
def test_a_healthy_model_is_left_in_peace(case: Healthy) -> None:
    report = checked(case)
    assert report.ok, str(report)


def test_names_of_the_corpus_are_unique_and_every_kind_occurs() -> None:
    names = [case.name for case in [*FAULTS, *HEALTHY, *MODELS]]
    assert len(names) == len(set(names))
    named = {fault.kinds.split()[0] for fault in FAULTS}
    assert named >= {
        *("wrong_sign", "missing_factor", "wrong_reduction", "missing_sum", "transposed", "detached"),
        *("stale_value", "inplace_grad", "hook", "non_deterministic", "second_derivative", "forward_mode"),
        *("overflow", "some_elements", "truncated_recurrence", "straight_through", "wrong_gradient", "non_finite"),
    }
