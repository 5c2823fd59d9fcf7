"""A solve that was saved, loaded and continued goes where an uninterrupted one goes, to the last bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hesse.minimizers import State, Status, least_squares, minimize
from hesse.minimizers.choice import COMPOSITE
from hesse.minimizers.least_squares import METHODS as LEAST_SQUARES
from hesse.minimizers.methods import METHODS

EVALUATIONS = ("nfev", "njev", "nhev", "nhvp")
PENALTIES = [{"l1": 0.3}, {"bounds": (-2.0, 0.7)}, {"l1": 0.1, "l2": 0.1, "bounds": (None, 0.9)}]
START = torch.tensor([-1.2, 1.0, -0.5, 0.8], dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    """Chained: a curved valley, in which every search shortens steps and every region changes."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def named(x: dict[str, Tensor]) -> Tensor:
    return rosenbrock(torch.cat([x["a"].reshape(-1), x["b"]]))


def on_arrays(x: np.ndarray[Any, Any]) -> float:
    return float(rosenbrock(torch.from_numpy(x)))


def slope_on_arrays(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.func.grad(rosenbrock)(torch.from_numpy(x)).numpy()


def curvature_on_arrays(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.func.hessian(rosenbrock)(torch.from_numpy(x)).numpy()


def saved(state: State, folder: Path) -> State:
    """What comes back of a state from a file."""
    state.save(folder / "状態.safetensors")
    return State.load(folder / "状態.safetensors")


def numbers(x: Any) -> Tensor:
    parts = x.values() if isinstance(x, dict) else [x]
    return torch.cat([torch.as_tensor(part).reshape(-1) for part in parts])


def same_way(solve: Callable[..., Any], x0: Any, folder: Path, steps: int = 4, total: int = 12) -> None:
    """Stopped after ``steps``, saved and continued, against ``total`` in one go."""
    whole = solve(x0, max_steps=total)
    assert len(whole.trace) > steps + 1, "nothing is left to continue"
    part = solve(x0, max_steps=steps)
    assert part.status == Status.MAX_STEPS
    loaded = saved(part.state, folder)
    rest = solve(loaded, max_steps=total)
    assert (numbers(rest.x) == numbers(whole.x)).all()
    assert (rest.fun == whole.fun) if isinstance(rest.fun, float) else (rest.fun == whole.fun).all()
    assert (rest.status, rest.nit, rest.method) == (whole.status, whole.nit, whole.method)
    columns = [name for name in whole.trace[0]._fields if name not in EVALUATIONS]
    for name in columns:
        np.testing.assert_array_equal(getattr(rest.trace, name), getattr(whole.trace, name), err_msg=name)
    # The point where it stopped is evaluated once more, and no other.
    for name in EVALUATIONS[:3]:
        assert 0 <= getattr(rest, name) - getattr(whole, name) <= 1, name
    assert type(rest.x) is type(whole.x)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_to_the_same_iterates(method: str, tmp_path: Path) -> None:
    same_way(lambda x, **more: minimize(rosenbrock, x, method=method, **more), START, tmp_path)


@pytest.mark.parametrize("method", COMPOSITE)
@pytest.mark.parametrize(
    "penalty", [{"l1": 0.3}, {"bounds": (-2.0, 0.7)}, {"l1": 0.1, "l2": 0.1, "bounds": (None, 0.9)}]
)
def test_l1_and_bounds_go_on_to_the_same_iterates(method: str, penalty: dict[str, Any], tmp_path: Path) -> None:
    same_way(lambda x, **more: minimize(rosenbrock, x, method=method, **penalty, **more), START, tmp_path)


@pytest.mark.parametrize("method", LEAST_SQUARES)
def test_least_squares_goes_on_to_the_same_iterates(method: str, tmp_path: Path) -> None:
    def residual(x: Tensor) -> Tensor:
        return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])

    same_way(lambda x, **more: least_squares(residual, x, method=method, **more), START, tmp_path)


@pytest.mark.parametrize("method", ["trust-exact", "trust-krylov", "bfgs", "l-bfgs-b", "arc"])
def test_a_dict_goes_on_to_the_same_iterates(method: str, tmp_path: Path) -> None:
    x0 = {"b": START[2:].clone(), "a": START[:2].reshape(2, 1).clone()}
    same_way(lambda x, **more: minimize(named, x, method=method, **more), x0, tmp_path)
    loaded = State.load(tmp_path / "状態.safetensors")
    assert {name: value.shape for name, value in loaded.x.items()} == {"b": (2,), "a": (2, 1)}
    assert list(loaded.x) == ["b", "a"]


