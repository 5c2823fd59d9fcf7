"""The Hessian of a plain function as a matrix, and its products, from one kept graph of the gradient.

The gradient of ``fun`` at a flat x [n], formed with ``create_graph=True``, is itself a function of x; a backward pass
through it with weights v gives ``H v``. Many v at once are one backward pass under ``vmap``; the rows of the identity
give H itself. One v is Pearlmutter's product, all n the dense Hessian, and a few chosen ones the compressed Hessian of
:mod:`hesse.curvature.compressed`.

Where x enters by one constant matrix, ``fun(x) = f(A x)``, and f takes the elements of ``A x`` one by one (logistic and
other generalised linear models), two passes give the diagonal D of the Hessian of f, and ``A' D A`` is one product of
matrices: the same numbers in a quarter of the operations, and as long as the cache of a core is full of them.
"""

from __future__ import annotations

import warnings
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from hesse.curvature.culprit import DerivativeError, operation

__all__ = ["dense_hessian", "product", "products"]

# What a block of rows may hold, in its widest tensor. On a CPU the time of a row is least where that is about as large
# as the cache of a core (a tanh network of 1000 parameters, milliseconds for all rows: 235 at 0.6 MB, 179 at 1.2 MB,
# 162 at 1.8 to 2.4 MB, 222 at 7 MB); elsewhere only memory limits it.
CACHE = 2_000_000
MEMORY = 1 << 28
# Nodes that leave the elements of a vector in their order.
SAME_ORDER = ("AccumulateGrad", "AliasBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0", "ViewBackward0")
FEWEST = 8  # rows that pay for going through the graph, if memory allows


def dense_hessian(gradient: Tensor, x: Tensor, chunk: int | None = None) -> Tensor:
    """The Hessian [n, n], row by row from the graph of the gradient, in blocks of bounded memory.

    It is as symmetric as rounding leaves it, and only tested for that: a Cholesky or an eigenvalue solver reads one
    triangle, and averaging two would cost as much as some hundreds of cheap gradients.

    Args:
        gradient: [n], of a scalar function at ``x``, formed with ``create_graph=True``. Without a graph (a linear
            function) the Hessian is zero, and so are rows and columns of elements on which it does not depend.
        x: [n], the tensor that requires gradients.
        chunk: rows formed at once; by default as many as suit the cache and the memory.

    Raises:
        DerivativeError: torch has no second derivative of an operation, or a wrong one: the matrix is not symmetric.
        ValueError: shapes that do not fit.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 1994.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> (gradient,) = torch.autograd.grad(x.prod(), x, create_graph=True)
        >>> dense_hessian(gradient, x)
        tensor([[0., 3., 2.],
                [3., 0., 1.],
                [2., 1., 0.]])
    """
    _check(gradient, x)
    n = x.numel()
    if not gradient.requires_grad or n == 0:
        return x.new_zeros(n, n)
    users = _users(gradient)
    hessian = _through_matrix(gradient, x, users)
    if hessian is None:
        size = min(n, chunk or _rows_at_once(gradient, users))
        hessian = x.new_empty(n, n)
        for start in range(0, n, size):
            stop = min(start + size, n)
            seeds = x.new_zeros(stop - start, n)
            seeds.diagonal(start).fill_(1)
            hessian[start:stop] = _rows(gradient, x, seeds)
    _refuse_asymmetry(hessian)
    return hessian


def products(gradient: Tensor, x: Tensor, V: Tensor) -> Tensor:
    """``H V`` [n, k] for columns V [n, k], from the graph of the gradient, in blocks of bounded memory.

    Args:
        gradient, x: as for :func:`dense_hessian`.
        V: columns, in the dtype of x.

    Raises:
        DerivativeError: torch has no second derivative of an operation.
        ValueError: shapes that do not fit.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> (gradient,) = torch.autograd.grad(x[0] ** 3 + x[1] ** 2, x, create_graph=True)
        >>> products(gradient, x, torch.ones(2, 1))
        tensor([[6.],
                [2.]])
    """
    _check(gradient, x)
    if V.ndim != 2 or V.shape[0] != x.numel():
        raise ValueError(f"V must have shape [n, k] with n = {x.numel()}, as x has; got {list(V.shape)}.")
    if not gradient.requires_grad or V.numel() == 0:
        return torch.zeros_like(V)
    size = _rows_at_once(gradient, _users(gradient)) if V.shape[1] > FEWEST else FEWEST
    return torch.cat([_rows(gradient, x, rows) for rows in V.mT.split(size)]).mT


