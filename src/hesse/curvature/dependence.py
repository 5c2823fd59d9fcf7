"""Which inputs each element of a tensor depends on, and how every operation of torch passes that on.

Each element carries the number of a set of inputs: 0 for none, ``j + 1`` for ``{j}``, higher numbers for unions. Data
that is only moved (indexing, concatenation, padding) moves its numbers by the same operation; pointwise operations
unite the sets of their arguments, reductions those of a group, products with constant matrices those where the
matrix is not zero. An operation that is not known makes everything depend on everything it was given: too much is
allowed, too little never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from hesse.curvature.index_sets import IndexSets, TooDense

__all__ = ["floating", "pass_on"]

Ids = Callable[[Tensor], Tensor]


def pass_on(
    sets: IndexSets, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, outputs: list[Tensor], ids: Ids
) -> list[Tensor]:
    """The numbers of the elements of ``outputs``.

    Args:
        sets: where the unions go.
        func, args, kwargs, out: an operation of torch that has run.
        outputs: tensors that it has made or written to.
        ids: the numbers of a tensor's elements, in its shape.
    """
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    name = func.overloadpacket.__name__.removesuffix("_").removeprefix("_unsafe_").removeprefix("_")
    if name in _FLAT:
        found = [torch.zeros(o.shape, dtype=torch.int64) for o in outputs]
    elif name in _RULES:
        found = _RULES[name](sets, func, given, outputs, out, ids)
    elif name in _MOVES and not given.get("reduce") and not given.get("accumulate"):
        found = _move(func, args, kwargs, ids)
    elif torch.Tag.pointwise in func.tags or name in _POINTWISE:
        found = _pointwise(sets, func, given, outputs, out, ids)
    else:
        found = []
    if [f.shape for f in found] == [o.shape for o in outputs]:
        return found
    one = _all(sets, [ids(t) for t in floating((args, kwargs))])
    return [torch.full(o.shape, one) for o in outputs]


def floating(tree: Any) -> Iterator[Tensor]:
    """The tensors that can depend on inputs; integers and booleans are constant wherever a derivative is."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            yield leaf


# Constant almost everywhere: the sign of a sum does not make a second derivative.
_FLAT = {"sign", "sgn", "floor", "ceil", "round", "trunc", "heaviside", "zero", "empty_like", "zeros_like", "ones_like"}
_FLAT |= {"new_zeros", "new_ones", "new_empty", "new_empty_strided", "new_full", "full_like", "rand_like", "randn_like"}

_MOVES = {"index", "gather", "index_select", "cat", "stack", "slice_backward", "select_backward", "slice_scatter"}
_MOVES |= {"select_scatter", "diagonal_scatter", "as_strided_scatter", "roll", "flip", "repeat", "tril", "triu", "take"}
_MOVES |= {"clone", "masked_select", "diag_embed", "diagonal_backward", "split", "split_with_sizes", "chunk", "scatter"}
_MOVES |= {"diagonal_copy", "expand_copy", "pixel_shuffle", "pixel_unshuffle", "constant_pad_nd", "index_copy", "put"}

# Pointwise, but not marked so by torch.
_POINTWISE = {
    "to_copy",
    "copy",
    "fill",
    "masked_fill",
    "rsub",
    "conj_physical",
    "native_dropout",
    "prelu",
    "prelu_kernel",
}
_POINTWISE |= {"log_sigmoid_forward", "log_sigmoid_backward", "softplus_backward", "elu_backward", "mish_backward"}
_POINTWISE |= {"hardtanh_backward", "hardswish_backward", "hardsigmoid_backward", "leaky_relu_backward"}
_POINTWISE |= {"hardshrink_backward", "softshrink_backward", "prelu_kernel_backward", "native_dropout_backward"}
_POINTWISE |= {"mse_loss_backward", "smooth_l1_loss_backward", "huber_loss_backward", "binary_cross_entropy_backward"}


