"""The losses of torch.nn whose curvature at the outputs is known in closed form, and reasons for the others.

One family a file: :mod:`.categorical` (one class of many), :mod:`.elementwise` (sums over elements), :mod:`.margin`
(squared margins), :mod:`.several` (some of these side by side); :mod:`.own` differentiates a user's own loss, and
:mod:`.summed` puts together one that says what it is a sum of. A new loss is one function and one line in ``FORMS``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from hesse.curvature.losses import categorical, elementwise, margin, several
from hesse.curvature.losses.base import OutputCurvature
from hesse.curvature.losses.own import own_loss
from hesse.curvature.losses.summed import Summand, summed

__all__ = ["FORMS", "MODULES", "REFUSED", "OutputCurvature", "Summand", "function_of", "own_loss", "summed"]

FORMS: dict[Callable[..., Any], Callable[..., OutputCurvature]] = {
    F.cross_entropy: categorical.cross_entropy,
    F.nll_loss: categorical.nll_loss,
    F.kl_div: categorical.kl_div,
    F.mse_loss: elementwise.mse_loss,
    F.gaussian_nll_loss: elementwise.gaussian_nll_loss,
    F.binary_cross_entropy_with_logits: elementwise.binary_cross_entropy_with_logits,
    F.binary_cross_entropy: elementwise.binary_cross_entropy,
    F.multilabel_soft_margin_loss: elementwise.multilabel_soft_margin_loss,
    F.soft_margin_loss: elementwise.soft_margin_loss,
    F.poisson_nll_loss: elementwise.poisson_nll_loss,
    F.huber_loss: elementwise.huber_loss,
    F.smooth_l1_loss: elementwise.smooth_l1_loss,
    F.multi_margin_loss: margin.multi_margin_loss,
    several.several_losses: several.several_losses_curvature,
}

_LINEAR = "it is piecewise linear, with a second derivative of zero wherever it has one"
_PAIRS = "it compares embeddings instead of outputs with targets"
_ONE_TENSOR = "Write a loss function of your own, of one tensor of outputs and the targets"
REFUSED: dict[Callable[..., Any], str] = {
    F.l1_loss: f"{_LINEAR}. Use huber_loss or smooth_l1_loss, which are the same but for small errors.",
    F.hinge_embedding_loss: f"{_LINEAR}. Use soft_margin_loss, its smooth relative.",
    F.multilabel_margin_loss: f"{_LINEAR}. Use multilabel_soft_margin_loss, its smooth relative.",
    F.margin_ranking_loss: f"{_LINEAR}, and {_PAIRS}. {_ONE_TENSOR}, with softplus in place of the hinge.",
    F.triplet_margin_loss: f"{_PAIRS}, and is not convex in them. {_ONE_TENSOR}.",
    F.triplet_margin_with_distance_loss: f"{_PAIRS}, and is not convex in them. {_ONE_TENSOR}.",
    F.cosine_embedding_loss: f"{_PAIRS}, and is not convex in them. {_ONE_TENSOR}.",
    F.ctc_loss: "it is not convex in the outputs, and torch has no second derivative of it. Use the Fisher matrix of a "
    "cross-entropy on aligned labels, or an optimiser of first order.",
}

MODULES: dict[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (F.cross_entropy, ("weight", "ignore_index", "reduction", "label_smoothing")),
    nn.NLLLoss: (F.nll_loss, ("weight", "ignore_index", "reduction")),
    nn.KLDivLoss: (F.kl_div, ("reduction", "log_target")),
    nn.MSELoss: (F.mse_loss, ("reduction",)),
    nn.GaussianNLLLoss: (F.gaussian_nll_loss, ("full", "eps", "reduction")),
    nn.BCEWithLogitsLoss: (F.binary_cross_entropy_with_logits, ("weight", "pos_weight", "reduction")),
    nn.BCELoss: (F.binary_cross_entropy, ("weight", "reduction")),
    nn.MultiLabelSoftMarginLoss: (F.multilabel_soft_margin_loss, ("weight", "reduction")),
    nn.SoftMarginLoss: (F.soft_margin_loss, ("reduction",)),
    nn.PoissonNLLLoss: (F.poisson_nll_loss, ("log_input", "full", "eps", "reduction")),
    nn.HuberLoss: (F.huber_loss, ("delta", "reduction")),
    nn.SmoothL1Loss: (F.smooth_l1_loss, ("beta", "reduction")),
    nn.MultiMarginLoss: (F.multi_margin_loss, ("p", "margin", "weight", "reduction")),
    nn.L1Loss: (F.l1_loss, ()),
    nn.HingeEmbeddingLoss: (F.hinge_embedding_loss, ()),
    nn.MultiLabelMarginLoss: (F.multilabel_margin_loss, ()),
    nn.MarginRankingLoss: (F.margin_ranking_loss, ()),
    nn.TripletMarginLoss: (F.triplet_margin_loss, ()),
    nn.TripletMarginWithDistanceLoss: (F.triplet_margin_with_distance_loss, ()),
    nn.CosineEmbeddingLoss: (F.cosine_embedding_loss, ()),
    nn.CTCLoss: (F.ctc_loss, ()),
}


def function_of(loss_fn: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function behind a loss, and its options by keyword.

    A ``functools.partial`` with keywords and the modules of torch.nn are seen through. A subclass of one is not: it may
    compute anything.

    Example:
        >>> function, options = function_of(functools.partial(nn.GaussianNLLLoss(eps=0.1), var=2.0))
        >>> function is F.gaussian_nll_loss, options
        (True, {'full': False, 'eps': 0.1, 'reduction': 'mean', 'var': 2.0})
    """
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        function, options = function_of(loss_fn.func)
        return function, _reduction_of(options | loss_fn.keywords)
    if isinstance(loss_fn, nn.Module) and type(loss_fn) in MODULES:
        function, keys = MODULES[type(loss_fn)]
        return function, {key: getattr(loss_fn, key) for key in keys}
    return loss_fn, {}


def _reduction_of(options: dict[str, Any]) -> dict[str, Any]:
    """The old keywords ``size_average`` and ``reduce``, which overrule ``reduction``, in today's words."""
    size_average, reduce = options.pop("size_average", None), options.pop("reduce", None)
    if size_average is None and reduce is None:
        return options
    return options | {"reduction": "none" if reduce is False else "sum" if size_average is False else "mean"}
