"""The blind corpus: what ``hesse.check`` makes of faults and models that it was not developed on."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from blind.case import judged
from blind.corpus import FAULTS, HEALTHY
from gradient_faults.case import Fault, Healthy
from hesse import check

# What is not right yet, by case and aspect, and what is said instead. Strict: a line that has become right goes.
MISSES: dict[str, dict[str, Any]] = {
    # A sparse matrix times features, its transpose forgotten.
    "directed_adjacency": {"kind": "wrong_gradient"},
    # A layer norm without the mean of grad * xhat; it is a sum that is missing, the case wanted no more than "wrong".
    "layer_norm_without_mean_terms": {"kind": "missing_sum"},
}


def checked(case: Fault | Healthy, *broken: bool) -> check.Report:
    torch.manual_seed(0)
    random.seed(0)
    return getattr(check, case.check)(*case.make(*broken))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found_placed_and_named_and_its_repaired_twin_is_well(fault: Fault) -> None:
    report = checked(fault, True)
    assert judged(fault, report) == MISSES.get(fault.name, {}), str(report)
    repaired = checked(fault, False)
    assert repaired.ok, str(repaired)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch, of a hook on the first layer
@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
def test_a_healthy_model_is_left_in_peace(case: Healthy) -> None:
    report = checked(case)
    assert report.ok, str(report)


def test_no_case_is_lost_and_misses_are_of_cases() -> None:
    names = [case.name for case in [*FAULTS, *HEALTHY]]
    assert (len(FAULTS), len(HEALTHY)) == (42, 24)
    assert len(names) == len(set(names))
    assert set(MISSES) <= {fault.name for fault in FAULTS}