def _all(sets: IndexSets, numbers: list[Tensor]) -> int:
    flat = np.unique(np.concatenate([t.reshape(-1).numpy() for t in numbers] or [np.zeros(1, dtype=np.int64)]))
    return int(sets.group(np.zeros(flat.size, dtype=np.int64), flat, 1)[0])


def _both(sets: IndexSets, a: Tensor, b: Tensor) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    return torch.from_numpy(sets.union(a.reshape(-1).numpy(), b.reshape(-1).numpy())).view(a.shape)


def _grouped(sets: IndexSets, places: Tensor, numbers: Tensor, shape: torch.Size) -> Tensor:
    """Unions of ``numbers`` by the place in a tensor of ``shape`` that each goes to."""
    flat = numbers.expand(places.shape).reshape(-1).numpy()
    return torch.from_numpy(sets.group(places.reshape(-1).numpy(), flat, shape.numel())).view(shape)


def _places(like: Tensor) -> Tensor:
    return torch.arange(like.numel()).view(like.shape)


def _move(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ids: Ids) -> list[Tensor]:
    """The same operation on the numbers; what it fills in is constant."""
    filled = {"value"} if func.overloadpacket.__name__.strip("_") in ("constant_pad_nd", "scatter") else set()

    def numbers(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_floating_point() or leaf.is_complex():
            return ids(leaf)
        return leaf.cpu()

    moved_args, moved = pytree.tree_map(numbers, args), pytree.tree_map(numbers, kwargs)
    given = dict(zip((a.name for a in func._schema.arguments), moved_args, strict=False)) | moved
    for name in filled & given.keys():
        given[name] = 0
    given.pop("memory_format", None)
    found = func(**given)
    return [t for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]


def _pointwise(sets: IndexSets, func: Any, given: Any, outputs: list[Tensor], out: Any, ids: Ids) -> list[Tensor]:
    name = func.overloadpacket.__name__
    if name in ("copy_", "fill_"):  # what was there before is gone
        given = {key: value for key, value in given.items() if key != "self"}
    if name == "threshold_backward":  # a step function of the other argument
        given = {"grad_output": given["grad_output"]}
    if name == "pow" and isinstance(given["exponent"], int | float) and given["exponent"] == 0:
        given = {}
    numbers = torch.zeros((), dtype=torch.int64)
    for t in floating(given):
        numbers = _both(sets, numbers, ids(t))
    try:
        return [numbers.expand(o.shape) for o in outputs]
    except RuntimeError:  # an output of another shape
        return []


def _loss(sets: IndexSets, func: Any, given: Any, outputs: list[Tensor], out: Any, ids: Ids) -> list[Tensor]:
    """Pointwise, then reduced to one number, or not."""
    numbers = torch.zeros((), dtype=torch.int64)
    for t in floating(given):
        numbers = _both(sets, numbers, ids(t))
    return [numbers if numbers.shape == o.shape else torch.full(o.shape, _all(sets, [numbers])) for o in outputs]


def _dims(given: Any, ndim: int) -> list[int]:
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(ndim))
    return [d % ndim for d in dims] if ndim else []


def _kept(numbers: Tensor, dims: list[int]) -> torch.Size:
    return torch.Size(1 if d in dims else size for d, size in enumerate(numbers.shape))


def _united(sets: IndexSets, numbers: Tensor, dims: list[int]) -> Tensor:
    """Unions along dimensions, which are kept with size 1."""
    shape = _kept(numbers, dims)
    return _grouped(sets, torch.arange(shape.numel()).view(shape).expand(numbers.shape), numbers, shape)


def _reduce(sets: IndexSets, func: Any, given: Any, outputs: list[Tensor], out: Any, ids: Ids) -> list[Tensor]:
    numbers = ids(given["self"])
    united = _united(sets, numbers, _dims(given, numbers.ndim))
    return [united.reshape(o.shape) for o in outputs if o.numel() == united.numel()]


def _along(sets: IndexSets, func: Any, given: Any, outputs: list[Tensor], out: Any, ids: Ids) -> list[Tensor]:
    """A sum or maximum along a dimension comes back into every element of it."""
    numbers = torch.zeros((), dtype=torch.int64)
    for t in floating(given):
        numbers = _both(sets, numbers, ids(t))
    return [_united(sets, numbers, _dims(given, numbers.ndim)).expand(numbers.shape) for _ in outputs]


