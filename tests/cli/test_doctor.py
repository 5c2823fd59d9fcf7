"""hesse doctor: from a factory in the user's code to one page and an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hesse.cli.app import app

pytest.importorskip("jinja2", reason="the page needs hesse[train]")
pytest.importorskip("plotly", reason="the page needs hesse[train]")

CODE = """
import torch
from torch import nn
from torch.nn import functional as F

import hesse

class Cut(nn.Module):
    def forward(self, x):
        return torch.tanh(x).detach()

class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net(nn.Tanh())

    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y)

def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), *layers, nn.Linear(8, 2))

x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
batch = x, (x[:, 0] > 0).long()

def right():
    print("a word of the user's")
    return net(nn.Tanh()), F.cross_entropy, [batch, batch]

def tuned():
    model = net(nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    return {"model": model, "loss_fn": F.cross_entropy, "data": batch, "optimizer": optimizer}

def closed():
    return hesse.closure(net(nn.Tanh()), F.cross_entropy, batch)

def bare():
    return Loss(), batch

def wrong():
    return net(Cut()), F.cross_entropy, batch

def function():
    return torch.exp, torch.ones(3)

class Wide(nn.Module):
    def forward(self, x):
        return x @ torch.ones(7, 8)

def broken():
    return net(Wide()), F.cross_entropy, batch
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "patients_of_mine.py"
    path.write_text(CODE, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "patients_of_mine", raising=False)
    return path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments), "--steps", "20"])


@pytest.mark.parametrize(
    ("name", "says"),
    [("right", "of AdamW (lr 0.001)"), ("tuned", "of SGD (lr 0.5)"), ("closed", "AdamW"), ("bare", "Loss: nothing")],
)
def test_whatever_the_factory_returns(code: Path, name: str, says: str) -> None:
    result = run(f"{code}:{name}")
    assert result.exit_code == 0, result.output
    assert says in result.stdout and "20 steps" in result.stdout


def test_a_fault_is_named_with_its_line_written_to_a_page_and_exits_with_1(code: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "doctor.html"
    result = run(f"{code}:wrong", "--out", page)
    assert result.exit_code == 1
    line = 1 + next(i for i, text in enumerate(CODE.splitlines()) if ".detach()" in text)
    assert f"1. detached at 1, Tensor.detach ({code}:{line})" in result.stdout
    assert result.stdout.splitlines()[-1] == f"page: {page}"
    assert f"{code}:{line}" in page.read_text(encoding="utf-8")


def test_json_is_all_that_stdout_gets(code: Path) -> None:
    for name, ok in (("right", True), ("wrong", False)):
        result = run(f"{code}:{name}", "--json")
        found = json.loads(result.stdout)
        assert found["ok"] is ok and found["page"] is None
        assert result.exit_code == (0 if ok else 1)
    assert found["entries"][0]["finding"]["where"] == "1"
    assert [f["kind"] for f in found["entries"][0]["consequences"]].count("no_gradient") == 1


def test_second_order_adds_a_check(code: Path) -> None:
    result = run(f"{code}:right", "--second-order", "--json")
    assert len(json.loads(result.stdout)["checks"]) == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [("function", "Give a torch.nn.Module"), ("broken", "shapes"), ("rihgt", "Did you mean right")],
)
def test_what_cannot_be_examined_gets_a_sentence(code: Path, name: str, says: str) -> None:
    result = run(f"{code}:{name}", "--json")
    assert result.exit_code == 1
    assert says in result.stderr and "Traceback" not in result.stderr
    assert json.loads(result.stdout)["ok"] is False


@pytest.mark.parametrize("options", [["--steps", "0"], ["--seconds", "0"]], ids=["no step", "no time"])
def test_bad_options_are_usage_errors(code: Path, options: list[str]) -> None:
    assert CliRunner().invoke(app, ["doctor", f"{code}:right", *options]).exit_code == 2


def test_as_a_command_of_its_own(code: Path) -> None:
    command = [sys.executable, "-m", "hesse", "doctor", f"{code.stem}:right", "--steps", "3"]
    done = subprocess.run(command, cwd=code.parent, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Diagnosis of Sequential: nothing found" in done.stdout
