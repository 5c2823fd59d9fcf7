"""Curvature of a loss at the model's outputs: the H_L of the Gauss-Newton matrix J' H_L J.

What is known about H_L does not depend on what the network does. For most losses the Gauss-Newton matrix is also the
Fisher matrix of a probability model, so H_L = E[r r'] for the gradient r of a label drawn from that model: one
backward pass of r samples the curvature of the whole network (Martens, 2020, section 9). With the labels of the data in
place of drawn ones E[r r'] is the empirical Fisher, which is no curvature (Kunstner, Balles and Hennig, 2019), though
often asked for. Each loss of torch.nn has its closed form in :mod:`hesse.curvature.losses`; any other is
differentiated twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hesse.curvature.losses import FORMS, REFUSED, OutputCurvature, Summand, function_of, own_loss, summed
from hesse.curvature.losses.base import plain

__all__ = ["OutputCurvature", "output_curvature", "term_gradients"]


def output_curvature(
    loss_fn: Callable[..., Any], outputs: Any, targets: Any, reduction: str | None = None
) -> OutputCurvature:
    """The exact Gauss-Newton factor of ``loss_fn`` at ``outputs``.

    Args:
        loss_fn: a loss of ``torch.nn.functional``, a ``functools.partial`` of one with keywords (class weights,
            ``ignore_index``, ``pos_weight``, ``var``, ``reduction``), the matching ``torch.nn`` module, or any function
            ``loss_fn(outputs, targets)`` of your own that returns one number and can be differentiated twice. A torch
            loss inside a function or a lambda counts as your own: pass it itself, and it costs less and can do more.
            So does one that is a sum of others and says so by a method ``summands(outputs, targets)``, which gives
            for each ``(factor, loss_fn, columns, rows, targets)``: the loss is the sum of
            ``factor * loss_fn(outputs[rows, columns], targets)``, rows int64 or None for all.
        outputs: what the model returned, a tensor. bfloat16 and float16 are computed with in float32.
        targets: as the loss takes them.
        reduction: "mean" or "sum", of a loss of your own: whether it averages over the examples, dimension 0, or adds
            them up. Only weights and counts ask, H_L does not. A torch loss says it itself.

    Raises:
        TypeError: the outputs are not one real tensor, or the loss is one without a curvature, such as ``l1_loss``.
        ValueError: the loss is not one number, the outputs are empty, or outputs or targets are not what it takes.
        RuntimeError: (at a product) a loss of your own cannot be differentiated twice.

    References:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural Computation 2002.
        Martens, New insights and perspectives on the natural gradient method, JMLR 2020.

    Example:
        The squared error of n numbers, averaged, has the Hessian 2 / n; a fourth power has one that depends on where:

        >>> outputs = torch.full((4, 1), 2.0)
        >>> square = output_curvature(torch.nn.functional.mse_loss, outputs, torch.zeros(4, 1))
        >>> square.product(torch.ones(4, 1)).flatten().tolist()
        [0.5, 0.5, 0.5, 0.5]
        >>> fourth = output_curvature(lambda outputs, targets: (outputs - targets).pow(4).sum(), outputs, 0.0)
        >>> fourth.product(torch.ones(4, 1)).flatten().tolist()
        [48.0, 48.0, 48.0, 48.0]
    """
    outputs = _one_tensor(outputs)
    function, options = function_of(loss_fn)
    name = _name(function)
    if function in REFUSED:
        raise TypeError(f"no Gauss-Newton factor is known for the loss {name!r}: {REFUSED[function]}")
    if reduction not in (None, "mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum'; got {reduction!r}.")
    summands = getattr(function, "summands", None)
    if function in FORMS or summands:
        own = options.get("reduction", "mean")
        if reduction not in (None, own):
            raise ValueError(f"the loss {name!r} has reduction={own!r} itself; got reduction={reduction!r} beside it.")
    if summands:
        return summed(name, outputs, _curvatures(summands(outputs, plain(targets)), outputs))
    if function in FORMS:
        plain_options = {key: plain(value) for key, value in options.items()}
        return FORMS[function](outputs, plain(targets), **plain_options)
    return own_loss(loss_fn, name, outputs, plain(targets), reduction)


def term_gradients(loss_fn: Callable[..., Any], outputs: Any, targets: Any, curvature: OutputCurvature) -> Tensor:
    """The gradient r_n of each term's own loss at its outputs: the ``label`` of the data's labels.

    ``weight * sum_n r_n r_n'`` is the empirical Fisher matrix at the outputs. Zero for terms that do not count.

    Args:
        loss_fn, outputs, targets: as given to :func:`output_curvature`.
        curvature: what it returned.

    Returns:
        ``d loss / d outputs`` without the weight of a term, shaped like the outputs, float32 at least.

    Raises:
        TypeError: whether a loss of your own averages or adds up was not said, so what a term weighs is not known.

    Example:
        >>> outputs, targets = torch.tensor([[3.0], [1.0]]), torch.zeros(2, 1)
        >>> loss_fn = torch.nn.functional.mse_loss
        >>> term_gradients(loss_fn, outputs, targets, output_curvature(loss_fn, outputs, targets)).flatten().tolist()
        [6.0, 2.0]
    """
    outputs = _one_tensor(outputs)
    if curvature.reduction is None:
        raise TypeError(
            f"the gradient of one term of the loss {curvature.name!r} needs to know what a term weighs, and a loss of "
            "your own does not say: pass reduction='mean' if it averages over the examples, 'sum' if it adds them up."
        )
    if not curvature.weight:
        return torch.zeros_like(outputs)  # no term counts: the loss is 0 / 0, and so would its gradient be
    function, options = function_of(loss_fn)
    if function in FORMS:  # with the options in the precision of the outputs
        loss_fn = functools.partial(function, **{key: plain(value) for key, value in options.items()})
    with torch.enable_grad():
        x = outputs.requires_grad_()
        (gradient,) = torch.autograd.grad(loss_fn(x.clone(), plain(targets)), x)
    return gradient / curvature.weight


def _curvatures(losses: Iterable[tuple[Any, ...]], outputs: Tensor) -> Iterator[Summand]:
    for factor, loss_fn, columns, rows, targets in losses:
        own = outputs[:, columns] if rows is None else outputs[:, columns].index_select(0, rows)
        yield Summand(factor, output_curvature(loss_fn, own, targets), columns, rows)


def _one_tensor(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the Gauss-Newton factor needs the model to return one tensor; it returned {type(outputs).__name__}. "
            "Return the tensor that the loss is taken of, or wrap the model in one that does."
        )
    if not outputs.is_floating_point():
        raise TypeError(
            f"the Gauss-Newton factor needs real outputs that can be differentiated; they are {outputs.dtype}. Return "
            "the scores, not their argmax; a complex output as its real and imaginary parts (torch.view_as_real)."
        )
    if not outputs.numel():
        raise ValueError(f"the outputs are empty, of shape {list(outputs.shape)}: is the batch?")
    return plain(outputs)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
