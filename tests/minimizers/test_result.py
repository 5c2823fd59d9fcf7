"""A result reads like SciPy's, says its status in words, and keeps one row for every iteration."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import hesse
from hesse.minimizers.result import MinimizeError, Result, Row, Status, Trace
from hesse.minimizers.state import State
from minimizers.points import rosenbrock, vector

START = vector(-1.2, 1)


def solved(**more: object) -> Result:
    return hesse.minimize(rosenbrock, START, **more)


def test_only_convergence_and_precision_are_success() -> None:
    assert [status for status in Status if status.success] == [Status.CONVERGED, Status.PRECISION]
    assert all(status.sentence for status in Status)


def test_the_fields_are_scipys() -> None:
    result = solved()
    for name in ("x", "fun", "jac", "success", "status", "message", "nit", "nfev", "njev", "nhev", "hess_inv"):
        assert hasattr(result, name)
    assert isinstance(result.fun, float)
    assert int(result.status) == 0
    torch.testing.assert_close(result.x, torch.ones(2).double())
    assert result.jac.shape == result.x.shape
    assert float(result.jac.abs().max()) < 1e-6


def test_it_prints_as_a_table_that_holds_what_matters() -> None:
    text = repr(solved())
    for words in (
        "message: converged",
        "success: True",
        "status: 0 (converged)",
        "x: [1, 1]",
        "nit:",
        "nfev:",
        "nhvp:",
    ):
        assert words in text
    wide = repr(hesse.minimize(lambda x: x.square().sum(), torch.ones(3, 4)))
    assert "[3, 4]" in wide
    named = repr(hesse.minimize(lambda p: p["a"].square().sum(), {"a": torch.ones(2)}))
    assert "{a: [" in named


def test_the_trace_has_one_row_for_every_iteration_and_columns_by_name() -> None:
    result = solved()
    assert len(result.trace) == result.nit + 1
    assert result.trace.fun[0] == pytest.approx(24.2)
    assert result.trace.fun[-1] == result.fun
    assert result.trace.fun == sorted(result.trace.fun, reverse=True)
    assert result.trace.gradient[-1] == float(result.jac.abs().max())
    assert all(size > 0 for size in result.trace.length[1:])
    assert math.isnan(result.trace.trust_ratio[0])
    assert isinstance(result.trace[3], Row)
    assert str(result.trace).count("\n") == len(result.trace)


def test_a_column_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"columns step, fun, .*got 'grad'"):
        solved().trace.grad  # noqa: B018


def test_a_trace_can_be_copied_and_pickled() -> None:
    trace = Trace([Row(0, 9.0, 6.0, 0.0, 0.0, 1.0, 1, 1, 0, 0)])
    assert copy.deepcopy(trace).fun == [9.0]
    assert pickle.loads(pickle.dumps(trace)).fun == [9.0]  # noqa: S301


def test_the_trace_plots_itself(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "trace.png"
    solved().trace.plot(path)
    assert path.stat().st_size > 1000


def test_hess_inv_is_the_inverse_of_the_curvature() -> None:
    H = torch.autograd.functional.hessian(rosenbrock, torch.ones(2).double())
    inverse = solved(method="trust-exact").hess_inv
    torch.testing.assert_close(inverse, torch.linalg.inv(H), rtol=1e-4, atol=0)
    array = hesse.minimize(lambda x: float(((x - 1) ** 2).sum()), np.zeros(2), jac=lambda x: 2 * (x - 1), method="bfgs")
    assert isinstance(array.hess_inv, np.ndarray)
    np.testing.assert_allclose(array.hess_inv, 0.5 * np.eye(2), atol=0.6)


def test_a_method_that_keeps_no_curvature_says_so() -> None:
    with pytest.raises(ValueError, match="'gd' keeps no curvature"):
        solved(method="gd", max_steps=3).hess_inv  # noqa: B018


def test_a_singular_curvature_has_no_inverse() -> None:
    result = hesse.minimize(lambda x: (x[0] - 1) ** 2 + 0 * x[1], START, method="trust-exact")
    assert result.success
    with pytest.raises(ValueError, match="singular"):
        result.hess_inv  # noqa: B018


def test_throw_raises_with_the_result() -> None:
    with pytest.raises(MinimizeError, match="out of steps") as caught:
        solved(max_steps=2, throw=True)
    assert caught.value.result.nit == 2
    assert solved(throw=True).success


METHODS = ["auto", "bfgs", "l-bfgs-b", "trust-krylov", "arc", "newton-cg", "gd", "prox-newton"]


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_state_goes_on_to_the_same_iterates(tmp_path: Path, method: str) -> None:
    whole = solved(method=method, max_steps=12)
    part = solved(method=method, max_steps=5)
    path = tmp_path / "state.safetensors"
    assert part.state is not None
    part.state.save(path)
    resumed = hesse.minimize(rosenbrock, State.load(path), method=method, max_steps=12)
    assert torch.equal(resumed.x, whole.x)
    assert resumed.trace.fun == whole.trace.fun
    assert resumed.nit == whole.nit == 12
    again = hesse.minimize(rosenbrock, State.load(path), max_steps=12)  # the method is in the state
    assert torch.equal(again.x, whole.x)
    assert again.method == whole.method


def test_going_on_does_not_change_the_state_that_it_began_with() -> None:
    part = solved(max_steps=4)
    assert part.state is not None
    before = part.state.memory["x"].clone()
    hesse.minimize(rosenbrock, part.state)
    assert torch.equal(part.state.memory["x"], before)
    assert len(part.trace) == 5


KINDS = {"tensor": START, "dict": {"a": START[:1], "b": START[1]}, "array": START.numpy(), "float32": START.float()}


@pytest.mark.parametrize("x0", KINDS.values(), ids=KINDS)
def test_a_state_keeps_the_kind_of_x(tmp_path: Path, x0: object) -> None:
    def fun(x: object) -> object:
        if isinstance(x, dict):
            return rosenbrock(torch.stack([x["a"][0], x["b"]]))
        return rosenbrock(x)  # type: ignore[arg-type]

    result = hesse.minimize(fun, x0, max_steps=3)
    assert result.state is not None
    result.state.save(tmp_path / "state")
    loaded = State.load(tmp_path / "state")
    assert type(loaded.x) is type(x0)
    more = hesse.minimize(fun, loaded)
    assert more.success
    assert type(more.x) is type(x0)


def test_a_file_that_is_no_state_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a safetensors file"):
        State.load(tmp_path / "text")
    save_file({"x": START}, tmp_path / "other")
    with pytest.raises(ValueError, match="not the state of a solve"):
        State.load(tmp_path / "other")