def product(gradient: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """``H v`` [n]: one backward pass through the graph of the gradient.

    Raises:
        DerivativeError: torch has no second derivative of an operation.
        ValueError: shapes that do not fit.
    """
    _check(gradient, x)
    if v.shape != x.shape:
        raise ValueError(f"v must have the shape of x, {list(x.shape)}; got {list(v.shape)}.")
    return _row(gradient, x, v) if gradient.requires_grad else torch.zeros_like(v)


def _check(gradient: Tensor, x: Tensor) -> None:
    if x.ndim != 1 or gradient.shape != x.shape:
        raise ValueError(
            f"x and its gradient must be vectors of one length; got {list(x.shape)} and {list(gradient.shape)}. "
            "Flatten them first."
        )


def _rows(gradient: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """``weights H`` [k, n] for weights [k, n]."""
    if len(weights) > 1:
        # torch.vmap, not is_grads_batched: that still runs under torch's first vmap, which knows few operations and
        # goes through the rows one by one at tanh_backward, softplus and products with constant matrices.
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # it goes row by row itself
                return torch.vmap(lambda v: _row(gradient, x, v))(weights)
        except (RuntimeError, ValueError):
            # A sparse matrix, a custom Function, numbers taken out of a tensor: vmap has no one error for what it
            # cannot do. One row at a time may go; what is wrong otherwise is raised again there.
            pass
    return torch.stack([_row(gradient, x, v) for v in weights])


def _row(gradient: Tensor | GradientEdge, x: Tensor | GradientEdge, v: Tensor) -> Tensor:
    try:
        (row,) = torch.autograd.grad(gradient, x, v, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise DerivativeError(
            f"torch has no second derivative of {operation(error)}; write the function with other operations, or use a "
            "method that needs gradients only (method='bfgs', 'l-bfgs-b')."
        ) from error
    return torch.zeros_like(v) if row is None else row


def _users(gradient: Tensor) -> dict[Node, list[Node]]:
    """The nodes of the graph behind the gradient, each with those that take what it made.

    Raises:
        DerivativeError: it ends in a function that has no second derivative.
    """
    assert gradient.grad_fn is not None
    users: dict[Node, list[Node]] = {gradient.grad_fn: []}
    stack = [gradient.grad_fn]
    while stack:
        node = stack.pop()
        if type(node).__name__ == "Error":  # it raises when it is run, but a backward pass to x does not reach it
            raise DerivativeError(
                "a custom autograd.Function in the function is marked once_differentiable, so that it has no second "
                "derivative. Remove the mark if its backward is made of differentiable operations, or use a method "
                "that needs gradients only (method='bfgs', 'l-bfgs-b')."
            )
        for parent, _ in node.next_functions:
            if parent is None:
                continue
            if parent not in users:
                users[parent] = []
                stack.append(parent)
            users[parent].append(node)
    return users


def _rows_at_once(gradient: Tensor, users: dict[Node, list[Node]]) -> int:
    """How many rows may be formed at once, by the widest tensor between x and its gradient."""
    widest = gradient.numel()
    for node in users:
        widest = max([widest, *(prod(part.shape) for part in node._input_metadata)])
    row = widest * gradient.element_size()
    if gradient.device.type == "cpu":
        return max(CACHE // row, min(FEWEST, MEMORY // row), 1)
    return max(MEMORY // row, 1)


def _through_matrix(gradient: Tensor, x: Tensor, users: dict[Node, list[Node]]) -> Tensor | None:
    """``A' D A`` [n, n] of a function ``f(A x)`` that takes the elements of ``A x`` one by one, None of any other.

    The last step of its gradient is a product with A', and the first that x goes through the product with A; what lies
    between is the gradient of f. Its Hessian is diagonal where two vectors say so, one of them of random numbers.
    """
    first, last = _entrance(x, users), gradient.grad_fn
    while last is not None and type(last).__name__ in SAME_ORDER:
        last = last.next_functions[0][0]
    if first is None or last is None or last is first or not _by_matrix(last):
        return None
    behind, place = last.next_functions[1]
    left, right = last._saved_self, first._saved_self  # type: ignore[attr-defined]
    if behind is None or left.shape != right.mT.shape:
        return None
    m, n, eps = len(right), x.numel(), torch.finfo(x.dtype).eps
    probe = torch.rand(m, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x) + 0.5
    inner, z = GradientEdge(behind, place), GradientEdge(first, 0)
    D, probed = (_row(inner, z, v) for v in (torch.ones_like(probe), probe))
    if bool(((probed - D * probe).abs() > eps**0.75 * D.abs() + eps * D.abs().amax()).any()):
        return None
    hessian = x.new_zeros(n, n)
    size = max(CACHE // (n * x.element_size()), n)
    for columns, d, rows in zip(left.split(size, 1), D.split(size), right.split(size), strict=True):
        hessian.addmm_(columns * d, rows)
    return hessian


def _entrance(x: Tensor, users: dict[Node, list[Node]]) -> Node | None:
    """The product with a constant matrix by which alone x enters, or None."""
    nodes = [node for node in users if getattr(node, "variable", None) is x]
    while len(nodes) == 1:
        if _by_matrix(nodes[0]):
            return nodes[0]
        if type(nodes[0]).__name__ not in SAME_ORDER:
            return None
        nodes = users[nodes[0]]
    return None


def _by_matrix(node: Node) -> bool:
    """Whether the node is the product of a constant dense matrix with a vector."""
    return (
        type(node).__name__ == "MvBackward0"
        and node.next_functions[0][0] is None
        and node._saved_self.layout == torch.strided  # type: ignore[attr-defined]
    )


def _refuse_asymmetry(hessian: Tensor) -> None:
    """Raise where ``H v`` and ``H' v`` differ by more than rounding, for one v of fixed random signs.

    torch has second derivatives that are wrong without a word (that of ``weight_norm`` on a CPU), and so may a custom
    ``autograd.Function``; they seldom keep the symmetry.
    """
    generator = torch.Generator().manual_seed(0)
    v = (torch.randint(2, (len(hessian),), generator=generator) * 2 - 1).to(hessian)
    rows, columns = hessian @ v, hessian.mT @ v
    error, scale = float((rows - columns).abs().max()), float(torch.maximum(rows.abs().max(), columns.abs().max()))
    # Not finite is the caller's to judge: the function may have no second derivative at this point.
    if error > torch.finfo(hessian.dtype).eps ** 0.4 * scale and error < float("inf"):
        raise DerivativeError(
            f"the Hessian is not symmetric: H v and H' v differ by {error:.3g}, where they are {scale:.3g} large. An "
            "operation in the function has a wrong second derivative (a custom autograd.Function that saves "
            "intermediate values, or weight_norm on a CPU); write it with other operations, or use a method that "
            "needs gradients only (method='bfgs', 'l-bfgs-b')."
        )
