"""Operators and their algebra against the same arithmetic on dense matrices."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from hesse.linalg import LinearOperator
from hesse.tree import Layout
from spectra import Counted, symmetric
from tolerances import ALGEBRA, ROUNDING

LAYOUT = Layout({"encoder.weight": torch.Size([2, 2]), "encoder.bias": torch.Size([1]), "head.weight": torch.Size([2])})
N = LAYOUT.size
INSIDE = slice(4, 7)  # the rows of encoder.bias and head.weight


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


S = symmetric(torch.tensor([5.0, 3, 1, 0.5, -0.1, -1, -4]))
P = symmetric(torch.tensor([6.0, 4, 3, 2, 1, 0.5, 0]), seed=1)
G = _random(N, N, seed=2)
H = _random(N, N, seed=3)
EYE = torch.eye(N, dtype=torch.float64)


def indefinite() -> LinearOperator:
    return LinearOperator.of(S, layout=LAYOUT)


def positive() -> LinearOperator:
    return LinearOperator.of(P, layout=LAYOUT, psd=True)


def general(matrix: Tensor = G) -> LinearOperator:
    return LinearOperator.of(matrix, layout=LAYOUT)


def one_way() -> LinearOperator:
    """Not symmetric, and the action of its transpose is not known."""
    return LinearOperator(lambda v: G @ v, LAYOUT, dtype=torch.float64)


# An operator, its matrix, and what it is declared to be.
CASES: dict[str, tuple[Callable[[], LinearOperator], Tensor, str]] = {
    "symmetric": (indefinite, S, "symmetric"),
    "psd": (positive, P, "psd"),
    "not symmetric": (general, G, "neither"),
    "identity": (lambda: LinearOperator.identity(indefinite()), EYE, "psd"),
    "sum": (lambda: indefinite() + positive(), S + P, "symmetric"),
    "sum of psd": (lambda: positive() + LinearOperator.identity(positive()), P + EYE, "psd"),
    "sum, not symmetric": (lambda: general() + positive(), G + P, "neither"),
    "difference": (lambda: positive() - indefinite(), P - S, "symmetric"),
    "difference of psd": (lambda: LinearOperator.identity(positive()) - positive(), EYE - P, "symmetric"),
    "difference, not symmetric": (lambda: indefinite() - general(), S - G, "neither"),
    "negative": (lambda: -positive(), -P, "symmetric"),
    "multiple": (lambda: 3 * positive(), 3 * P, "psd"),
    "multiple on the right": (lambda: indefinite() * np.float64(0.5), 0.5 * S, "symmetric"),
    "NumPy number on the left": (lambda: np.float64(0.5) * general(), 0.5 * G, "neither"),
    "multiple by a tensor": (lambda: positive() * torch.tensor([[2.0]]), 2 * P, "psd"),
    "negative multiple": (lambda: positive() * -2, -2 * P, "symmetric"),
    "no multiple": (lambda: 0 * positive(), 0 * P, "psd"),
    "quotient": (lambda: positive() / 4, P / 4, "psd"),
    "quotient by a negative": (lambda: positive() / -4, P / -4, "symmetric"),
    "product": (lambda: indefinite() @ positive(), S @ P, "neither"),
    "product, not symmetric": (lambda: general() @ general(H), G @ H, "neither"),
    "square": (lambda: (lambda A: A @ A)(indefinite()), S @ S, "psd"),
    "square, not symmetric": (lambda: (lambda A: A @ A)(general()), G @ G, "neither"),
    "transposed": (lambda: general().T, G.T, "neither"),
    "transposed, symmetric": (lambda: indefinite().T, S, "symmetric"),
    "transposed psd": (lambda: positive().T, P, "psd"),
    "transposed twice": (lambda: general().T.T, G, "neither"),
    "transposed multiple": (lambda: (general() / 2).T, G.T / 2, "neither"),
    "transposed sum": (lambda: (general() + positive()).T, G.T + P, "neither"),
    "transposed difference": (lambda: (positive() - general()).T, P - G.T, "neither"),
    "transposed product": (lambda: (general() @ general(H)).T, (G @ H).T, "neither"),
    "transposed product of symmetric ones": (lambda: (indefinite() @ positive()).T, P @ S, "neither"),
    "block": (lambda: indefinite().block(["*.bias", "head.*"]), S[INSIDE, INSIDE], "symmetric"),
    "psd block": (lambda: positive().block(["*.bias", "head.*"]), P[INSIDE, INSIDE], "psd"),
    "block, not symmetric": (lambda: general().block(["*.bias", "head.*"]), G[INSIDE, INSIDE], "neither"),
    "transposed block": (lambda: general().block(["*.bias", "head.*"]).T, G[INSIDE, INSIDE].T, "neither"),
    "block of a sum": (lambda: (general() + positive()).block("head.*"), (G + P)[5:, 5:], "neither"),
    "one way": (one_way, G, "neither"),
    "one way, sum": (lambda: one_way() + positive(), G + P, "neither"),
    "one way, product": (lambda: positive() @ one_way(), P @ G, "neither"),
    "from SciPy": (lambda: LinearOperator.from_scipy(G.numpy()), G, "neither"),
    "from SciPy, transposed": (lambda: LinearOperator.from_scipy(G.numpy()).T, G.T, "neither"),
    "from SciPy, sparse": (lambda: LinearOperator.from_scipy(scipy.sparse.csr_array(P.numpy()), psd=True), P, "psd"),
    "SciPy and back": (lambda: LinearOperator.from_scipy(general().to_scipy()), G, "neither"),
}


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_matrix(name: str) -> None:
    make, M, declared = CASES[name]
    A, n = make(), len(M)
    assert A.shape == (n, n)
    assert (A.symmetric, A.psd) == (declared != "neither", declared == "psd")
    torch.testing.assert_close(A.dense(), M, **ALGEBRA)
    torch.testing.assert_close(A.dense(chunk=2), M, **ALGEBRA)
    for v in (_random(n, seed=4), _random(n, 5, seed=5), _random(5, n, seed=6).mT, _random(n, 1, seed=7)):
        torch.testing.assert_close(A @ v, M @ v, **ALGEBRA)
    assert (A @ torch.zeros(n, 0, dtype=torch.float64)).shape == (n, 0)


@pytest.mark.parametrize("name", [name for name in CASES if "SciPy" not in name])
def test_dicts_are_vectors_by_name(name: str) -> None:
    make, M, _ = CASES[name]
    A = make()
    assert A.layout is not None
    for v in (_random(len(M), seed=4), _random(len(M), 3, seed=5)):
        parts = A.layout.split(v)
        product = A @ dict(reversed(parts.items()))  # by name, not by order
        assert list(product) == list(A.layout.shapes)
        torch.testing.assert_close(A.layout.flatten(product), M @ v, **ALGEBRA)


@pytest.mark.parametrize("name", [name for name in CASES if "one way" not in name])
def test_the_transpose_is_that_of_the_matrix(name: str) -> None:
    make, M, _ = CASES[name]
    torch.testing.assert_close(make().T.dense(), M.T, **ALGEBRA)


@pytest.mark.parametrize("name", [name for name in CASES if "one way" in name])
def test_a_transpose_that_is_not_known_is_not_made_up(name: str) -> None:
    with pytest.raises(TypeError, match="transpose="):
        _ = CASES[name][0]().T


def test_symmetry_is_seen_and_may_be_declared() -> None:
    assert LinearOperator.of(S).symmetric
    assert not LinearOperator.of(S).psd
    nearly = S.clone()
    nearly[0, 1] += 1e-13
    assert not LinearOperator.of(nearly).symmetric
    assert LinearOperator.of(nearly, symmetric=True).symmetric
    assert not LinearOperator.of(S, symmetric=False).symmetric
    assert LinearOperator.of(nearly, psd=True).symmetric


def test_names_come_from_whichever_side_has_them() -> None:
    unnamed = LinearOperator.of(P)
    assert unnamed.layout is None
    for A in (unnamed + indefinite(), indefinite() + unnamed, unnamed @ indefinite(), indefinite() - unnamed):
        assert A.layout == LAYOUT
    assert LinearOperator.identity(unnamed).layout is None


# -- blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [
        ("*", [0, 1, 2, 3, 4, 5, 6]),
        ("encoder.*", [0, 1, 2, 3, 4]),
        ("*.weight", [0, 1, 2, 3, 5, 6]),
        ("encoder.bias", [4]),
        (["head.weight", "encoder.bias"], [4, 5, 6]),  # in the order of the rows, not of the patterns
    ],
)
def test_a_block_has_the_rows_that_the_pattern_names(pattern: str | list[str], rows: list[int]) -> None:
    block = general().block(pattern)
    assert block.layout is not None
    assert list(block.layout.shapes) == LAYOUT.match(pattern)
    torch.testing.assert_close(block.dense(), G[rows][:, rows], **ALGEBRA)


def test_a_block_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"'decoder.*encoder.weight, encoder.bias, head.weight"):
        general().block("decoder.*")
    with pytest.raises(TypeError, match="no names"):
        LinearOperator.of(G).block("*")


# -- dtypes and graphs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.float16])
def test_vectors_of_any_precision_come_back_in_the_operators(dtype: torch.dtype, given: torch.dtype) -> None:
    A = LinearOperator.of(G.to(dtype))
    v = _random(N, 2, seed=4).to(given)
    kept = v.clone()
    expected = G.to(dtype).double() @ v.to(dtype).double()
    assert (A @ v).dtype == dtype
    torch.testing.assert_close((A @ v).double(), expected, **ROUNDING[dtype])
    assert torch.equal(v, kept)


@pytest.mark.parametrize("combine", [python.add, python.sub, python.matmul])
def test_two_precisions_give_the_higher(combine: Callable[[object, object], LinearOperator]) -> None:
    single, double = LinearOperator.of(G.float()), LinearOperator.of(H)
    for A, B, M, K in ((single, double, G.float().double(), H), (double, single, H, G.float().double())):
        found = combine(A, B)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.dense(), torch.as_tensor(combine(M, K)), **ROUNDING[torch.float32])
        torch.testing.assert_close(found.T.dense(), torch.as_tensor(combine(M, K)).T, **ROUNDING[torch.float32])


def test_products_keep_no_graph() -> None:
    weight = G.clone().requires_grad_()
    v = _random(N, seed=4).requires_grad_()
    recording = LinearOperator(lambda u: weight @ u, LAYOUT, dtype=torch.float64)
    for A in (LinearOperator.of(weight, layout=LAYOUT), recording, 2 * recording, LinearOperator.identity(recording)):
        assert not (A @ v).requires_grad
        assert not any(value.requires_grad for value in (A @ LAYOUT.split(v)).values())
        assert not (A @ v[:, None][:, :0]).requires_grad
    assert weight.grad is None
    assert v.grad is None


def test_the_identity_gives_a_tensor_of_its_own() -> None:
    v = torch.ones(N, dtype=torch.float64)
    (LinearOperator.identity(indefinite()) @ v).zero_()
    assert v.sum() == N


# -- SciPy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scipy_finds_the_eigenvalues(dtype: torch.dtype) -> None:
    A = LinearOperator.of(symmetric(torch.arange(1.0, 41)).to(dtype)).to_scipy()
    assert A.dtype == np.dtype(str(dtype).removeprefix("torch."))
    values = scipy.sparse.linalg.eigsh(A, k=3, return_eigenvectors=False, v0=np.ones(40, A.dtype))
    torch.testing.assert_close(
        torch.from_numpy(values).double(), torch.tensor([38.0, 39, 40], dtype=torch.float64), **ROUNDING[dtype]
    )


def test_scipy_solves() -> None:
    M = symmetric(torch.linspace(1, 10, 40))
    b = _random(40, seed=4)
    x, info = scipy.sparse.linalg.cg(LinearOperator.of(M, psd=True).to_scipy(), b.numpy(), rtol=1e-12)
    assert info == 0
    torch.testing.assert_close(torch.from_numpy(x), torch.linalg.solve(M, b), **ALGEBRA)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scipy_multiplies_and_transposes(dtype: torch.dtype) -> None:
    M = G.to(dtype)
    A = LinearOperator.of(M).to_scipy()
    v, V = _random(N, seed=4).to(dtype), _random(N, 3, seed=5).to(dtype)
    array = torch.float32 if dtype == torch.bfloat16 else dtype  # NumPy has no bfloat16
    for ours, theirs in (
        (A @ v.to(array).numpy(), M @ v),
        (A @ V.to(array).numpy(), M @ V),
        (A.rmatvec(v.to(array).numpy()), M.T @ v),
        (A.rmatmat(V.to(array).numpy()), M.T @ V),
    ):
        torch.testing.assert_close(torch.from_numpy(ours).double(), theirs.double(), **ROUNDING[dtype])


def test_scipy_may_hand_over_arrays_that_cannot_be_written() -> None:
    v = np.ones(N)
    v.flags.writeable = False
    torch.testing.assert_close(torch.from_numpy(general().to_scipy() @ v), G.sum(1), **ALGEBRA)


def test_from_scipy_takes_the_dtype_and_copies() -> None:
    assert LinearOperator.from_scipy(np.eye(3, dtype=np.float32)).dtype == torch.float32
    assert LinearOperator.from_scipy(np.eye(3, dtype=np.int64)).dtype == torch.float64
    same = scipy.sparse.linalg.LinearOperator((3, 3), matvec=lambda v: v, matmat=lambda v: v, dtype=np.float64)
    v = torch.ones(3, 2, dtype=torch.float64)
    (LinearOperator.from_scipy(same) @ v).zero_()
    assert v.sum() == 6


def test_what_cannot_come_from_scipy() -> None:
    with pytest.raises(ValueError, match=r"square.*\[2, 3\]"):
        LinearOperator.from_scipy(np.ones((2, 3)))
    with pytest.raises(TypeError, match="complex128"):
        LinearOperator.from_scipy(np.eye(2, dtype=np.complex128))


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (8, 2), (2, 7), (7, 2, 1), (), (1,)])
def test_a_vector_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"7 rows .* got shape"):
        _ = general() @ torch.zeros(shape)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_a_vector_of_another_kind(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"real floating vectors; got {dtype}"):
        _ = general() @ torch.zeros(N, dtype=dtype)


@pytest.mark.parametrize("x", [2.0, [1.0] * N, np.ones(N)])
def test_no_vector(x: object) -> None:
    with pytest.raises(TypeError, match=f"got {type(x).__name__}"):
        _ = general() @ x  # type: ignore[operator]


def test_dicts_that_do_not_fit() -> None:
    parts = LAYOUT.split(torch.ones(N))
    with pytest.raises(TypeError, match="no names"):
        _ = LinearOperator.of(G) @ parts
    with pytest.raises(ValueError, match=r"missing \['head.weight'\]"):
        _ = general() @ {name: value for name, value in parts.items() if name != "head.weight"}
    with pytest.raises(ValueError, match=r"'head.weight' must have shape \[2\]; got \[3\]"):
        _ = general() @ (parts | {"head.weight": torch.ones(3)})


@pytest.mark.parametrize("combine", [python.add, python.sub, python.matmul])
def test_operators_that_do_not_go_together(combine: Callable[[object, object], object]) -> None:
    with pytest.raises(ValueError, match="7 and 3 rows"):
        combine(general(), LinearOperator.of(torch.eye(3)))
    turned = Layout(dict(reversed(LAYOUT.shapes.items())))
    renamed = Layout({"x": torch.Size([N])})
    for layout in (turned, renamed):
        with pytest.raises(ValueError, match="other names, shapes or another order"):
            combine(general(), LinearOperator.of(H, layout=layout))
    with pytest.raises(ValueError, match="different devices, cpu and meta"):
        combine(general(), LinearOperator(lambda v: v, N, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("combine", [python.add, python.sub])
@pytest.mark.parametrize("other", [2.0, torch.ones(N), EYE])
def test_numbers_and_tensors_are_not_added(combine: Callable[[object, object], object], other: object) -> None:
    with pytest.raises(TypeError, match="an operator is combined with operators"):
        combine(general(), other)


@pytest.mark.parametrize("other", [general(), torch.ones(N), "2", 1j])
def test_operators_are_multiplied_by_numbers_only(other: object) -> None:
    for combine in (python.mul, python.truediv):
        with pytest.raises(TypeError, match="write A @ x"):
            combine(general(), other)


def test_what_is_no_operator() -> None:
    for matrix in (torch.ones(2, 3), torch.ones(4), torch.ones(2, 2, 2)):
        with pytest.raises(ValueError, match=r"square matrix .* got shape"):
            LinearOperator.of(matrix)
    with pytest.raises(ValueError, match="7 rows, and the matrix has 3"):
        LinearOperator.of(torch.eye(3), layout=LAYOUT)
    for dtype in (torch.complex64, torch.int64):
        with pytest.raises(TypeError, match=f"{dtype}"):
            LinearOperator.of(torch.eye(3, dtype=dtype))
    for nothing in (0, Layout({}), Layout({"empty": torch.Size([0, 3])})):
        with pytest.raises(ValueError, match="at least one row; got 0"):
            LinearOperator(lambda v: v, nothing, dtype=torch.float32)


def test_a_function_that_gives_another_shape() -> None:
    for function in (lambda v: v[:3], lambda v: v[:, 0], lambda v: v.mT):
        with pytest.raises(ValueError, match="must give columns of the shape it takes"):
            _ = LinearOperator(function, N, dtype=torch.float64) @ torch.ones(N, 2)


def test_the_repr_says_what_is_declared() -> None:
    assert repr(positive()) == "LinearOperator(7 x 7, torch.float64, cpu, psd)"
    assert "cpu, symmetric)" in repr(indefinite())
    assert "not symmetric" in repr(general())


# -- what an operator is asked, however it was made -------------------------------------------------------------------

# Each answer of an operator, and the same from its dense matrix; for the last two it is damped by 5.
ANSWERS: dict[str, tuple[Callable[[LinearOperator], Tensor], Callable[[Tensor], Tensor]]] = {
    "trace": (lambda A: A.trace().value, torch.trace),
    "diagonal": (lambda A: A.diagonal().value, torch.diagonal),
    "frobenius": (lambda A: A.frobenius().value, torch.linalg.matrix_norm),
    "eigsh": (lambda A: A.eigsh(2, which="SA").values, lambda M: torch.linalg.eigvalsh(M)[:2]),
    "spectral_density": (lambda A: A.spectral_density().nodes[0], torch.linalg.eigvalsh),
    "logdet": (lambda A: A.logdet(25.0).value, lambda M: torch.logdet(M + 25 * torch.eye(len(M)))),
    "solve": (
        lambda A: A.solve(torch.ones(A.shape[0]), damping=25.0, rtol=1e-10).x,
        lambda M: torch.linalg.solve(M + 25 * torch.eye(len(M)), torch.ones(len(M), dtype=M.dtype)),
    ),
}


@pytest.mark.parametrize("question", ANSWERS)
@pytest.mark.parametrize("name", CASES)
def test_every_operator_answers_every_question(name: str, question: str) -> None:
    make, M, declared = CASES[name]
    ask, truth = ANSWERS[question]
    if declared == "neither" and question not in ("trace", "diagonal", "frobenius"):
        with pytest.raises(TypeError, match="symmetric=True"):
            ask(make())
        return
    torch.testing.assert_close(ask(make()), truth(M), rtol=1e-8, atol=1e-8)


def test_named_vectors_are_solved_for_by_name() -> None:
    b = _random(N, seed=4)
    x = positive().solve(LAYOUT.split(b), damping=1.0, rtol=1e-12).x
    assert isinstance(x, dict)
    torch.testing.assert_close(LAYOUT.flatten(x), torch.linalg.solve(P + EYE, b), **ALGEBRA)


def test_no_columns_are_no_product() -> None:
    A = Counted(S)
    for operator in (A, A + A, A.T, 2 * A):
        assert (operator @ torch.zeros(N, 0)).shape == (N, 0)
    assert A.calls == 0


def test_scipys_operators_are_solved_here() -> None:
    laplace = scipy.sparse.diags_array([[-1.0] * 99, [2.0] * 100, [-1.0] * 99], offsets=[-1, 0, 1])
    A = LinearOperator.from_scipy(laplace, psd=True)
    assert (A.symmetric, A.psd, A.dtype) == (True, True, torch.float64)
    top = 2 - 2 * math.cos(100 * math.pi / 101)
    assert float(A.eigsh(1, rtol=1e-6).values) == pytest.approx(top, rel=1e-6)
    assert A.solve(_random(100, seed=4), damping=0.1).converged
    assert LinearOperator.from_scipy(np.eye(3, dtype=np.float32)).dtype == torch.float32
    assert LinearOperator.from_scipy(np.eye(3, dtype=np.int64)).dtype == torch.float64
    one_way = scipy.sparse.linalg.LinearOperator((3, 3), matvec=lambda v: 2 * v, dtype=np.float64)
    torch.testing.assert_close(LinearOperator.from_scipy(one_way).dense(), 2 * torch.eye(3, dtype=torch.float64))


def test_a_product_in_another_dtype_is_brought_back() -> None:
    A = LinearOperator(lambda v: v.double(), 3, dtype=torch.float32)
    assert (A @ torch.ones(3)).dtype == torch.float32
