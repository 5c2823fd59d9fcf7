"""A glance at how the loss of one batch bends, and whether the steps of an optimiser bear it.

Gradient descent with momentum shrinks an error along an eigenvector of the Hessian only while the eigenvalue stays
below 2 (1 + beta) / lr, with Nesterov's momentum below 2 (1 + beta) / ((1 + 2 beta) lr); training drives the largest
one there by itself and hovers (Cohen et al., Gradient descent on neural networks typically occurs at the edge of
stability, ICLR 2021, appendix B). So only a loss that did not fall makes a fault of it. For optimisers that scale each
parameter by itself no such number is known.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from hesse.curvature import DerivativeError, hessian
from hesse.doctor.diagnosis import Course, Sharpness
from hesse.finding import Finding
from hesse.linalg.lanczos import LinAlgError
from hesse.objective.function import LossFn

__all__ = ["glance", "too_sharp"]

EIGENVALUES = 3
LEAST, MOST = 20, 80  # products: with fewer than 20 nothing is known, more than 80 are not needed for a glance


def glance(
    model: nn.Module, loss_fn: LossFn, batch: tuple[Any, Any], optimizer: Optimizer, when: str, seconds: float
) -> Sharpness | str:
    """Eigenvalues and trace of the Hessian within about ``seconds``, or the reason why there are none."""
    try:
        H = hessian(model, loss_fn, batch)
        if H.shape[0] == 0:
            return f"Curvature {when} was not looked at: there is no trainable parameter."
        began = time.perf_counter()
        H @ torch.ones(H.shape[0], dtype=H.dtype, device=H.device)
        once = time.perf_counter() - began
        products = min(MOST, int(seconds / max(once, 1e-9)))
        if products < LEAST:
            return f"Curvature {when} was not looked at: one product takes {once:.2g} s."
        k = min(EIGENVALUES, H.shape[0])
        pairs = H.eigsh(k, which="LA", rtol=1e-2, max_products=max(products // 2, k))
        trace = H.trace(rtol=0.1, max_products=products // 2)
    except (DerivativeError, ValueError, TypeError, LinAlgError) as error:
        return f"Curvature {when} was not looked at: {' '.join(str(error).split())}"
    values = pairs.values.tolist()
    total, error_ = float(trace.value), float(trace.error)
    return Sharpness(when, values, total, error_, stable(optimizer), pairs.products + trace.products)


def stable(optimizer: Optimizer) -> float | None:
    """The largest eigenvalue of the Hessian that the optimiser's steps bear, where one is known.

    Example:
        >>> stable(SGD([torch.zeros(1)], lr=0.25)), stable(SGD([torch.zeros(1)], lr=0.25, momentum=0.5))
        (8.0, 12.0)
    """
    if type(optimizer) is not SGD:
        return None
    settings = {(float(g["lr"]), g["momentum"], g["nesterov"], g["dampening"]) for g in optimizer.param_groups}
    lr, beta, nesterov, dampening = next(iter(settings))
    if len(settings) > 1 or lr <= 0 or dampening:
        return None
    return 2 * (1 + beta) / lr / ((1 + 2 * beta) if nesterov else 1)


def too_sharp(glances: list[Sharpness], course: Course) -> list[Finding]:
    """A finding where the sharpness was above what the steps bear: a fault only if the loss did not fall."""
    for seen in glances:
        if seen.stable is None or not seen.largest or seen.largest[0] <= seen.stable:
            continue
        late = course.losses[-max(1, len(course.losses) // 4) :]
        fell = course.finite and sum(late) / len(late) < course.losses[0]
        ratio = seen.largest[0] / seen.stable
        return [
            Finding(
                "curvature",
                "optimizer",
                f"The loss of a batch bends by {seen.largest[0]:.3g} {seen.when}, {ratio:.2g} times what steps with "
                f"this learning rate bear ({seen.stable:.3g})"
                + ("; it fell all the same." if fell else ", and it did not fall."),
                f"Lower the learning rate {max(2.0, 2 * ratio):.2g} times, or warm it up until the loss is less sharp.",
                "info" if fell else "warning",
                value=seen.largest[0],
                limit=seen.stable,
                step=1 if seen.when == "at first" else course.steps,
            )
        ]
    return []
