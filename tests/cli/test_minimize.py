"""``hesse minimize``: trace and result on stdout, one object under ``--json``, a sentence where there is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import hesse as library
from hesse.cli import app as cli

HESSE = [sys.executable, "-c", "from hesse.cli import main; main()"]
PROBLEMS = """
import time
from dataclasses import dataclass

import numpy as np
import torch

from neighbours import HUNDRED


@dataclass
class Weights:
    valley: float = HUNDRED


def rosenbrock(x):
    return (1 - x[0]) ** 2 + Weights().valley * (x[1] - x[0] ** 2) ** 2


def on_arrays(x):
    assert isinstance(x, np.ndarray), type(x)
    return (1 - x[0]) ** 2 + HUNDRED * (x[1] - x[0] ** 2) ** 2


def residual(x):
    return torch.stack([1 - x[0], HUNDRED**0.5 * (x[1] - x[0] ** 2)])


def named(x):
    return rosenbrock(torch.cat([x["a"], x["b"]]))


def shape(x):
    assert x.shape == (2, 1), x.shape
    return rosenbrock(x[:, 0])


def kind(x):
    assert x.dtype == torch.float32, x.dtype
    return rosenbrock(x)


def vector(x):
    return x


def broken(x):
    return x[0] / {}["nothing"]


def talkative(x):
    print("evaluated")
    return rosenbrock(x)


def unbounded(x):
    return x.sum()


def slow(x):
    time.sleep(0.02)
    return rosenbrock(x)


class starts:
    numbers = [-1.2, 1.0]
    tensor = torch.tensor([-1.2, 1.0])
    array = np.array([-1.2, 1.0])
    named = {"a": torch.tensor([-1.2]), "b": torch.tensor([1.0])}
    words = "far away"


