"""The fixture as a user's test suite gets it: from the installed package, in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SUITE = """
import torch

class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x
    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]

class Layer(torch.nn.Module):
    def forward(self, x):
        return Halved.apply(x)

def test_right(assert_gradients):
    assert assert_gradients(torch.nn.Linear(3, 2), torch.randn(4, 3), second_order=True).ok

def test_wrong(assert_gradients):
    assert_gradients(torch.nn.Sequential(torch.nn.Linear(3, 2), Layer()), torch.randn(4, 3))
"""


def test_a_wrong_gradient_fails_with_the_report_as_its_message(tmp_path: Path) -> None:
    (tmp_path / "test_layers.py").write_text(SUITE, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(tmp_path / "test_layers.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "missing_factor at 1, Halved" in done.stdout
    assert f"{tmp_path / 'test_layers.py'}:10" in done.stdout  # the line of its backward


def test_loading_the_plugin_does_not_load_torch() -> None:
    code = "import sys, hesse.pytest_plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
