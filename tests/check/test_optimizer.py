"""hesse.check.optimizer: torch's optimisers and ours keep the contract; whoever breaks a promise is told which."""

from __future__ import annotations

import functools
import inspect
import random
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import hesse.optim
from hesse.check import Report, optimizer
from hesse.finding import InputError
from optimizer_faults import state, steps
from optimizer_faults.base import Momentum
from optimizer_faults.steps import IMPOLITE
from optimizer_faults.unusual import UNUSUAL

FAULTS = {**steps.FAULTS, **state.FAULTS}

TORCH = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
}
OURS = {name: getattr(hesse.optim, name) for name in hesse.optim.__all__ if name != "LineSearch"}


@functools.cache
def report_of(cls: type[Optimizer]) -> Report:
    return optimizer(cls)


@pytest.mark.parametrize("name", TORCH)
def test_torchs_optimizers_keep_the_contract(name: str) -> None:
    report = report_of(TORCH[name])
    assert report.ok, str(report)
    # What is left is true: these lose float32 scalars of bfloat16 parameters, and LBFGS is made for one vector.
    said = {"ASGD": {"state_dtype"}, "NAdam": {"state_dtype"}, "LBFGS": {"layout", "copy"}}
    assert {finding.kind for finding in report.findings} == said.get(name, set())


@pytest.mark.parametrize("name", OURS)
def test_our_optimizers_keep_the_contract(name: str) -> None:
    report = report_of(OURS[name])
    assert report.ok and not report.findings, str(report)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "nesterov": True, "lr": 0.1},
        {"weight_decay": 0.1, "lr": 0.1},
        {"foreach": True},
        {"fused": True},
        {"lr": torch.tensor(0.01)},
    ],
    ids=["nesterov", "weight decay", "foreach", "fused", "tensor lr"],
)
def test_settings_make_no_difference(settings: dict[str, Any]) -> None:
    report = optimizer(torch.optim.SGD, **settings)
    assert report.ok, str(report)
    assert optimizer(torch.optim.Adam, **{k: v for k, v in settings.items() if k in ("foreach", "lr")}).ok


def test_what_goes_around_another_is_given_as_a_function() -> None:
    report = optimizer(lambda params: hesse.optim.LineSearch(torch.optim.SGD(params, lr=1.0)))
    assert report.ok, str(report)
    assert report.subject == "LineSearch"
    with pytest.raises(InputError, match="function of parameters"):
        optimizer(hesse.optim.LineSearch)


def test_needs_are_noted() -> None:
    assert "It takes matrices only." in report_of(torch.optim.Muon).notes
    assert "It takes sparse gradients only." in report_of(torch.optim.SparseAdam).notes
    assert any(note.startswith("It needs a closure") for note in report_of(torch.optim.LBFGS).notes)
    assert "It takes the model." in report_of(hesse.optim.GaussNewton).notes


def test_generators_and_modes_are_left_alone() -> None:
    random.seed(1)
    torch.manual_seed(1)
    python, torchs = random.getstate(), torch.get_rng_state()
    with torch.no_grad():
        optimizer(torch.optim.SGD)
        assert not torch.is_grad_enabled()
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torchs)


def test_the_one_that_faults_are_planted_in_is_right() -> None:
    report = optimizer(Momentum)
    assert report.ok and not report.findings, str(report)


@pytest.mark.parametrize("cls", UNUSUAL, ids=lambda cls: cls.__name__)
def test_unusual_ways_are_no_faults(cls: type[Optimizer]) -> None:
    report = optimizer(cls)
    assert report.ok and not report.findings, str(report)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_named(name: str) -> None:
    cls, kind = FAULTS[name]
    report = report_of(cls)
    assert not report.ok
    assert kind in {finding.kind for finding in report.culprits}, str(report)
    finding = next(finding for finding in report.culprits if finding.kind == kind)
    assert finding.where == cls.__name__
    assert finding.function is not None and finding.line is not None
    method = inspect.unwrap(getattr(cls, finding.function))  # torch wraps step, in the class or in its base
    assert finding.file == inspect.getsourcefile(method)
    written, first = inspect.getsourcelines(method)
    assert f"def {finding.function}(" in written[finding.line - first]
    assert finding.message.endswith(".") and finding.remedy.endswith(".")


def test_one_fault_is_one_finding() -> None:
    """Those that break one promise only; a wrong sign breaks many."""
    alone = "uphill on biases", "maximize ignored", "loss not returned", "first group's lr", "gradient freed"
    for name in (*alone, "float32 state lost", "objects in state", "closure not called"):
        cls, kind = FAULTS[name]
        assert {finding.kind for finding in report_of(cls).culprits} == {kind}, name


def test_what_is_loud_or_only_impolite_is_a_warning() -> None:
    for cls, kind in IMPOLITE.values():
        report = optimizer(cls)
        assert report.ok
        assert [finding.kind for finding in report.findings] == [kind]