@pytest.mark.parametrize("method", ["trust-exact", "bfgs", "l-bfgs-b", "newton-cg"])
def test_an_array_goes_on_to_the_same_iterates(method: str, tmp_path: Path) -> None:
    def solve(x: Any, **more: Any) -> Any:
        return minimize(on_arrays, x, jac=slope_on_arrays, hess=curvature_on_arrays, method=method, **more)

    same_way(solve, START.numpy(), tmp_path)


@pytest.mark.parametrize("method", ["bfgs", "l-bfgs-b", "trust-exact"])
def test_differences_of_values_go_on_to_the_same_minimum(method: str, tmp_path: Path) -> None:
    part = minimize(on_arrays, START.numpy(), method=method, max_steps=4)
    rest = minimize(on_arrays, saved(part.state, tmp_path), method=method)
    # Step lengths of differences are found anew: the iterates are those of another rounding.
    np.testing.assert_allclose(rest.x, minimize(on_arrays, START.numpy(), method=method).x, atol=1e-4)
    assert rest.success
    assert rest.trace[4] == part.trace[4]


def test_float32_and_shapes_survive(tmp_path: Path) -> None:
    x0 = START.float().reshape(2, 2)
    same_way(lambda x, **more: minimize(lambda y: rosenbrock(y.reshape(-1)), x, method="bfgs", **more), x0, tmp_path)
    loaded = State.load(tmp_path / "状態.safetensors")
    assert loaded.x.dtype == torch.float32
    assert loaded.x.shape == (2, 2)


def test_auto_goes_on_with_the_method_that_it_chose(tmp_path: Path) -> None:
    part = minimize(rosenbrock, START, method="bfgs", max_steps=3)
    rest = minimize(rosenbrock, saved(part.state, tmp_path))
    assert rest.method == "bfgs"
    assert (rest.x == minimize(rosenbrock, START, method="bfgs").x).all()


def test_a_state_can_be_gone_on_from_twice(tmp_path: Path) -> None:
    part = minimize(rosenbrock, START, method="l-bfgs-b", max_steps=3)
    before = {name: value.clone() for name, value in part.state.memory.items()}
    first, second = minimize(rosenbrock, part.state), minimize(rosenbrock, part.state)
    assert (first.x == second.x).all()
    assert len(part.trace) == 4
    assert all(torch.equal(part.state.memory[name], value) for name, value in before.items())


def test_a_fit_can_be_gone_on_from_twice() -> None:
    def residual(x: Tensor) -> Tensor:
        return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])

    part = least_squares(residual, START, max_steps=3)
    first, second = least_squares(residual, part.state), least_squares(residual, part.state)
    assert len(part.trace) == 4
    assert (first.x == second.x).all()
    assert first.nit == second.nit


def test_a_file_holds_what_the_state_holds(tmp_path: Path) -> None:
    part = minimize(rosenbrock, START, method="bfgs", max_steps=3)
    loaded = saved(part.state, tmp_path)
    assert loaded.method == "bfgs"
    assert loaded.memory.keys() == part.state.memory.keys()
    assert all(torch.equal(loaded.memory[name], value) for name, value in part.state.memory.items())
    assert str(loaded.trace) == str(part.trace)
    assert all(type(a) is type(b) for a, b in zip(loaded.trace[2], part.trace[2], strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["状態.safetensors"]


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\xff" * 64])
def test_files_of_another_kind_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a safetensors file, or is cut off"):
        State.load(path)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    minimize(rosenbrock, START, max_steps=2).state.save(path)
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(ValueError, match="cut off"):
        State.load(path)


def test_tensors_that_are_no_state_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"not the state of a solve.*State\.save"):
        State.load(path)


def test_a_state_without_its_x_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    minimize(rosenbrock, START, max_steps=2).state.save(path)
    tensors = load_file(path)
    del tensors["x"]
    save_file(tensors, path, metadata={"hesse": "minimize", "method": "trust-exact", "x": "{}"})
    with pytest.raises(ValueError, match="not the state of a solve"):
        State.load(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        State.load(tmp_path / "nowhere.safetensors")


def test_without_safetensors_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = minimize(rosenbrock, START, max_steps=1).state
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        state.save(tmp_path / "state")
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        State.load(tmp_path / "state")
