"""Does an optimiser keep torch's contract?

It is set to work on small convex problems, again and again from the same numbers, and its runs are compared with one
another: saved and resumed with uninterrupted, contiguous with strided, two groups with one. SGD, Adam, LBFGS, Muon and
K-FAC differ in all they do, and in none of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hesse.check.contract.settings import SETTINGS
from hesse.check.contract.state import STATE
from hesse.check.contract.steps import STEPS
from hesse.check.contract.trial import RAISED, Stand, sentence, undisturbed
from hesse.check.report import Report

__all__ = ["optimizer"]


def optimizer(optimizer_class: Callable[..., torch.optim.Optimizer], *, seed: int = 0, **settings: Any) -> Report:
    """Check that an optimizer keeps what torch promises of all.

    The first step goes downhill, for parameters of any shape, layout and number format, and the loss of a convex
    problem falls; ``maximize`` climbs; parameters without gradients are left alone; zero gradients do no harm; closures
    are called with autograd on and their loss is returned; groups, weight decay and schedulers are heeded; ``.grad`` is
    not written; the same seed gives the same steps; a run resumed from ``state_dict`` is the run uninterrupted, bit for
    bit; state keeps its dtype and can be loaded with ``weights_only=True``; two optimizers share nothing.

    An optimizer may need a closure (LBFGS), take the model (``hesse.optim.KFAC``), or matrices only (Muon): the notes
    say so.

    Args:
        optimizer_class: a class whose first argument is the parameters, or the model; or a function of parameters that
            returns an optimizer, for one that goes around another.
        seed: of the problems.
        settings: keyword arguments for it, ``lr=0.1``.

    Returns:
        A report: each promise not kept is a finding that names the class, the method, its file and line.

    Raises:
        InputError: it can be made neither from parameters nor from a model.

    Example:
        Adam keeps its promises. This one forgets the sign:

        >>> optimizer(torch.optim.Adam).ok
        True
        >>> class Uphill(torch.optim.Optimizer):
        ...     def __init__(self, params, lr=0.1):
        ...         super().__init__(params, {"lr": lr})
        ...     @torch.no_grad()
        ...     def step(self, closure=None):
        ...         for group in self.param_groups:
        ...             for p in group["params"]:
        ...                 if p.grad is not None:
        ...                     p.add_(p.grad, alpha=group["lr"])
        >>> optimizer(Uphill).culprits[0].message
        'The first step goes uphill (slope 1 of the steepest).'
    """
    with undisturbed(), torch.enable_grad():
        stand = Stand(optimizer_class, settings, seed)
        report = Report("Optimizer check", stand.name, notes=stand.notes)
        if stand.trouble is not None:
            report.findings.append(stand.trouble)
            if stand.trouble.kind == "step":
                return report
        for kind, promise in {**STEPS, **SETTINGS, **STATE}.items():
            try:
                for finding in promise(stand):
                    report.findings.append(finding)
            except RAISED as error:
                about = (promise.__doc__ or "").split("\n")[0].rstrip(".")
                message = f"It raises {sentence(error)}, where this was tried: {about[0].lower()}{about[1:]}."
                report.findings.append(stand.finding(kind, message, "Follow the error; the promise is torch's."))
    return report
