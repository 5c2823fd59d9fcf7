"""``torch.autograd.gradcheck`` on a case of the corpora, as people use it.

The model is copied to float64, its parameters (and inputs that ask for a gradient) are the arguments, the seed is set
in the function, so that dropout is the same at every evaluation. Cases of second derivatives go to ``gradgradcheck``.
It says that something is wrong or that nothing is; it does not say where. It moves every number by itself, which
takes long in a model that is not tiny: after ``SECONDS`` of processor time it is given up.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from torch.func import functional_call

__all__ = ["SECONDS", "notices"]

SECONDS = 20.0


def notices(subject: Any, inputs: Any, check: str) -> bool | str:
    """Whether it says that the gradient is wrong; or why it could not be asked."""
    end = process_time() + SECONDS

    def in_time(*tensors: Tensor) -> Any:
        if process_time() > end:
            raise TimeoutError(f"no answer after {SECONDS:g} s")
        return function(*tensors)

    try:
        function, arguments = _function(subject, inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (gradgradcheck if check == "hessian" else gradcheck)(in_time, arguments)
    except GradcheckError as error:
        refusal = "sparse" in str(error) or "complex" in str(error)
        return f"cannot: {error}" if refusal else True
    except Exception as error:  # noqa: BLE001 - it may refuse a model in any way; the reason is printed
        return f"cannot: {type(error).__name__}: {error}"
    return False


def _function(subject: Any, inputs: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function of float64 tensors, and the tensors."""
    if inputs is not None and not isinstance(subject, nn.Module):
        arguments = tuple(_double(x) for x in (inputs if isinstance(inputs, tuple) else (inputs,)))
        return subject, tuple(x.requires_grad_() if x.is_floating_point() else x for x in arguments)
    loss: Callable[[Any], Any] = lambda output: output  # noqa: E731
    model = subject
    if inputs is None:  # a closure: of model, loss and batch
        model, inputs = subject.objective.model, subject.objective.inputs
        loss_fn, targets = subject.objective.loss_fn, _double(subject.objective.targets)
        loss = lambda output: loss_fn(output, targets)  # noqa: E731
    model = copy.deepcopy(model).double()
    rows = tuple(_double(x) for x in (inputs if isinstance(inputs, tuple) else (inputs,)))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    params = tuple(dict(model.named_parameters())[name].detach().clone().requires_grad_() for name in names)
    asked = [i for i, x in enumerate(rows) if isinstance(x, Tensor) and x.requires_grad]

    def function(*tensors: Tensor) -> Any:
        torch.manual_seed(3)
        given = list(rows)
        for i, x in zip(asked, tensors[len(names) :], strict=True):
            given[i] = x
        return loss(functional_call(model, dict(zip(names, tensors, strict=False)), tuple(given)))

    return function, params + tuple(rows[i].detach().clone().requires_grad_() for i in asked)


def _double(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x
