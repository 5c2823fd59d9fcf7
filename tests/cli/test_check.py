"""hesse check: from a factory in the user's code to an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hesse.cli.app import app

CODE = """
import torch
from torch import nn
from torch.nn import functional as F

import hesse

class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]

class Layer(nn.Module):
    def forward(self, x):
        return Halved.apply(x)

def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 2))

batch = torch.randn(8, 3), torch.arange(8) % 2

def right():
    return net(nn.Tanh()), F.cross_entropy, batch

def loader():
    print("a word of the user's")
    return net(nn.Tanh()), F.cross_entropy, [batch, batch]

def closed():
    return hesse.closure(net(nn.Tanh()), F.cross_entropy, batch)

def wrong():
    return net(Layer()), F.cross_entropy, batch

def outputs():
    return net(nn.Tanh()), batch[0]

def named():
    return {"model": net(nn.Tanh()), "loss_fn": F.cross_entropy, "data": batch}

def nothing():
    return net()

def odd():
    return {"model": net(), "loss": F.cross_entropy}

def broken():
    raise KeyError("no such key")

class Uphill(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = -abs(group["lr"])
        return super().step(closure)
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "models_of_mine.py"
    path.write_text(CODE, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "models_of_mine", raising=False)
    return path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


@pytest.mark.parametrize("name", ["right", "loader", "closed", "outputs", "named"])
def test_right_models_pass_whatever_the_factory_returns(code: Path, name: str) -> None:
    result = run(f"{code}:{name}")
    assert result.exit_code == 0, result.output
    assert "Gradient check of" in result.stdout


def test_a_wrong_one_is_named_with_its_line_and_exits_with_1(code: Path) -> None:
    result = run(f"{code}:wrong")
    assert result.exit_code == 1
    line = next(i for i, text in enumerate(CODE.splitlines(), 1) if "def backward" in text)
    assert f"missing_factor at 1, Halved ({code}:{line})" in result.stdout


def test_json_is_all_that_stdout_gets(code: Path) -> None:
    for name, ok in (("loader", True), ("wrong", False)):
        result = run(f"{code}:{name}", "--json")
        found = json.loads(result.stdout)
        assert found["ok"] is ok is found["reports"][0]["ok"]
        assert result.exit_code == (0 if ok else 1)
    assert found["reports"][0]["findings"][0]["where"] == "1"


def test_second_order_adds_a_report(code: Path) -> None:
    result = run(f"{code}:right", "--second-order", "--json")
    assert [report["ok"] for report in json.loads(result.stdout)["reports"]] == [True, True]


def test_optimizers_are_checked_by_their_class(code: Path) -> None:
    assert run("torch.optim:SGD").exit_code == 0
    result = run(f"{code}:Uphill")
    assert result.exit_code == 1
    assert "Uphill" in result.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing", "returned a Sequential"),
        ("odd", "returned model, loss; known are"),
        ("broken", "no such key"),
        ("batch", "It is a tuple, not a function"),
        ("rihgt", "Did you mean right"),
    ],
)
def test_what_is_no_target_gets_a_sentence(code: Path, name: str, says: str) -> None:
    result = run(f"{code}:{name}", "--json")
    assert result.exit_code == 1
    assert says in result.stderr
    assert json.loads(result.stdout)["ok"] is False


def test_as_a_program_in_the_folder_of_the_module(code: Path) -> None:
    command = [sys.executable, "-m", "hesse", "check", "models_of_mine:right"]
    done = subprocess.run(command, cwd=code.parent, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout.splitlines()[0]
