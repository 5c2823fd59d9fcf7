"""What JAX and TensorFlow offer: gradients through several arrays, second derivatives, memory shared with torch.

Both libraries are optional: a test of one that is not installed is skipped.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hesse.objective.foreign import NUMPY, Array, Autodiff, home, language
from tolerances import ALGEBRA

LANGUAGES = ("jax", "tensorflow")
X, Y = np.linspace(-1, 2, 4), np.array([0.5, 3.0])


@pytest.fixture(params=LANGUAGES)
def own(request: pytest.FixtureRequest) -> Iterator[Autodiff]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's own, while it is imported
        library = pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    if request.param == "jax":
        with library.enable_x64(True):
            yield language("jax")
    else:
        yield language("tensorflow")


def two(x: Array, y: Array) -> Array:
    """An array [4] of two arrays, in any library; the last element of y is unused."""
    return x**3 * y[0] + x


def flat(x: Array) -> Array:
    return x[0] ** 3 * x[1] + x[2] ** 2 * x[1]


def test_pull_is_the_gradient_of_output_times_weights(own: Autodiff) -> None:
    assert own.pull is not None
    weights = np.array([1.0, -2.0, 0.5, 3.0])
    found = own.pull(two, [own.array(X), own.array(Y)], own.array(weights))
    x, y = torch.tensor(X, requires_grad=True), torch.tensor(Y, requires_grad=True)
    wanted = torch.autograd.grad(two(x, y), [x, y], torch.tensor(weights))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own.take(one), other, **ALGEBRA)


def test_pull_of_a_pull_is_the_hessian_times_a_direction(own: Autodiff) -> None:
    pull = own.pull
    assert pull is not None
    ones, u, v = np.ones(4), np.array([1.0, 0.0, -1.0, 2.0]), np.array([0.3, -4.0])
    arrays = [own.array(X), own.array(Y)]
    found = pull(lambda *xs: list(pull(two, xs, own.array(ones))), arrays, [own.array(u), own.array(v)])

    def total(x: Tensor, y: Tensor) -> Tensor:
        return two(x, y).sum()

    _, wanted = torch.autograd.functional.hvp(
        total, (torch.tensor(X), torch.tensor(Y)), (torch.tensor(u), torch.tensor(v))
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own.take(one), other, **ALGEBRA)


def test_slope_bend_and_rows_are_those_of_torch(own: Autodiff) -> None:
    x, V = torch.tensor(X), torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
    at, H = own.give(x), torch.func.hessian(flat)(x)
    torch.testing.assert_close(own.take(own.slope(flat)(at)), torch.func.grad(flat)(x), **ALGEBRA)
    torch.testing.assert_close(own.take(own.bend(flat)(at, own.give(V[0]))), H @ V[0], **ALGEBRA)
    torch.testing.assert_close(own.take(own.rows(flat)(at, own.give(V))), V @ H, **ALGEBRA)


def test_tensors_share_their_memory_and_numpy_arrays_are_copied(own: Autodiff) -> None:
    x = torch.linspace(0, 1, 64, dtype=torch.float64)
    assert own.take(own.give(x)).data_ptr() == x.data_ptr()
    assert np.array_equal(np.asarray(own.give(x[::2])), x[::2].numpy())
    mine = x.numpy().copy()
    theirs = own.array(mine)
    mine[:] = 7
    assert own.owns(theirs) and np.array_equal(np.asarray(theirs), x.numpy())
    assert not own.owns(mine) and not own.owns(x)


def test_arrays_are_at_home_in_their_library(own: Autodiff) -> None:
    assert home(own.array(X)) == own.name
    assert home(X) == home(np.float64(1)) == NUMPY.name
    assert home(torch.tensor(X)) is None and home(1.0) is None


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LANGUAGES:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ModuleNotFoundError, match=rf"pip install hesse\[{name}\]"):
            language(name)
    with pytest.raises(ValueError, match="got 'julia'"):
        language("julia")


def test_neither_library_is_imported_by_ours() -> None:
    code = "import sys, hesse.check, hesse.minimizers; print({'jax', 'tensorflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
