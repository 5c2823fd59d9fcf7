"""torch's own tests of optimisers, as far as they come with it: the errors all must raise, and the right direction.

``torch.testing._internal`` is private and may change: this is the one file that touches it.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from optim.contract import ROWS, Row

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
try:
    from torch.testing._internal import common_optimizers as torchs

    GENERIC = torchs.get_error_inputs_for_all_optims("cpu", torch.float32)
    SCHEDULERS = torchs.OptimizerInfo(torch.optim.SGD, optim_inputs_func=None).scheduler_inputs[0]
except (ImportError, AttributeError, TypeError) as error:
    pytest.skip(f"torch.testing._internal.common_optimizers has changed: {error}", allow_module_level=True)

PARAMS = [name for name, row in ROWS.items() if "groups" in row.offers]
ON_CLOSURES = [name for name in PARAMS if "plain" in ROWS[name].offers and not ROWS[name].looks]


def inputs(row: Row) -> list[Any]:
    """What torch's own tests would construct it with."""
    settings: list[dict[str, Any]] = [{}, {"lr": 0.01}, {"lr": torch.tensor(0.01)}, {"weight_decay": 0.1}]
    settings += [{"weight_decay": 0.1, "maximize": True}]
    return [torchs.OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)) for kwargs in settings]


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("number", range(len(GENERIC)), ids=[e.optimizer_error_input.desc for e in GENERIC])
def test_errors_that_torch_wants_of_all(name: str, number: int) -> None:
    wanted = GENERIC[number]
    params, settings = wanted.optimizer_error_input.params, dict(wanted.optimizer_error_input.kwargs)
    params = deepcopy(params) if params is not None else [torch.nn.Parameter(torch.randn(2, 2))]
    if wanted.error_type is UserWarning:
        with pytest.warns(UserWarning, match=wanted.error_regex):
            ROWS[name].on(params, **settings)
        return
    assert wanted.error_on == torchs.OptimizerErrorEnum.CONSTRUCTION_ERROR
    with pytest.raises(wanted.error_type, match=wanted.error_regex):
        ROWS[name].on(params, **settings)


@pytest.mark.parametrize("name", ON_CLOSURES)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("scheduled", [False, True])
def test_the_right_direction(name: str, contiguous: bool, scheduled: bool) -> None:
    """As ``test_forloop_goes_right_direction`` of torch's ``test/test_optim.py``, on its problem."""
    row = ROWS[name]
    for given in inputs(row):
        torch.manual_seed(0)
        shape = (10, 5) if contiguous else (10, 5, 2)
        weight, bias = torch.randn(shape), torch.randn(shape[:1] if contiguous else (10, 2))
        if not contiguous:
            weight, bias = weight[..., 0], bias[..., 0]
        weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        assert weight.is_contiguous() == contiguous
        x = torch.randn(5)
        optimizer = row.on([weight, bias], **given.kwargs)
        schedulers = [make(optimizer) for make in SCHEDULERS] if scheduled else []

        def closure(optimizer: Any = optimizer, weight: Any = weight, bias: Any = bias, x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = (weight.mv(x) + bias).pow(2).sum()
            loss.backward()
            return loss

        first = float(closure().detach())
        for _ in range(20):
            loss = optimizer.step(closure)
            for scheduler in schedulers:
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(float(loss.detach()))
                else:
                    scheduler.step()
        last = float(closure().detach())
        assert (last > first) if given.kwargs.get("maximize") else (last < first), given.desc
