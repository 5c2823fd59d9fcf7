"""Losses of one class out of many: cross-entropy of logits, and NLL and Kullback-Leibler loss of log-probabilities.

In the logits z all three curve alike: a term has ``weight_n (diag(p) - p p')``, which knows nothing of the label, and
so equals the Fisher matrix of the categorical model. A smoothed or probabilistic target moves the gradient only; class
weights weigh a term by ``sum_c t_c w_c``.

NLL and KL take the log-probabilities o instead, and are linear in them: their second derivative there is zero, and a
Gauss-Newton matrix made of it would be zero as well. What curves is the normalisation inside the model. With
``H_L = diag(p)`` in the space of log-probabilities the product with the Jacobian of log-softmax,
``(I - 1 p')' diag(p) (I - 1 p') = diag(p) - p p'``, is the matrix of cross-entropy, exactly; and ``diag(p)`` is the
Fisher matrix of the categorical model in that space, E[r r'] of ``r = -onehot(y), y ~ p``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from hesse.curvature.losses.base import OutputCurvature, count, nonnegative, same_shape
from hesse.curvature.losses.diagonal import Diagonal, Model

__all__ = ["Softmax", "cross_entropy", "kl_div", "nll_loss"]

NORMALISED = 0.05  # how far from 1 probabilities may add up: log-probabilities rounded to bfloat16 are off by 3 %


@dataclass(frozen=True, kw_only=True, eq=False)
class Softmax(OutputCurvature):
    """``H_n = scale_n (diag(p_n) - p_n p_n')``.

    Args:
        p: probabilities, shaped like the outputs.
        scale: the terms' own weights, of size 1 in the class dimension; 0 for terms that do not count.
    """

    p: Tensor
    scale: Tensor

    def product(self, u: Tensor) -> Tensor:
        pu = self.p * u
        return self.weight * self.scale * (pu - self.p * pu.sum(self.axes[0], keepdim=True))

    def draw(self, generator: Generator | None = None) -> Tensor:
        root = self._refuse_negative(self.scale).sqrt()
        return root * (self.p - _onehot(self.p, self.axes[0], generator))

    def root(self) -> Iterator[Tensor]:
        scale = self.weight * self._refuse_negative(self.scale)
        return self._columns((scale * self.p).sqrt())

    def _columns(self, root: Tensor) -> Iterator[Tensor]:
        """Column c of ``(I - p 1') diag(root)`` for each position and class: the square is diag(p) - p p'."""
        axis, shape = self.axes[0], self.p.shape
        classes = shape[axis]
        p, root = (x.reshape(shape[:axis].numel(), classes, -1) for x in (self.p, root))
        for position in range(p.shape[2]):
            for c in range(classes):
                column = torch.zeros_like(p)
                column[:, :, position] = -p[:, :, position] * root[:, c, position, None]
                column[:, c, position] += root[:, c, position]
                yield column.reshape(shape)

    def label(self, generator: Generator | None = None) -> Tensor:
        return self.draw(generator)

    def fisher(self, u: Tensor) -> Tensor:
        return self.product(u)

    def fisher_root(self) -> Iterator[Tensor]:
        return self.root()


def cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> OutputCurvature:
    name, axis = "cross_entropy", _class_axis(outputs)
    classes = outputs.shape[axis]
    psd = True
    if targets.is_floating_point():
        same_shape(name, outputs, targets)
        soft = targets * (1 - label_smoothing) + label_smoothing / classes
        shape = [classes if i == axis else 1 for i in range(outputs.ndim)]
        scale = (soft if weight is None else soft * weight.view(shape)).sum(axis, keepdim=True)
        counts = count(name, reduction, scale.numel())  # torch divides by the number of terms, not by their weights
        psd = nonnegative(scale)
    else:
        scale, own, terms = _weights_of_labels(name, outputs, targets, axis, weight, ignore_index)
        counts = count(name, reduction, terms, None if weight is None else float(own.sum()))
        if weight is not None:  # a smoothed target has label_smoothing / C of every class, and that of its weight
            scale = (1 - label_smoothing) * own + label_smoothing * weight.mean() * scale
            psd = nonnegative(weight)
    return Softmax(**counts, psd=psd, axes=(axis,), p=outputs.softmax(axis), scale=scale)


def nll_loss(
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> OutputCurvature:
    axis = _class_axis(outputs)
    p = outputs.exp()
    if (off := _from_one(p, axis)) > NORMALISED:
        raise ValueError(
            f"nll_loss needs log-probabilities: exp(outputs) should add up to 1 along dimension {axis}, and is off by "
            f"up to {off:.2g}. End the model in log_softmax, or use cross_entropy, which takes the logits."
        )
    _, own, terms = _weights_of_labels("nll_loss", outputs, targets, axis, weight, ignore_index)
    counts = count("nll_loss", reduction, terms, None if weight is None else float(own.sum()))
    model = _log_categorical(p, own, axis)
    return Diagonal(**counts, psd=weight is None or nonnegative(weight), axes=(axis,), h=model.square, model=model)


def kl_div(outputs: Tensor, targets: Tensor, reduction: str = "mean", log_target: bool = False) -> OutputCurvature:
    same_shape("kl_div", outputs, targets)
    p, t = outputs.exp(), targets.exp() if log_target else targets
    # Not told, the class dimension is the one along which probabilities add up to 1. Uniform ones may do so along
    # several: then the targets decide, and where these are uniform too both readings give the same numbers.
    off = {axis: _from_one(p, axis) for axis in reversed(range(outputs.ndim))}
    axes = [axis for axis, value in off.items() if not value > NORMALISED]  # NaN is for others to find
    if not axes:
        raise ValueError(
            "kl_div needs log-probabilities: exp(outputs) adds up to 1 along no dimension of the outputs "
            f"{list(outputs.shape)}; it is off by up to {min(off.values(), default=1.0):.2g} at best. End the model in "
            "log_softmax over the classes; a Kullback-Leibler loss of anything else needs a loss function of your own."
        )
    axis = min(axes, key=lambda axis: off[axis] + _from_one(t, axis))
    terms = outputs.numel() / outputs.shape[axis]
    if reduction == "batchmean":
        counts = count("kl_div", "mean", terms, outputs.shape[0])
        counts["reduction"] = reduction
    else:
        counts = count("kl_div", reduction, terms, outputs.numel())  # torch's "mean" is over elements, not over terms
    scale = t.sum(axis, keepdim=True)
    model = _log_categorical(p, scale, axis)
    return Diagonal(**counts, psd=nonnegative(scale), axes=(axis,), h=model.square, model=model)


def _class_axis(outputs: Tensor) -> int:
    return 1 if outputs.ndim > 1 else 0  # 0 when there is no batch


def _weights_of_labels(
    name: str, outputs: Tensor, targets: Tensor, axis: int, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, float]:
    """1 where a term counts and 0 elsewhere, the weight of its class, both of size 1 along the classes; the count."""
    expected = outputs.shape[:axis] + outputs.shape[axis + 1 :]
    if targets.shape != expected:
        raise ValueError(
            f"{name} takes one label for each vector of {outputs.shape[axis]} classes: for outputs "
            f"{list(outputs.shape)}, classes in dimension {axis}, targets {list(expected)}; got {list(targets.shape)}."
        )
    counted = targets != ignore_index
    ones = counted.to(outputs.dtype).unsqueeze(axis)
    own = ones
    if weight is not None:
        own = ones * weight.to(outputs.dtype)[targets.where(counted, 0)].unsqueeze(axis)
    return ones, own, float(counted.sum())


def _log_categorical(p: Tensor, scale: Tensor, axis: int) -> Model:
    return Model(scale * p, lambda generator: -scale.sqrt() * _onehot(p, axis, generator))


def _onehot(p: Tensor, axis: int, generator: Generator | None) -> Tensor:
    """One-hot vectors of labels drawn from the probabilities along ``axis``."""
    rows = p.movedim(axis, -1)
    labels = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator)
    return torch.zeros_like(rows).scatter_(-1, labels.view(*rows.shape[:-1], 1), 1.0).movedim(-1, axis)


def _from_one(p: Tensor, axis: int) -> float:
    return float((p.sum(axis) - 1).abs().max())
