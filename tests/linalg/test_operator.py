"""Every way to make an operator against the dense matrix it stands for, and what an operator is asked."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from hesse.linalg import LinearOperator, solve
from hesse.tree import Layout
from spectra import Counted, symmetric
from tolerances import ROUNDING

DTYPES = [torch.float64, torch.float32]
LAYOUT = Layout({"encoder.weight": torch.Size([3, 2]), "encoder.bias": torch.Size([]), "head.weight": torch.Size([5])})
N = LAYOUT.size


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SYMMETRIC = symmetric(torch.linspace(0.5, 4, N))
SKEW = draw(N, N)


class Own(LinearOperator):
    """A subclass as curvature operators are: its action is a method."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        super().__init__(self._apply, LAYOUT, dtype=matrix.dtype, symmetric=torch.equal(matrix, matrix.mT))

    def _apply(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns


def function(m: Tensor) -> LinearOperator:
    known = torch.equal(m, m.mT)
    return LinearOperator(lambda v: m @ v, N, dtype=m.dtype, symmetric=known, transpose=lambda v: m.mT @ v)


def of(m: Tensor) -> LinearOperator:
    return LinearOperator.of(m, layout=LAYOUT)


def larger(m: Tensor) -> LinearOperator:
    """The block of an operator that has other parameters before, between and after."""
    shapes = {"a": torch.Size([2]), **dict(list(LAYOUT.shapes.items())[:2]), "b": torch.Size([1, 1])}
    layout = Layout({**shapes, **LAYOUT.shapes, "c": torch.Size([2])})
    whole = draw(layout.size, layout.size, seed=2, dtype=m.dtype)
    whole = whole + whole.mT if torch.equal(m, m.mT) else whole
    rows = torch.cat([torch.arange(s.start, s.stop) for name, s in layout.slices.items() if name in LAYOUT.shapes])
    whole[rows[:, None], rows] = m
    return LinearOperator.of(whole, layout=layout).block(["encoder.*", "head.*"])


# Ways to make the same operator from its matrix.
WAYS: dict[str, Callable[[Tensor], LinearOperator]] = {
    "dense": of,
    "function": function,
    "subclass": Own,
    "sum": lambda m: of(0.25 * m) + function(0.75 * m),
    "sum of precisions": lambda m: of((0.25 * m).double()) + of((0.75 * m).float()),
    "difference": lambda m: of(3 * m) - Own(2 * m),
    "scaled": lambda m: 4 * of(m) / 2 * 0.5,
    "negated twice": lambda m: -(-of(m)),
    "by a NumPy number": lambda m: np.float64(2) * of(0.5 * m) * np.float32(1) / np.int64(1),
    "by a tensor": lambda m: of(0.5 * m) * torch.tensor(2.0),
    "composed": lambda m: of(2 * m) @ (0.5 * LinearOperator.identity(of(m))),
    "composed with a permutation": lambda m: of(m.flip(1)) @ of(torch.eye(N, dtype=m.dtype).flip(0)),
    "transposed twice": lambda m: of(m).T.T,
    "block": larger,
    "block of a sum": lambda m: larger(0.5 * m) + larger(0.5 * m),
    "there and back": lambda m: LinearOperator.from_scipy(of(m).to_scipy(), symmetric=torch.equal(m, m.mT)),
    "NumPy": lambda m: LinearOperator.from_scipy(m.numpy(), symmetric=torch.equal(m, m.mT)),
    "sparse": lambda m: LinearOperator.from_scipy(scipy.sparse.csr_array(m.numpy()), symmetric=torch.equal(m, m.mT)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matrix", [SYMMETRIC, SKEW], ids=["symmetric", "not symmetric"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_matrix(way: str, matrix: Tensor, dtype: torch.dtype) -> None:
    m = matrix.to(dtype)
    if way == "subclass" and matrix is SKEW:
        pytest.skip("its transpose is not known: see the test of that")
    A = WAYS[way](m)
    near = ROUNDING[dtype]
    v, block = draw(N, dtype=A.dtype), draw(N, 3, seed=4, dtype=A.dtype)
    m = m.to(A.dtype)
    assert A.shape == (N, N)
    torch.testing.assert_close(A @ v, m @ v, **near)
    torch.testing.assert_close(A @ block, m @ block, **near)
    torch.testing.assert_close(A.dense(), m, **near)
    torch.testing.assert_close(A.dense(chunk=5), m, **near)
    if way != "difference" or matrix is SYMMETRIC:
        torch.testing.assert_close(A.T @ block, m.T @ block, **near)
        torch.testing.assert_close(A.T.dense(), m.T, **near)
    torch.testing.assert_close(A.to_scipy() @ block.numpy(), (m @ block).numpy(), **near)
    if A.symmetric:
        assert A.T is A
    if A.layout is not None:
        assert A.layout == LAYOUT
        named = A @ A.layout.split(v)
        assert {name: x.shape for name, x in named.items()} == LAYOUT.shapes
        torch.testing.assert_close(A.layout.flatten(named), m @ v, **near)
        torch.testing.assert_close(A.layout.flatten(A @ A.layout.split(block)), m @ block, **near)


# Each answer of an operator, and the same from its dense matrix.
ASKED: dict[str, tuple[Callable[[LinearOperator], Tensor], Callable[[Tensor], Tensor]]] = {
    "trace": (lambda A: A.trace().value, torch.trace),
    "diagonal": (lambda A: A.diagonal().value, torch.diagonal),
    "frobenius": (lambda A: A.frobenius().value, torch.linalg.matrix_norm),
    "eigsh": (lambda A: A.eigsh(4, which="SA").values, lambda m: torch.linalg.eigvalsh(m)[:4]),
    "logdet": (
        lambda A: A.logdet(0.5).value,
        lambda m: torch.logdet(m + 0.5 * torch.eye(N, dtype=m.dtype)),
    ),
    "spectral_density": (lambda A: A.spectral_density().nodes[0], torch.linalg.eigvalsh),
    "solve": (
        lambda A: A.solve(draw(N), damping=0.5, rtol=1e-5).x,
        lambda m: torch.linalg.solve(m + 0.5 * torch.eye(N, dtype=m.dtype), draw(N)),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("question", ASKED)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_answers_every_question(way: str, question: str, dtype: torch.dtype) -> None:
    ask, truth = ASKED[question]
    found = ask(WAYS[way](SYMMETRIC.to(dtype)))
    torch.testing.assert_close(found.double(), truth(SYMMETRIC), rtol=2e-5, atol=2e-5)  # rtol of the solve, and float32


def test_what_is_known_is_carried_on() -> None:
    psd = LinearOperator.of(SYMMETRIC, psd=True)
    even = LinearOperator.of(SYMMETRIC)
    skew = LinearOperator.of(SKEW)
    known = {
        "psd": [psd, psd + psd, 2 * psd, psd / 3, 0 * psd, psd @ psd, even @ even, LinearOperator.identity(skew)],
        "symmetric": [even, psd + even, psd - psd, -psd, -1 * even, LinearOperator.of(SYMMETRIC).T],
        "not symmetric": [skew, skew + psd, psd @ even, even @ psd, skew @ skew, 2 * skew, skew.T, -skew],
    }
    for what, operators in known.items():
        for A in operators:
            assert (A.symmetric, A.psd) == (what != "not symmetric", what == "psd")
            assert repr(A).endswith(f"{what})")
    assert repr(psd) == "LinearOperator(12 x 12, torch.float64, cpu, psd)"
    assert LinearOperator.of(SYMMETRIC + 1e-9 * SKEW, symmetric=True).symmetric
    assert larger(SYMMETRIC).symmetric
    assert not larger(SKEW).symmetric


def test_an_unknown_transpose_is_refused_and_not_guessed() -> None:
    A = LinearOperator(lambda v: SKEW @ v, N, dtype=torch.float64)
    B = LinearOperator.of(SKEW)
    for unknown in (A, A + B, B + A, A @ B, B @ A, 2 * A, Own(SKEW), Own(SKEW).block("head.*")):
        torch.testing.assert_close(unknown.to_scipy() @ np.ones(unknown.shape[0]), unknown.dense().sum(1).numpy())
        with pytest.raises(TypeError, match="transpose is not known"):
            unknown.T  # noqa: B018
        with pytest.raises(NotImplementedError):
            unknown.to_scipy().rmatvec(np.ones(unknown.shape[0]))


def test_a_block_has_the_names_of_its_rows() -> None:
    A = of(SKEW)
    for pattern, names in (
        ("encoder.*", ["encoder.weight", "encoder.bias"]),
        ("*.weight", ["encoder.weight", "head.weight"]),
    ):
        B = A.block(pattern)
        rows = torch.cat([torch.arange(N)[LAYOUT.slices[name]] for name in names])
        assert B.layout is not None
        assert list(B.layout.shapes) == names
        torch.testing.assert_close(B.dense(), SKEW[rows][:, rows], rtol=0, atol=0)
        assert list(B @ B.layout.split(draw(len(rows)))) == names
    assert A.block("*").layout == LAYOUT
    torch.testing.assert_close(A.block("encoder.*").block("*.bias").dense(), SKEW[6:7, 6:7], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"no parameter is named like 'decoder\.\*'. The names are: encoder.weight, "):
        A.block("decoder.*")
    with pytest.raises(TypeError, match="no names"):
        function(SKEW).block("*")


def test_vectors_of_another_dtype_are_brought_to_the_operators() -> None:
    A = LinearOperator.of(SYMMETRIC.float())
    v = draw(N)
    assert (A @ v).dtype == torch.float32
    torch.testing.assert_close(A @ v, SYMMETRIC.float() @ v.float(), rtol=0, atol=0)
    assert (LinearOperator.of(SYMMETRIC) @ v.float()).dtype == torch.float64
    assert (A + LinearOperator.of(SYMMETRIC)).dtype == torch.float64
    assert (A @ LinearOperator.of(SYMMETRIC)).dtype == torch.float64
    assert (A @ v.bfloat16()).dtype == torch.float32


def test_no_graph_comes_out() -> None:
    m = SYMMETRIC.clone().requires_grad_()
    for A in (LinearOperator.of(m), LinearOperator(lambda v: m @ v, N, dtype=m.dtype), 2 * LinearOperator.of(m)):
        v = draw(N).requires_grad_()
        assert not (A @ v).requires_grad
        assert not A.dense().requires_grad
        torch.testing.assert_close(A @ v, (SYMMETRIC @ v).detach() * (A.dense()[0, 0] / SYMMETRIC[0, 0]))
    assert not any(x.requires_grad for x in (of(m) @ LAYOUT.split(draw(N).requires_grad_())).values())


def test_no_columns_are_no_product() -> None:
    A = Counted(SYMMETRIC)
    for operator in (A, A + A, A.T, 2 * A):
        assert (operator @ torch.zeros(N, 0)).shape == (N, 0)
    assert A.calls == 0


def test_a_product_is_no_view_of_the_vector() -> None:
    for A in (
        LinearOperator.identity(of(SYMMETRIC)),
        LinearOperator.from_scipy(scipy.sparse.linalg.aslinearoperator(np.eye(N))),
    ):
        v = draw(N)
        (A @ v).zero_()
        torch.testing.assert_close(v, draw(N), rtol=0, atol=0)


def test_dense_is_by_blocks_of_columns() -> None:
    A = Counted(SYMMETRIC)
    A.dense(chunk=5)
    assert (A.calls, A.columns) == (3, N)


def test_scipys_own_solvers_take_it() -> None:
    A = LinearOperator.of(SYMMETRIC, psd=True).to_scipy()
    assert A.shape == (N, N)
    assert A.dtype == np.float64
    expected = torch.linalg.eigvalsh(SYMMETRIC)
    values = scipy.sparse.linalg.eigsh(A, 3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), expected[-3:].numpy(), rtol=1e-10)
    b = draw(N).numpy()
    x, failed = scipy.sparse.linalg.cg(A, b, rtol=1e-12)
    assert not failed
    np.testing.assert_allclose(x, np.linalg.solve(SYMMETRIC.numpy(), b), rtol=1e-8)
    singular = scipy.sparse.linalg.svds(LinearOperator.of(SKEW).to_scipy(), 2, return_singular_vectors=False)
    np.testing.assert_allclose(np.sort(singular), torch.linalg.svdvals(SKEW)[:2].flip(0).numpy(), rtol=1e-8)
    b.flags.writeable = False
    np.testing.assert_allclose(A @ b, SYMMETRIC.numpy() @ b)
    np.testing.assert_allclose(A @ np.arange(N), SYMMETRIC.numpy() @ np.arange(N))
    assert A.matvec(np.ones((N, 1))).shape == (N, 1)


def test_scipys_operators_are_solved_here() -> None:
    laplace = scipy.sparse.diags_array([[-1.0] * 99, [2.0] * 100, [-1.0] * 99], offsets=[-1, 0, 1])
    A = LinearOperator.from_scipy(laplace, psd=True)
    assert (A.symmetric, A.psd, A.dtype) == (True, True, torch.float64)
    top = 2 - 2 * math.cos(100 * math.pi / 101)
    assert float(A.eigsh(1, rtol=1e-6).values) == pytest.approx(top, rel=1e-6)
    assert solve(A, draw(100), damping=0.1).converged
    assert LinearOperator.from_scipy(np.eye(3, dtype=np.float32)).dtype == torch.float32
    assert LinearOperator.from_scipy(np.eye(3, dtype=np.int64)).dtype == torch.float64
    one_way = scipy.sparse.linalg.LinearOperator((3, 3), matvec=lambda v: 2 * v, dtype=np.float64)
    torch.testing.assert_close(LinearOperator.from_scipy(one_way).dense(), 2 * torch.eye(3, dtype=torch.float64))


def test_bfloat16_is_float32_for_scipy() -> None:
    A = LinearOperator.of(torch.eye(3, dtype=torch.bfloat16))
    assert A.to_scipy().dtype == np.float32
    np.testing.assert_array_equal(A.to_scipy() @ np.ones(3), np.ones(3, dtype=np.float32))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(7), ValueError, r"12 rows and takes vectors \[12\] or columns \[12, k\]; got shape \[7\]"),
        (torch.ones(1, N), ValueError, r"got shape \[1, 12\]"),
        (torch.ones(N, 2, 2), ValueError, r"got shape \[12, 2, 2\]"),
        (torch.tensor(1.0), ValueError, r"got shape \[\]"),
        (torch.ones(N, dtype=torch.complex64), TypeError, "real floating vectors; got torch.complex64"),
        (torch.ones(N, dtype=torch.int64), TypeError, r"got torch.int64. Cast it, for instance by \.float\(\)"),
        (torch.ones(N, dtype=torch.bool), TypeError, "got torch.bool"),
        (np.ones(N), TypeError, "got ndarray"),
        ([1.0] * N, TypeError, "got list"),
        (2.0, TypeError, "got float"),
        ({"encoder.weight": torch.ones(3, 2)}, ValueError, r"missing \['encoder.bias', 'head.weight'\]"),
    ],
)
def test_what_is_no_vector(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        of(SYMMETRIC) @ x  # type: ignore[call-overload]


def test_a_dict_needs_names_for_the_rows() -> None:
    with pytest.raises(TypeError, match="no names: give a flat vector"):
        function(SYMMETRIC) @ {"a": torch.ones(N)}
    with pytest.raises(TypeError, match="no names"):
        function(SYMMETRIC).solve({"a": torch.ones(N)})


def test_what_cannot_be_combined() -> None:
    A = of(SYMMETRIC)
    for other in (1.0, SYMMETRIC, None):
        with pytest.raises(TypeError, match=r"got .*A \+ c \* LinearOperator.identity\(A\)"):
            A + other  # type: ignore[operator]
        with pytest.raises(TypeError, match="combined with operators"):
            A - other  # type: ignore[operator]
    for factor in (A, 1j, "2", None, torch.ones(2), torch.tensor(1j)):
        with pytest.raises(TypeError, match=r"real numbers; got .* write A @ x"):
            A * factor  # type: ignore[operator]
        with pytest.raises(TypeError, match="real numbers"):
            A / factor  # type: ignore[operator]
    with pytest.raises(ZeroDivisionError):
        A / 0
    small = LinearOperator.of(torch.eye(3))
    renamed = LinearOperator.of(SYMMETRIC, layout=Layout({"x": torch.Size([N])}))
    turned = LinearOperator.of(SYMMETRIC, layout=Layout(dict(reversed(LAYOUT.shapes.items()))))
    for other in (small, renamed, turned):
        for combine in (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a @ b):
            with pytest.raises(ValueError, match="12 and 3 rows|other names, shapes or another order"):
                combine(A, other)
    assert (A + function(SYMMETRIC)).layout == LAYOUT
    assert (function(SYMMETRIC) + A).layout == LAYOUT


def test_what_is_no_operator() -> None:
    with pytest.raises(ValueError, match=r"square matrix is needed; got shape \[2, 3\]"):
        LinearOperator.of(torch.ones(2, 3))
    with pytest.raises(TypeError, match="real and floating; got dtype torch.int64"):
        LinearOperator.of(torch.eye(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="got dtype torch.complex64"):
        LinearOperator.of(torch.eye(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="the layout names 12 rows, and the matrix has 3"):
        LinearOperator.of(torch.eye(3), layout=LAYOUT)
    with pytest.raises(ValueError, match="at least one row; got 0"):
        LinearOperator(lambda v: v, Layout({}), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"square operator is needed; got shape \[2, 3\]"):
        LinearOperator.from_scipy(np.ones((2, 3)))
    with pytest.raises(TypeError, match="complex128"):
        LinearOperator.from_scipy(np.eye(3) * 1j)
    wrong = LinearOperator(lambda v: v[:, 0], N, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"with columns \[12, 2\] has shape \[12\]"):
        wrong @ torch.ones(N, 2)


def test_a_product_in_another_dtype_is_brought_back() -> None:
    A = LinearOperator(lambda v: v.double(), 3, dtype=torch.float32)
    assert (A @ torch.ones(3)).dtype == torch.float32