def _picked(sets: IndexSets, func: Any, given: Any, outputs: list[Tensor], out: Any, ids: Ids) -> list[Tensor]:
    """Sorted or extreme values, with the indices they had."""
    numbers = ids(given["self"])
    leaves = pytree.tree_leaves(out)
    if "dim" not in given and func.overloadpacket.__name__ in ("max", "min", "median"):
        return _reduce(sets, func, given, outputs, out, ids)
    dim, index = given.get("dim", -1), leaves[1].cpu()
    if numbers.ndim != index.ndim:
        return [numbers.gather(dim, index.unsqueeze(dim)).squeeze(dim)]
    return [numbers.gather(dim, index) if numbers.ndim else numbers]


def _put(sets: IndexSets, func: Any, given: Any, outputs: list[Tensor], out: Any, ids: Ids) -> list[Tensor]:
    """Values added at chosen places."""
    whole = ids(given["self"]) if "self" in given else torch.zeros(given["input_sizes"], dtype=torch.int64)
    places = _places(whole)
    if "input_sizes" in given:  # windows, added back to where they were seen
        places, source = places.unfold(given["dim"], given["size"], given["step"]), given["grad_in"]
    elif "indices" in given:
        if not given.get("accumulate", False):
            return _move(func, tuple(given.values()), {}, ids)
        index = tuple(slice(None) if i is None else i.cpu() for i in given["indices"])
        places, source = places[index], given["values"]
    elif "source" in given:
        places, source = places.index_select(given["dim"], given["index"].cpu()), given["source"]
    else:
        source = given["src"]
        places = places.gather(given["dim"], given["index"].cpu())
    added = ids(source)
    if added.ndim == places.ndim and "src" in given:
        added = added[tuple(slice(size) for size in places.shape)]
    moved = _grouped(sets, places, added, whole.shape)
    return [_both(sets, whole, moved)]


def _product(sets: IndexSets, func: Any, given: Any, outputs: list[Tensor], out: Any, ids: Ids) -> list[Tensor]:
    """Rows times columns, for vectors, matrices and batches of them."""
    names = ("batch1", "batch2") if "batch1" in given else ("mat1", "mat2") if "mat1" in given else None
    names = names or (("mat", "vec") if "vec" in given and "mat" in given else None)
    left, right = (given[name] for name in names or [a.name for a in func._schema.arguments[:2]])
    numbers = _multiplied(sets, left, right, ids)
    if names and "self" in given:
        numbers = _both(sets, numbers, ids(given["self"]))
    return [numbers]


def _multiplied(sets: IndexSets, left: Tensor, right: Tensor, ids: Ids) -> Tensor:
    a, b = ids(left), ids(right)
    column = b[:, None] if right.ndim == 1 else b
    row = a[None] if left.ndim == 1 else a
    shape = left.shape[:-1] + (right.shape[-1:] if right.ndim > 1 else ())
    if left.ndim == 2 and not _any(a):
        return _constant(sets, left, column).reshape(shape)
    if right.ndim == 2 and not _any(b):
        return _constant(sets, right.mT, row.mT).mT.reshape(shape)
    return _both(sets, _united(sets, row, [row.ndim - 1]), _united(sets, column, [column.ndim - 2])).reshape(shape)


def _any(ids: Tensor) -> bool:
    """Whether anything depends on x; the numbers of a constant, however large, are one zero expanded."""
    return ids.numel() > 0 and bool(ids.any() if any(ids.stride()) else ids[(0,) * ids.ndim])


