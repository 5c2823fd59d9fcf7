"""A user's own loss: H_L by differentiating the loss twice at the outputs, where that costs next to nothing.

Products differentiate the gradient ``d loss / d outputs`` along u, on a graph that is kept: it is that of the loss
alone, without the network. Draws and roots need a square root of H_L, and so the blocks themselves: as many products
as an example has outputs give the blocks of all examples at once, provided that no example's loss knows of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from hesse.curvature.culprit import DerivativeError, custom_functions
from hesse.curvature.losses.base import OutputCurvature, plain, signs

__all__ = ["Own", "own_loss"]

AGREEMENT = 0.02  # of an element, beside rounding: what the curvature's own change over the step amounts to
KINKS = 0.05  # share of the elements that a kink between the points of a difference may spoil
WIDEST = 64  # outputs an example whose dense blocks are formed: products and eigendecompositions grow with them


@dataclass(frozen=True, kw_only=True, eq=False)
class Own(OutputCurvature):
    """The Hessian of any loss that can be differentiated twice.

    ``draw`` and ``root`` are those of the nearest positive semidefinite matrix: negative eigenvalues of an example's
    block count as zero. ``product`` is the Hessian as it is. An example, all of dimensions 1 and up, is a term.

    Args:
        outputs: a leaf, with the graph of ``gradient``.
        gradient: of the loss, shaped like the outputs, to be differentiated again.
    """

    outputs: Tensor
    gradient: Tensor

    def product(self, u: Tensor) -> Tensor:
        u = plain(u)
        if not self.gradient.requires_grad:
            return torch.zeros_like(u)  # the loss is linear in the outputs
        try:
            (curved,) = torch.autograd.grad(self.gradient, self.outputs, u, retain_graph=True, materialize_grads=True)
        except RuntimeError as error:
            raise DerivativeError(
                f"the gradient of the loss {self.name!r} in the outputs cannot be differentiated: {error}. Its "
                "curvature needs second derivatives: write the loss with operations that have them."
            ) from error
        return curved

    def draw(self, generator: Generator | None = None) -> Tensor:
        root = self._root
        z = signs(root[:, 0], generator)
        r = (root @ z.unsqueeze(-1)).squeeze(-1)
        return (r / self.weight**0.5).view(self.outputs.shape)

    def root(self) -> Iterator[Tensor]:
        root = self._root
        return (column.reshape(self.outputs.shape) for column in root.unbind(-1))

    @cached_property
    def _root(self) -> Tensor:
        """[B, D, D]: L with L L' the block of each example, the weight included, negative eigenvalues cut off."""
        shape = self.outputs.shape
        examples = shape[0] if shape else 1
        width = shape[1:].numel()
        if width > WIDEST:
            raise ValueError(
                f"draws of the loss {self.name!r} need the dense Hessian of each example, {width} x {width} here; it "
                f"is formed for up to {WIDEST} outputs an example. Products work at any size, and so do draws of a "
                "loss of torch.nn that is passed itself."
            )
        self._refuse_coupling()
        units = torch.eye(width, dtype=self.outputs.dtype, device=self.outputs.device)
        columns = self.products(units.unsqueeze(1).expand(width, examples, width).reshape(width, *shape))
        blocks = columns.reshape(width, examples, width).movedim(0, -1).double()
        values, vectors = torch.linalg.eigh(0.5 * (blocks + blocks.mT))
        return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)).to(self.outputs.dtype)

    def _refuse_coupling(self) -> None:
        """Raise if any example's gradient depends on another's outputs.

        Examples are numbered; for each binary digit, a random u is put on those that have it and the product must
        vanish on the others. Any two differ in a digit, so log2 B products find every pair.
        """
        shape = self.outputs.shape
        examples = shape[0] if shape else 1
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.outputs)
        index = torch.arange(examples, device=self.outputs.device).view(-1, *(1 for _ in shape[1:]))
        for digit in range((examples - 1).bit_length()):
            on = ((index >> digit) & 1).bool()
            curved = self.product(u * on).abs()
            leak, size = (float((curved * which).max()) for which in (~on, on))
            if leak > 100 * torch.finfo(curved.dtype).eps * max(size, leak):
                raise ValueError(
                    f"the loss {self.name!r} couples examples (dimension 0 of the outputs): its gradient at some "
                    "depends on the outputs of others. Then its Hessian is no sum over examples, and has no draws and "
                    "roots, which sampled factors and exact diagonals are made of; it has products. Make the loss a "
                    "mean or sum over examples: the root of a mean square, for instance, is none."
                )


