"""What the user gave comes back in its kind, shape and dtype, and is never written to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hesse.minimizers.functions.border import Arrays, Named, Tensors, border_of, described

STARTS: dict[str, Any] = {
    "number": torch.tensor(2.0),
    "matrix": torch.arange(6.0, dtype=torch.float64).view(2, 3),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "every other": torch.arange(8.0)[::2],
    "requires grad": torch.ones(3, requires_grad=True),
    "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    "dict": {"weight": torch.arange(6.0).view(3, 2).T, "bias": torch.tensor(7.0), "none": torch.zeros(0, 3)},
    "array": np.arange(6.0).reshape(2, 3),
    "array of float32": np.arange(3, dtype=np.float32),
    "fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "negative stride": np.arange(4.0)[::-1],
    "list": [1.0, 2.5],
    "float": 3.0,
    "nothing": torch.zeros(0),
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in b)
    if isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b.detach())
    b = np.atleast_1d(np.asarray(b, dtype=np.float64))  # arrays are solved in double precision, as by SciPy
    return bool(a.dtype == b.dtype and a.shape == b.shape and (a == b).all())


@pytest.mark.parametrize("name", STARTS)
def test_outside_of_inside_is_what_was_given(name: str) -> None:
    x0 = STARTS[name]
    border = border_of(x0)
    assert border.x0.ndim == 1
    assert border.x0.is_contiguous()
    assert not border.x0.requires_grad
    assert equal(border.outside(border.x0), x0)
    torch.testing.assert_close(border.inside(border.outside(border.x0), "x"), border.x0)


@pytest.mark.parametrize("name", STARTS)
def test_the_flat_vector_shares_no_memory_with_the_start(name: str) -> None:
    x0 = STARTS[name]
    before = border_of(x0).x0.clone()
    border_of(x0).x0.add_(1)
    assert torch.equal(border_of(x0).x0, before)


def test_the_language_is_that_of_x0() -> None:
    assert isinstance(border_of(torch.zeros(2)), Tensors)
    assert isinstance(border_of({"a": torch.zeros(2)}), Named)
    assert isinstance(border_of([0.0]), Arrays)


def test_an_array_outside_may_be_written_to() -> None:
    border = border_of(np.zeros(2))
    border.outside(border.x0)[:] = 5
    assert border.x0.tolist() == [0, 0]


@pytest.mark.parametrize("name", STARTS)
def test_a_description_leads_back_to_the_border(name: str) -> None:
    border = border_of(STARTS[name])
    again = described(border.describe(), border.x0)
    assert type(again) is type(border)
    assert equal(again.outside(border.x0), STARTS[name])


@pytest.mark.parametrize("name", ["matrix", "array", "dict"])
def test_a_flat_gradient_is_understood(name: str) -> None:
    border = border_of(STARTS[name])
    flat = torch.arange(float(border.x0.numel()), dtype=border.x0.dtype)
    assert torch.equal(border.inside(flat, "jac"), flat)


@pytest.mark.parametrize("name", ["matrix", "array"])
def test_another_shape_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"jac must have the shape of x0, \[2, 3\]; got \[5\]"):
        border_of(STARTS[name]).inside(torch.zeros(5), "jac")


@pytest.mark.parametrize("name", ["matrix", "array"])
@pytest.mark.parametrize(
    "value",
    [None, "a", [[1], [2, 3]], object(), 1j * np.ones((2, 3)), 1j * torch.ones(2, 3)],
    ids=["nothing", "text", "ragged", "object", "complex array", "complex tensor"],
)
def test_what_is_no_real_number_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match="jac must be real"):
        border_of(STARTS[name]).inside(value, "jac")


def test_a_dict_wants_a_dict() -> None:
    with pytest.raises(TypeError, match="jac must be a dict of tensors"):
        border_of(STARTS["dict"]).inside([1.0], "jac")


def test_a_matrix_is_of_the_users_kind() -> None:
    assert isinstance(border_of(np.zeros(2)).matrix(torch.eye(2)), np.ndarray)
    assert isinstance(border_of(torch.zeros(2)).matrix(torch.eye(2)), torch.Tensor)


def test_any_precision_of_arrays_becomes_double() -> None:
    for kind in (np.float16, np.float32, np.longdouble):
        assert border_of(np.zeros(2, dtype=kind)).x0.dtype == torch.float64
