"""What a user's function returned is one real number, or the error says what it is and what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hesse.minimizers.functions.returned import number, square

X = torch.zeros(2, dtype=torch.float64)


ONE = [2.5, torch.tensor(2.5), torch.tensor([[2.5]]), np.float64(2.5), np.array([2.5]), np.float32(2.5), [2.5]]


@pytest.mark.parametrize("value", ONE, ids=str)
def test_one_number_of_any_kind(value: Any) -> None:
    assert number(value) == 2.5


def test_a_number_that_carries_a_graph() -> None:
    assert number(torch.tensor(2.5, requires_grad=True) * 1) == 2.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_a_number(value: float) -> None:
    assert str(number(value)) == str(value)
    assert str(number(torch.tensor(value))) == str(value)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "None": (None, TypeError, "None.*return statement"),
    "int": (3, TypeError, "integer.*rounded"),
    "bool": (True, TypeError, "integer"),
    "int tensor": (torch.tensor(3), TypeError, r"integer \(torch.int64\)"),
    "complex": (1j, TypeError, r"complex.*\.real"),
    "complex tensor": (torch.tensor(1j), TypeError, r"complex.*\.real"),
    "text": ("1.0", TypeError, "fun returned str"),
    "object": (object(), TypeError, "fun returned object"),
    "dict": ({"loss": 1.0}, TypeError, "fun returned dict"),
    "pair of tensors": ((torch.ones(()), torch.ones(2)), TypeError, "fun returned tuple"),
    "pair with a graph": ((torch.ones((), requires_grad=True), torch.ones(2)), TypeError, "fun returned tuple"),
    "ragged": ((1.0, np.zeros(2)), TypeError, "fun returned tuple"),
    "vector": (torch.ones(3), ValueError, r"shape \[3\].*least_squares"),
    "array": (np.ones((3, 1)), ValueError, r"shape \[3, 1\].*least_squares"),
    "list": ([1.0, 2.0], ValueError, r"shape \[2\]"),
    "empty": (torch.ones(0), ValueError, r"shape \[0\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_anything_else_is_refused_with_what_it_is(name: str) -> None:
    value, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        number(value)


def test_a_hessian_of_any_kind_becomes_one_of_x() -> None:
    H = [[2.0, 1.0], [1.0, 3.0]]
    for given in (H, np.array(H), torch.tensor(H), np.array(H, dtype=np.float32)):
        found = square(given, X)
        assert found.dtype == torch.float64
        assert found.tolist() == H
    assert square(5.0, X[:1]).tolist() == [[5]]
    assert square(np.array([5.0]), X[:1]).tolist() == [[5]]


def test_a_hessian_with_a_graph_is_cut_from_it() -> None:
    assert not square(torch.eye(2, requires_grad=True) * 2, X).requires_grad


WRONG_MATRICES: dict[str, tuple[Any, type[Exception], str]] = {
    "triangle": (np.triu(np.ones((2, 2))), ValueError, "not symmetric.*differ by 1.*triangle"),
    "shape": (np.eye(3), ValueError, r"must return \[2, 2\].*got \[3, 3\]"),
    "vector": (np.ones(4), ValueError, r"must return \[2, 2\].*got \[4\]"),
    "None": (None, TypeError, "hess must be real.*got NoneType"),
    "text": ("a", TypeError, "hess must be real.*got str"),
    "complex": (1j * np.eye(2), TypeError, "real"),
    "complex tensor": (1j * torch.eye(2), TypeError, "real"),
}


@pytest.mark.parametrize("name", WRONG_MATRICES)
def test_another_matrix_is_refused_with_what_it_is(name: str) -> None:
    value, kind, words = WRONG_MATRICES[name]
    with pytest.raises(kind, match=words):
        square(value, X)


def test_asymmetry_of_differences_is_forgiven_in_its_own_scale() -> None:
    H = np.array([[2.0, 1.0 + 1e-9], [1.0, 3.0]])
    square(H, X)
    square(1e-20 * H, X)
    with pytest.raises(ValueError, match="not symmetric"):
        square(1e-20 * np.array([[2.0, 1.1], [1.0, 3.0]]), X)


def test_a_sparse_hessian_is_understood() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    H = square(sparse.csr_array(np.array([[2.0, 1.0], [1.0, 3.0]])), X)
    v = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert (H @ v).tolist() == [1, -2]
    with pytest.raises(ValueError, match="not symmetric"):
        square(sparse.csr_array(np.triu(np.ones((2, 2)))), X)