def own_loss(
    loss_fn: Callable[..., Any], name: str, outputs: Tensor, targets: Any, reduction: str | None
) -> OutputCurvature:
    """The curvature of ``loss_fn(outputs, targets)`` at detached ``outputs``; ``reduction`` says what a term weighs."""

    def slope(x: Tensor, again: bool = False) -> tuple[Tensor | None, set[str]]:
        """The gradient at the leaf x, to be differentiated ``again`` or not, and the custom Functions behind it."""
        with torch.enable_grad():
            loss = loss_fn(x.clone(), targets)  # a copy: it may work in place
            _refuse_what_is_no_number(name, loss)
            if not loss.requires_grad:
                return None, set()
            (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss), create_graph=again, allow_unused=True)
        return gradient, set(custom_functions(loss.grad_fn))

    x = outputs.requires_grad_()
    gradient, functions = slope(x, again=True)
    if gradient is None:
        raise ValueError(
            f"the loss {name!r} does not depend on the outputs by anything that can be differentiated: is there a "
            "detach(), an argmax or a comparison on the way, or are its arguments (outputs, targets) swapped?"
        )
    examples = float(outputs.shape[0]) if outputs.ndim else 1.0
    curvature = Own(
        name=name,
        weight=1 / examples if reduction == "mean" else 1.0,
        terms=examples,
        total=examples,
        reduction=reduction,
        psd=False,
        axes=tuple(range(1, outputs.ndim)),
        outputs=x,
        gradient=gradient,
    )
    if functions:
        _verify(curvature, lambda x: slope(x)[0], functions)
    return curvature


def _refuse_what_is_no_number(name: str, loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss {name!r} must return one number as a tensor; it returned {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(
            f"the loss must be one number; {name!r} returned a tensor of shape {list(loss.shape)}. Take its mean "
            "or sum."
        )


def _verify(curvature: Own, slope: Callable[[Tensor], Tensor | None], functions: set[str]) -> None:
    """Hold a product against a difference of gradients, for losses with a custom ``autograd.Function``.

    torch takes what such a Function keeps for itself as a constant, and one that is ``once_differentiable`` for linear:
    its second derivative is then wrong without a word. Kinks make a difference disagree too, but in few elements.
    """
    x = curvature.outputs.detach()
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
    h = torch.finfo(x.dtype).eps ** (1 / 3) * max(float(x.norm() / u.norm()), 1e-3)
    up, down = (slope((x + step * u).requires_grad_()) for step in (h, -h))
    assert up is not None
    assert down is not None
    difference, product = (up - down) / (2 * h), curvature.product(u)
    rounding = 10 * torch.finfo(x.dtype).eps * up.abs().max() / h
    limit = AGREEMENT * torch.maximum(product.abs(), difference.abs()) + rounding
    if float(((product - difference).abs() > limit).double().mean()) > KINKS:
        raise DerivativeError(
            f"the second derivative of the loss {curvature.name!r} through autograd.Function "
            f"{', '.join(sorted(functions))} is wrong: it disagrees with differences of the gradient. A backward that "
            "uses what forward computed, rather than its saved inputs and outputs, or that is once_differentiable, "
            "hides what it depends on. Write the loss with torch's own operations, or the backward as a Function too."
        )