def _constant(sets: IndexSets, matrix: Tensor, columns: Tensor) -> Tensor:
    """The numbers of ``matrix @ B`` for a matrix that depends on nothing; its zeros let nothing through."""
    if matrix.layout != torch.strided:
        matrix = matrix.to_sparse_coo().coalesce()
        at = matrix.indices().cpu()
    elif bool(matrix.detach().all()):
        return _united(sets, columns, [0]).expand(matrix.shape[0], columns.shape[1])
    else:
        at = matrix.detach().cpu().nonzero().mT
    rows, inner = at
    shape = torch.Size([matrix.shape[0], columns.shape[1]])
    if rows.numel() * shape[1] > sets.most:
        raise TooDense
    places = rows[:, None] * shape[1] + torch.arange(shape[1])
    return _grouped(sets, places, columns[inner], shape)


def _convolve(sets: IndexSets, func: Any, given: Any, outputs: list[Tensor], out: Any, ids: Ids) -> list[Tensor]:
    """A product of the kernel, as a matrix, with the windows; or of its transpose, back from the outputs."""
    numbers, weight = ids(given["input"]), given["weight"]
    back = "grad_output" in given
    simple = not given["transposed"] and given["groups"] == 1 and numbers.ndim in (3, 4) and not _any(ids(weight))
    if not simple or (back and given["output_mask"][1:] != [False, False]):
        return []
    kernel = weight.detach().cpu().reshape(len(weight), -1)
    places = _windows(torch.arange(1, numbers.numel() + 1).view(numbers.shape), given, weight.shape[2:])
    if not back:
        windows = torch.cat([torch.zeros(1, dtype=torch.int64), numbers.reshape(-1)])[places]  # [B, K, L]
        batch, _, length = windows.shape
        found = _constant(sets, kernel, windows.movedim(1, 0).reshape(kernel.shape[1], -1))
        shape = given["input"].shape[:1] + weight.shape[:1] + outputs[0].shape[2:]
        return [found.view(-1, batch, length).movedim(0, 1).reshape(shape)]
    channels, taps = kernel.nonzero().mT
    coming = ids(given["grad_output"]).flatten(2)[:, channels]  # [B, nnz, L]
    if coming.numel() > sets.most:
        raise TooDense
    going = places[:, taps]
    inside = going > 0
    return [_grouped(sets, going[inside] - 1, coming[inside], numbers.shape)]


def _windows(places: Tensor, given: Any, kernel: torch.Size) -> Tensor:
    """The places [B, K, L] that each window of a convolution sees, 0 for padding."""
    flat = [1] * (2 - len(kernel))
    image = places.double().view(*places.shape[:2], *flat, *places.shape[2:])
    stride, dilation = (tuple(flat + list(given[name])) for name in ("stride", "dilation"))
    padding = (0,) * len(flat) + tuple(given["padding"])
    return F.unfold(image, (*flat, *kernel), dilation, padding, stride).long()


_Rule = Callable[[IndexSets, Any, Any, list[Tensor], Any, Ids], list[Tensor]]
_RULES: dict[str, _Rule] = {}
_RULES |= dict.fromkeys(("mse_loss", "huber_loss", "smooth_l1_loss", "binary_cross_entropy", "soft_margin_loss"), _loss)
_RULES |= dict.fromkeys(("binary_cross_entropy_with_logits",), _loss)
_RULES |= dict.fromkeys(("sum", "mean", "prod", "amax", "amin", "logsumexp", "linalg_vector_norm", "norm"), _reduce)
_RULES |= dict.fromkeys(("var", "std", "var_mean", "std_mean"), _reduce)
_RULES |= dict.fromkeys(("softmax", "log_softmax", "softmax_backward_data", "log_softmax_backward_data"), _along)
_RULES |= dict.fromkeys(("cumsum", "cumprod", "logcumsumexp"), _along)
_RULES |= dict.fromkeys(("sort", "topk", "max", "min", "median", "nanmedian", "kthvalue", "mode"), _picked)
_RULES |= dict.fromkeys(("index_put", "index_put_impl", "index_add", "scatter_add", "unfold_backward"), _put)
_RULES |= dict.fromkeys(
    ("mm", "mv", "addmm", "addmv", "bmm", "baddbmm", "dot", "vdot", "sparse_mm", "sparse_addmm"), _product
)
_RULES |= dict.fromkeys(("convolution", "convolution_backward"), _convolve)
