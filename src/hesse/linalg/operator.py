"""A square matrix as an action: what solvers and estimates need to know of B, and no more.

A Hessian of a million parameters is never written down; what is at hand is ``v -> B v`` for a block of columns, whether
B is symmetric, and whether it is positive semidefinite. Solvers ask these declared properties instead of guessing.
Rows may have names: with a :class:`hesse.tree.Layout` the operator acts on ``dict[str, Tensor]`` as it does on flat
vectors, and a block is picked by a pattern of names. Special cases: a dense matrix, an identity, a
``scipy.sparse.linalg.LinearOperator``, and every curvature of :mod:`hesse.curvature`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from hesse.linalg import eigen, estimate, krylov, quadrature
from hesse.tree import Layout, Params

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

__all__ = ["LinearOperator"]

Apply = Callable[[Tensor], Tensor]


class LinearOperator:
    """A real square operator ``v -> B v``.

    Args:
        apply: takes columns [n, k], gives columns [n, k].
        layout: the names and shapes of the rows, or their number n.
        dtype, device: of the columns. Vectors are brought there before a product, and results stay there.
        symmetric: whether B = B' holds.
        psd: whether B is symmetric and has no negative eigenvalue.
        transpose: ``v -> B' v``, for an operator that is not symmetric.

    Raises:
        TypeError: the dtype is not a real floating one.
        ValueError: there are no rows.

    Example:
        >>> A = LinearOperator.of(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), psd=True)
        >>> (2 * A - A) @ torch.tensor([1.0, 0.0])
        tensor([2., 1.])
        >>> A.eigsh(1).values
        tensor([3.])
    """

    # NumPy and SciPy arrays on the left leave the product to us instead of looping over our rows.
    __array_ufunc__ = None

    def __init__(
        self,
        apply: Apply,
        layout: Layout | int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        symmetric: bool = False,
        psd: bool = False,
        transpose: Apply | None = None,
    ) -> None:
        if not dtype.is_floating_point:
            raise TypeError(f"an operator is real and floating; got dtype {dtype}.")
        self.layout = layout if isinstance(layout, Layout) else None
        n = layout.size if isinstance(layout, Layout) else layout
        if n < 1:
            raise ValueError(f"an operator needs at least one row; got {n}. Is there a parameter that is trained?")
        self.shape = (n, n)
        self.dtype = dtype
        self.device = torch.device(device)
        self.symmetric = symmetric or psd
        self.psd = psd
        self._function = apply
        self._transpose = apply if self.symmetric else transpose

    @classmethod
    def of(
        cls, matrix: Tensor, *, symmetric: bool | None = None, psd: bool = False, layout: Layout | None = None
    ) -> LinearOperator:
        """The operator of a dense matrix [n, n].

        Args:
            matrix: kept, not copied.
            symmetric, psd: what it is. By default it is symmetric if it equals its transpose to the last digit.
            layout: names of the rows.

        Raises:
            ValueError: it is not square, or has another number of rows than the layout.
        """
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a square matrix is needed; got shape {list(matrix.shape)}.")
        if layout is not None and layout.size != len(matrix):
            raise ValueError(f"the layout names {layout.size} rows, and the matrix has {len(matrix)}.")
        matrix = matrix.detach()
        return LinearOperator(
            lambda v: matrix @ v,
            layout or len(matrix),
            dtype=matrix.dtype,
            device=matrix.device,
            symmetric=torch.equal(matrix, matrix.mT) if symmetric is None else symmetric,
            psd=psd,
            transpose=lambda v: matrix.mT @ v,
        )

    @classmethod
    def identity(cls, like: LinearOperator) -> LinearOperator:
        """The identity with the rows, dtype and device of ``like``."""
        return LinearOperator(
            lambda v: v.clone(), like.layout or like.shape[0], dtype=like.dtype, device=like.device, psd=True
        )

    def __repr__(self) -> str:
        known = "psd" if self.psd else "symmetric" if self.symmetric else "not symmetric"
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[0]}, {self.dtype}, {self.device}, {known})"

    # -- products ------------------------------------------------------------------------------------------------

    def _apply(self, columns: Tensor) -> Tensor:
        """``B @ columns`` for [n, k] of this dtype, on this device. Subclasses override this one."""
        return self._function(columns)

    @overload
    def __matmul__(self, x: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, x: LinearOperator) -> LinearOperator: ...
    @overload
    def __matmul__(self, x: Mapping[str, Tensor]) -> Params: ...
    def __matmul__(self, x: Tensor | LinearOperator | Mapping[str, Tensor]) -> Tensor | LinearOperator | Params:
        """``B x`` for a vector [n], columns [n, k] or named tensors; with another operator, the composed one."""
        if isinstance(x, LinearOperator):
            return self._composed(x)
        if isinstance(x, Mapping):
            if self.layout is None:
                raise TypeError("this operator's rows have no names: give a flat vector, not a dict.")
            return self.layout.split(self @ self.layout.flatten(x))
        return self._product(self._apply, x)

    def _product(self, apply: Apply, x: Tensor) -> Tensor:
        """``apply`` on a vector or columns given from outside: checked, brought here, and no graph kept."""
        if not isinstance(x, Tensor):
            raise TypeError(
                f"an operator acts on a tensor, a dict of named tensors or an operator; got {type(x).__name__}."
            )
        if not x.is_floating_point():
            raise TypeError(
                f"an operator acts on real floating vectors; got {x.dtype}. Cast it, for instance by .float()."
            )
        n = self.shape[0]
        if x.ndim not in (1, 2) or x.shape[0] != n:
            raise ValueError(
                f"this operator has {n} rows and takes vectors [{n}] or columns [{n}, k]; got shape {list(x.shape)}."
            )
        columns = x.detach().to(self.device, self.dtype)
        columns = columns[:, None] if x.ndim == 1 else columns
        if not columns.shape[1]:
            return columns.clone()
        result = apply(columns).detach()
        if result.shape != columns.shape:
            raise ValueError(
                f"the product of this operator with columns {list(columns.shape)} has shape {list(result.shape)}: "
                "the function it was made of must give columns of the shape it takes."
            )
        result = result.to(self.device, self.dtype)
        return result[:, 0] if x.ndim == 1 else result

    def _applied(self, columns: Tensor) -> Tensor:
        """``B @ columns`` in this dtype, from columns of any: what sums and products of operators are made of."""
        return self._apply(columns.to(self.dtype))

    def _applied_transposed(self, columns: Tensor) -> Tensor:
        """``B' @ columns``, where its action is known."""
        if self.symmetric or self._transpose is None:
            return self._applied(columns)
        return self._transpose(columns.to(self.dtype))

    @property
    def _transposable(self) -> bool:
        return self.symmetric or self._transpose is not None

    @property
    def T(self) -> LinearOperator:
        """The transposed operator; the operator itself when it is symmetric.

        Raises:
            TypeError: its action is not known.
        """
        if self.symmetric:
            return self
        if self._transpose is None:
            raise TypeError("the action of this operator's transpose is not known: give transpose= when making it.")
        return self._like(self._transpose, transpose=self._apply)

    # -- algebra -------------------------------------------------------------------------------------------------

    def __add__(self, other: LinearOperator) -> LinearOperator:
        self._same_rows(other)
        return self._like(
            lambda v: self._applied(v) + other._applied(v),
            transpose=self._both(other, lambda v: self._applied_transposed(v) + other._applied_transposed(v)),
            layout=self.layout or other.layout,
            dtype=torch.promote_types(self.dtype, other.dtype),
            symmetric=self.symmetric and other.symmetric,
            psd=self.psd and other.psd,
        )

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        self._same_rows(other)
        return self + (-other)

    def __neg__(self) -> LinearOperator:
        return -1.0 * self

    def __mul__(self, factor: float) -> LinearOperator:
        c = _number(factor)
        return self._like(
            lambda v: c * self._apply(v),
            transpose=(lambda v: c * self._applied_transposed(v)) if self._transposable else None,
            symmetric=self.symmetric,
            psd=self.psd and c >= 0,
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LinearOperator:
        return self * (1.0 / _number(divisor))

    def _composed(self, other: LinearOperator) -> LinearOperator:
        self._same_rows(other)
        return self._like(
            lambda v: self._applied(other._applied(v)),
            transpose=self._both(other, lambda v: other._applied_transposed(self._applied_transposed(v))),
            layout=self.layout or other.layout,
            dtype=torch.promote_types(self.dtype, other.dtype),
            psd=self is other and self.symmetric,
        )

    def _both(self, other: LinearOperator, transpose: Apply) -> Apply | None:
        """The transpose, if that of both operators is known."""
        return transpose if self._transposable and other._transposable else None

    def _like(self, apply: Apply, **options: Any) -> LinearOperator:
        layout = options.pop("layout", self.layout) or self.shape[0]
        return LinearOperator(apply, layout, **{"dtype": self.dtype, "device": self.device, **options})

    def _same_rows(self, other: LinearOperator) -> None:
        if not isinstance(other, LinearOperator):
            raise TypeError(
                f"an operator is combined with operators; got {type(other).__name__}. A number is added as that many "
                "identities: A + c * LinearOperator.identity(A)."
            )
        if self.shape != other.shape:
            raise ValueError(f"the operators have {self.shape[0]} and {other.shape[0]} rows.")
        if self.device != other.device:
            raise ValueError(f"the operators are on different devices, {self.device} and {other.device}.")
        # Their order counts: it says which row is which.
        if self.layout and other.layout and list(self.layout.shapes.items()) != list(other.layout.shapes.items()):
            raise ValueError("the operators' rows have other names, shapes or another order: they do not go together.")

    # -- parts ---------------------------------------------------------------------------------------------------

    def block(self, pattern: str | Sequence[str]) -> LinearOperator:
        """The diagonal block of the parameters whose names match, for instance ``"encoder.*"``.

        Raises:
            TypeError: the rows have no names.
            ValueError: nothing matches; the message lists the names.
        """
        layout = self._named_rows()
        names = layout.match(pattern)
        rows = torch.cat([torch.arange(s.start, s.stop) for s in (layout.slices[name] for name in names)])
        rows = rows.to(self.device)

        def inside(apply: Apply) -> Apply:
            def restricted(v: Tensor) -> Tensor:
                whole = v.new_zeros(self.shape[0], v.shape[1])
                whole[rows] = v
                return apply(whole)[rows]

            return restricted

        return self._like(
            inside(self._apply),
            transpose=inside(self._applied_transposed) if self._transposable else None,
            layout=layout.restrict(names),
            symmetric=self.symmetric,
            psd=self.psd,
        )

    def _named_rows(self) -> Layout:
        if self.layout is None:
            raise TypeError("this operator's rows have no names, so a block cannot be picked by name.")
        return self.layout

    def dense(self, chunk: int = 64) -> Tensor:
        """The matrix [n, n], from n products, ``chunk`` columns at a time."""
        n = self.shape[0]
        matrix = torch.empty(n, n, dtype=self.dtype, device=self.device)
        for begin in range(0, n, chunk):
            k = min(chunk, n - begin)
            columns = torch.zeros(n, k, dtype=self.dtype, device=self.device)
            columns[begin : begin + k].fill_diagonal_(1)
            matrix[:, begin : begin + k] = self @ columns
        return matrix

    # -- what is asked of it: each is one function of hesse.linalg -------------------------------------------------

    def diagonal(self, **options: Any) -> estimate.Estimate:
        """The diagonal [n] with its standard error: :func:`hesse.linalg.diagonal`."""
        return estimate.diagonal(self, **options)

    def trace(self, **options: Any) -> estimate.Estimate:
        """The sum of the eigenvalues with its standard error: :func:`hesse.linalg.trace`."""
        return estimate.trace(self, **options)

    def frobenius(self, **options: Any) -> estimate.Estimate:
        """The Frobenius norm with its standard error: :func:`hesse.linalg.frobenius`."""
        return estimate.frobenius(self, **options)

    def logdet(self, damping: float, **options: Any) -> estimate.Estimate:
        """``log det (B + damping I)`` with its standard error: :func:`hesse.linalg.logdet`."""
        return quadrature.logdet(self, damping, **options)

    def spectral_density(self, **options: Any) -> quadrature.Density:
        """How the eigenvalues are spread: :func:`hesse.linalg.spectral_density`."""
        return quadrature.spectral_density(self, **options)

    def eigsh(self, k: int = 6, **options: Any) -> eigen.Eigenpairs:
        """The k outermost eigenpairs with error bounds: :func:`hesse.linalg.eigsh`."""
        return eigen.eigsh(self, k, **options)

    def solve(self, b: Tensor | Mapping[str, Tensor], **options: Any) -> krylov.Solution:
        """``(B + damping I) x = b``; x comes as b came: :func:`hesse.linalg.solve`."""
        if isinstance(b, Mapping):
            return krylov.solve(self, self._named_rows().flatten(b), **options).named(self._named_rows())
        return krylov.solve(self, b, **options)

    # -- SciPy ---------------------------------------------------------------------------------------------------

    def to_scipy(self) -> ScipyOperator:
        """The same as a ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays.

        Raises:
            ModuleNotFoundError: SciPy is not installed.
        """
        import numpy as np
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def on_arrays(apply: Apply) -> Callable[[Any], Any]:
            def product(v: Any) -> Any:
                columns = torch.from_numpy(np.array(v, dtype=dtype))  # a copy: SciPy's may not be writable
                return self._product(apply, columns).cpu().to(working).numpy()

            return product

        # NumPy has no bfloat16.
        working = torch.promote_types(self.dtype, torch.float32)
        dtype = torch.empty(0, dtype=working).numpy().dtype
        forward = on_arrays(self._apply)
        backward = on_arrays(self._applied_transposed) if self._transposable else None
        return ScipyOperator(
            self.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=dtype
        )

    @classmethod
    def from_scipy(cls, operator: Any, *, symmetric: bool = False, psd: bool = False) -> LinearOperator:
        """An operator of SciPy's (or a sparse matrix or array, which ``aslinearoperator`` takes) on CPU tensors.

        Raises:
            ValueError: it is not square.
            TypeError: it is complex.
        """
        import numpy as np
        from scipy.sparse.linalg import aslinearoperator

        scipy_operator = aslinearoperator(operator)
        rows, columns = scipy_operator.shape
        if rows != columns:
            raise ValueError(f"a square operator is needed; got shape {[rows, columns]}.")

        if np.issubdtype(scipy_operator.dtype, np.complexfloating):
            raise TypeError(f"an operator here is real; this one's dtype is {scipy_operator.dtype}.")
        dtype = torch.float32 if scipy_operator.dtype == np.float32 else torch.float64

        def on_tensors(product: Callable[[Any], Any]) -> Apply:
            return lambda v: torch.from_numpy(np.array(product(v.numpy()))).to(v.dtype)  # a copy: it may be v itself

        return LinearOperator(
            on_tensors(scipy_operator.matmat),
            rows,
            dtype=dtype,
            symmetric=symmetric,
            psd=psd,
            transpose=on_tensors(scipy_operator.rmatmat),
        )


def _number(factor: Any) -> float:
    factor = factor.item() if isinstance(factor, Tensor) and factor.numel() == 1 else factor
    if not isinstance(factor, Real):
        raise TypeError(
            f"an operator is multiplied and divided by real numbers; got {type(factor).__name__}. "
            "For its product with a vector or an operator write A @ x."
        )
    return float(factor)