number = 3
"""


def rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[0]) ** 2 + 100.0 * (x[1] - x[0] ** 2) ** 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of problems and one that it imports; its name is not ASCII."""
    folder = tmp_path / "aufgaben ü 谷"
    folder.mkdir()
    (folder / "problems.py").write_text(PROBLEMS, encoding="utf-8")
    (folder / "neighbours.py").write_text("HUNDRED = 100.0\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("problems", "neighbours", "half", "leaves", "typo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def hesse(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``hesse minimize``, run in this process."""
    words = ["minimize", *(str(argument) for argument in arguments)]
    monkeypatch.setattr(sys, "argv", ["hesse", *words])
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(cli.app, words)
    for name in ("problems", "neighbours"):
        sys.modules.pop(name, None)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def found(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> dict[str, Any]:
    """The object that ``--json`` prints, of a run with success."""
    code, out, err = hesse(monkeypatch, *arguments, "--json")
    assert code == 0, err
    (line,) = out.splitlines()
    result: dict[str, Any] = json.loads(line)
    return result


def test_the_trace_and_then_the_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = hesse(monkeypatch, "problems:rosenbrock", "--x0", "-1.2,1")
    assert (code, err) == (0, "")
    expected = library.minimize(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
    assert out == f"{expected.trace}\n\n{expected!r}\n\nx = {','.join(map(repr, expected.x.tolist()))}\n"
    assert "\x1b" not in out


@pytest.mark.parametrize("x0", ["-1.2,1", "-1.2 1", " [-1.2, 1.0] ", "-12e-1;1", "problems:starts.numbers"])
def test_every_way_to_write_numbers(x0: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (("--x0", x0), (f"--x0={x0}",)):
        result = found(monkeypatch, "problems:rosenbrock", *where)
        assert result["trace"][0]["fun"] == pytest.approx(24.2, rel=1e-15)
        assert result["x"] == pytest.approx([1.0, 1.0], abs=1e-6)


def test_json_has_every_field(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = hesse(monkeypatch, "problems.py:rosenbrock", "--x0", "-1.2,1", "--method", "bfgs", "--json")
    assert code == 0
    (line,) = out.splitlines()
    result = json.loads(line)
    expected = library.minimize(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64), method="bfgs")
    assert err == f"{expected.trace}\n"
    for name in ("fun", "success", "message", "nit", "nfev", "njev", "nhev", "nhvp", "method"):
        assert result[name] == getattr(expected, name), name
    assert result["x"] == expected.x.tolist()
    assert result["jac"] == expected.jac.tolist()
    assert (result["ok"], result["status"], result["status_name"]) == (True, 0, "converged")
    assert (result["plot"], result["state"]) == (None, None)
    for got, row in zip(result["trace"], expected.trace, strict=True):
        assert got == {k: (v if v == v else None) for k, v in row._asdict().items()}


def test_one_negative_number_is_no_option(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = found(monkeypatch, "problems:unbounded", "--x0", "-1", "--lower", "-3")
    assert result["x"] == [-3.0]


def test_what_the_function_prints_is_not_json(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, "problems:talkative", "--x0", "-1.2,1")["success"]
    _, out, _ = hesse(monkeypatch, "problems:talkative", "--x0", "-1.2,1")
    assert out.startswith("evaluated\n")


def test_a_path_to_a_file_from_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = found(
        monkeypatch, f"{folder / 'problems.py'}:rosenbrock", "--x0", f"{folder / 'problems.py'}:starts.numbers"
    )
    assert result["success"]


def test_a_function_of_an_installed_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = found(monkeypatch, "scipy.optimize:rosen", "--x0", "-1.2,1,0.5", "--numpy")
    assert result["x"] == pytest.approx([1.0] * 3, abs=1e-4)


def test_starts_of_every_kind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(folder / "谷.npy", np.array([[-1.2], [1.0]], dtype=np.float32))
    np.save(folder / "whole.npy", np.array([-1, 1]))
    one = pytest.approx([1.0, 1.0], abs=1e-4)
    assert found(monkeypatch, "problems:on_arrays", "--x0", "-1.2,1", "--numpy")["x"] == one
    assert found(monkeypatch, "problems:on_arrays", "--x0", "problems:starts.array")["x"] == one
    # The tensor is float32, of which differences leave three digits.
    rough = found(monkeypatch, "problems:on_arrays", "--x0", "problems:starts.tensor", "--numpy")
    assert rough["x"] == pytest.approx([1.0, 1.0], abs=1e-2)
    assert found(monkeypatch, "problems:rosenbrock", "--x0", "whole.npy")["x"] == one
    assert found(monkeypatch, "problems:kind", "--x0", "-1.2,1", "--dtype", "float32", "--rtol", "1e-4")["success"]
    assert found(monkeypatch, "problems:kind", "--x0", "problems:starts.tensor")["success"]
    shaped = found(monkeypatch, "problems:shape", "--x0", "谷.npy", "--dtype", "float64")
    assert [len(row) for row in shaped["x"]] == [1, 1]
    named = found(monkeypatch, "problems:named", "--x0", "problems:starts.named")
    assert {name: len(value) for name, value in named["x"].items()} == {"a": 1, "b": 1}


def test_settings_reach_the_solver(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = ("problems:rosenbrock", "--x0", "-1.2,1")
    x0 = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    sides = torch.tensor([-2, -0.5]), torch.tensor([0.5, torch.inf])
    for options, settings in [
        (("--l1", "0.5"), {"l1": 0.5}),
        (("--l2", "0.5"), {"l2": 0.5}),
        (("--upper", "0.5"), {"bounds": (None, 0.5)}),
        (("--lower", "-2,-0.5", "--upper", "0.5,inf"), {"bounds": sides}),
        (("--rtol", "1e-2"), {"rtol": 1e-2}),
        (("--atol", "3"), {"atol": 3.0}),
        (("--method", "arc"), {"method": "arc"}),
        (("--check",), {"check": True}),
    ]:  # fmt: skip
        expected = library.minimize(rosenbrock, x0, **settings)
        result = found(monkeypatch, *start, *options)
        assert (result["x"], result["message"], result["nfev"]) == (
            expected.x.tolist(),
            expected.message,
            expected.nfev,
        )


@pytest.mark.parametrize(
    "option", [("--least-squares",), ("--method", "lm"), ("--least-squares", "--method", "dogleg")]
)
def test_residuals(option: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = found(monkeypatch, "problems:residual", "--x0", "-1.2,1", *option)
    assert result["x"] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert result["cost"] < 1e-15
    assert np.array(result["jac"]).shape == (2, 2)
    assert len(result["fun"]) == len(result["grad"]) == 2
    code, out, _ = hesse(monkeypatch, "problems:residual", "--x0", "-1.2,1", *option)
    assert code == 0
    assert out.count("\n") > len(result["trace"])
    assert "cost" in out


def test_a_plot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = found(monkeypatch, "problems:rosenbrock", "--x0", "-1.2,1", "--plot", "bilder/Verlauf ü.svg")
    assert result["plot"] == "bilder/Verlauf ü.svg"
    assert "least value" in (folder / "bilder" / "Verlauf ü.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["trust-exact", "l-bfgs-b"])
def test_resumed_is_as_uninterrupted(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = ("problems:rosenbrock", "--x0", "-1.2,1", "--method", method)
    whole = found(monkeypatch, *start)
    code, out, err = hesse(monkeypatch, *start, "--max-steps", "5", "--save", "zustand ü.safetensors")
    assert code == 1
    assert "out of steps" in err
    assert "out of steps" in out
    rest = found(monkeypatch, "problems:rosenbrock", "--resume", "zustand ü.safetensors")
    assert (rest["x"], rest["fun"], rest["nit"]) == (whole["x"], whole["fun"], whole["nit"])
    assert rest["method"] == method
    for name in ("fun", "gradient", "length", "size"):
        assert [row[name] for row in rest["trace"]] == [row[name] for row in whole["trace"]]
    # Only what is new is printed, below a heading.
    code, out, _ = hesse(monkeypatch, "problems:rosenbrock", "--resume", "zustand ü.safetensors")
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["step", "6"]


def test_residuals_are_resumed_by_their_own_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = ("problems:residual", "--least-squares")
    whole = found(monkeypatch, *start, "--x0", "-1.2,1", "--method", "dogleg")
    options = ("--x0", "-1.2,1", "--method", "dogleg", "--max-steps", "3", "--save", "s.safetensors")
    assert hesse(monkeypatch, *start, *options)[0] == 1
    rest = found(monkeypatch, *start, "--resume", "s.safetensors")
    assert rest["method"] == "dogleg"
    assert (rest["x"], rest["message"]) == (whole["x"], whole["message"])
    assert [row["fun"] for row in rest["trace"]] == [row["fun"] for row in whole["trace"]]


def test_no_success_is_exit_code_1_with_what_was_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = hesse(monkeypatch, "problems:unbounded", "--x0", "1,2", "--json", "--plot", "a.png", "--save", "s")
    assert code == 1
    result = json.loads(out)
    assert (result["ok"], result["success"], result["status_name"]) == (False, False, "unbounded")
    assert result["error"]["kind"] == "no success"
    assert "unbounded below" in result["error"]["message"]
    assert err.splitlines()[-1].startswith("hesse: no success: ")
    assert (folder / "a.png").exists()
    assert (folder / "s").exists()


def test_a_state_that_cannot_be_saved_does_not_lose_what_was_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--x0", "-1.2,1", "--save", "problems.py/state")
    code, out, err = hesse(monkeypatch, "problems:rosenbrock", *options)
    assert code == 1
    assert "x = " in out
    assert "Check the path" in err


def test_a_start_that_is_not_finite_has_no_trace_to_plot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = hesse(monkeypatch, "problems:rosenbrock", "--x0", "nan,1", "--plot", "a.png", "--json")
    assert code == 1
    assert "not finite" in err
    assert json.loads(out)["x"] == [None, 1.0]
    assert not (folder / "a.png").exists()


FILES = {
    "half.py": "import torch\nraise RuntimeError('half way')\n",
    "leaves.py": "import sys\nsys.exit('wrong usage')\n",
    "typo.py": "def f(x:\n    return x\n",
    "no_numbers.npy": "nothing",
    "state": "nothing",
}
REFUSED = {
    "no module": (["nowhere:f", "--x0", "1"], "no such module", "no module 'nowhere'"),
    "no module in a package": (["torch.nowhere:f", "--x0", "1"], "no such module", "no module 'torch.nowhere'"),
    "no file": (["nowhere.py:f", "--x0", "1"], "missing file", "no such file"),
    "no colon": (["problems", "--x0", "1"], "no function", "problems:rosenbrock"),
    "no name": (["problems:", "--x0", "1"], "no function", "no colon"),
    "no such function": (["problems:rosenbrok", "--x0", "1"], "no such name", "Did you mean rosenbrock?"),
    "nothing like it": (["problems:zzz", "--x0", "1"], "no such name", "Check the spelling"),
    "not a function": (["problems:number", "--x0", "1"], "no function", "a int, not a function"),
    "fails at import": (["half:f", "--x0", "1"], "error in the code", "RuntimeError: half way"),
    "file that fails": (["half.py:f", "--x0", "1"], "error in the code", "half.py:2"),
    "leaves at import": (["leaves.py:f", "--x0", "1"], "error in the code", "SystemExit: wrong usage"),
    "cannot be read": (["typo.py:f", "--x0", "1"], "error in the code", "typo.py:1"),
    "function that fails": (["problems:broken", "--x0", "1,2"], "error in the code", "KeyError: 'nothing'"),
    "vector": (["problems:vector", "--x0", "1,2"], "refused", "it must return one number"),
    "x0 of letters": (["problems:rosenbrock", "--x0", "1,a"], "--x0", "not a number: 'a'"),
    "x0 empty": (["problems:rosenbrock", "--x0", ","], "--x0", "no numbers"),
    "x0 too short": (["problems:rosenbrock", "--x0", "1"], "error in the code", "IndexError"),
    "x0 of words": (["problems:rosenbrock", "--x0", "problems:starts.words"], "refused", "x0 must be"),
    "x0 absent": (["problems:rosenbrock", "--x0", "problems:starts.none"], "no such name", "starts.none"),
    "x0 without file": (["problems:rosenbrock", "--x0", "nowhere.npy"], "missing file", "no such file"),
    "x0 of another file": (["problems:rosenbrock", "--x0", "no_numbers.npy"], "x0", "not an array"),
    "method": (["problems:rosenbrock", "--x0", "1,2", "--method", "magic"], "refused", "'magic'. Known are 'auto'"),
    "bounds crossed": (["problems:rosenbrock", "--x0", "1,2", "--lower", "3", "--upper", "2"], "refused", "crossed"),
    "bounds of letters": (["problems:rosenbrock", "--x0", "1,2", "--lower", "low"], "--lower", "not a number: 'low'"),
    "bounds too many": (["problems:rosenbrock", "--x0", "1,2", "--lower", "1,2,3"], "refused", "lower bound"),
    "rtol": (["problems:rosenbrock", "--x0", "1,2", "--rtol", "2"], "refused", "rtol must be between 0 and 1"),
    "plot": (["problems:rosenbrock", "--x0", "1,2", "--plot", "a.gif"], "refused", "must end in one of .png"),
    "no state": (["problems:rosenbrock", "--resume", "nowhere"], "missing file", "no such state"),
    "no real state": (["problems:rosenbrock", "--resume", "state"], "no state", "not a safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_a_sentence(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, text in FILES.items():
        (folder / file).write_text(text, encoding="utf-8")
    arguments, kind, says = REFUSED[name]
    code, out, err = hesse(monkeypatch, *arguments, "--save", "new", "--json")
    assert code == 1
    error = json.loads(out)["error"]
    assert error["kind"] == kind
    assert says in err
    assert err.splitlines()[-1].startswith(f"hesse: {kind} at ")
    assert "Traceback" not in err
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "either --x0"),
        (["--x0", "1,2", "--resume", "state"], "either --x0"),
        (["--resume", "state", "--numpy"], "are those of the state"),
        (["--x0", "1,2", "--dtype", "float16"], "float64 or float32"),
        (["--x0", "1,2", "--l1", "-1"], "--l1"),
        (["--x0", "1,2", "--max-steps", "many"], "--max-steps"),
        (["--x0", "1,2", "--least-squares", "--l1", "1"], "--l1"),
        (["--x0", "1,2", "--least-squares", "--check"], "--check"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_usage(options: list[str], says: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = hesse(monkeypatch, "problems:rosenbrock", *options)
    assert (code, out) == (2, "")
    assert says in err


def test_an_own_fault_keeps_its_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise RuntimeError("a fault of hesse")

    fail.__code__ = fail.__code__.replace(co_filename=str(Path(library.__file__).parent / "minimizers" / "x.py"))
    monkeypatch.setattr(library, "minimize", fail)
    with pytest.raises(RuntimeError, match="a fault of hesse"):
        hesse(monkeypatch, "problems:rosenbrock", "--x0", "1,2")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "0", "LC_ALL": "C", **more}


def test_ctrl_c_prints_what_was_found_and_saves_it(folder: Path) -> None:
    """In a real process, in an ASCII locale, in a folder that is not on the path."""
    command = [*HESSE, "minimize", "problems:slow", "--x0", "-1.2,1", "--method", "gd", "--save", "zustand"]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        first = [process.stdout.readline() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line.split()[0] for line in first] == [b"step", b"0", b"1", b"2"]
    assert b"interrupted" in out
    assert b"x = " in out
    assert b"Traceback" not in err
    assert b"--resume zustand" in err
    assert (folder / "zustand").exists()


def test_a_reader_that_has_seen_enough(folder: Path) -> None:
    command = [*HESSE, "minimize", "problems:slow", "--x0", "-1.2,1"]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(NO_COLOR="1")
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 1
