"""KFAC with a limit on the size of its factors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import hesse
from hesse.optim import KFAC
from problems import PROBLEMS, Problem, problem


def train(optimizer: KFAC, p: Problem, steps: int) -> list[float]:
    return [float(optimizer.step(hesse.closure(p.model, p.loss_fn, p.batch))) for _ in range(steps)]


def factors_of(optimizer: KFAC) -> dict[str, Any]:
    names = optimizer.param_groups[0]["param_names"]
    return {
        name: optimizer.state[p]["factor_g"]
        for name, p in zip(names, optimizer.param_groups[0]["params"], strict=True)
        if "factor_g" in optimizer.state[p]
    }


@pytest.mark.parametrize("ekfac", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_models_train_with_their_factors_in_parts(name: str, ekfac: bool) -> None:
    p = problem(name)
    torch.manual_seed(0)
    optimizer = KFAC(p.model, max_dim=3, ekfac=ekfac)
    losses = train(optimizer, p, 12)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    for state in optimizer.state.values():
        if "factor_g" in state:
            lookup = state["factor_a"].ndim < state["factor_g"].ndim
            keys = ("factor_g", "inverse_g", *(() if lookup else ("factor_a", "inverse_a")))
            assert all(state[key].shape[-1] <= 3 for key in keys if key in state)


@pytest.mark.parametrize("name", ["convnet, grouped", "text", "LSTM"])
def test_a_limit_that_nothing_reaches_changes_nothing(name: str) -> None:
    runs = []
    for settings in ({}, {"max_dim": 72}):  # the widest side there is: of the convnet's head, 4 * 4 * 4 and a bias
        p = problem(name)
        torch.manual_seed(0)
        optimizer = KFAC(p.model, **settings)
        runs.append((train(optimizer, p, 12), [q.detach().clone() for q in p.model.parameters()]))
        assert all(g.ndim == 2 or "grouped" in name for g in factors_of(optimizer).values())
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("name", ["convnet, grouped", "text", "transformer"])
def test_resumed_in_parts_is_uninterrupted_bit_for_bit(name: str) -> None:
    whole, resumed = problem(name), problem(name, seed=1)
    optimizer = KFAC(whole.model, max_dim=5)
    torch.manual_seed(0)
    train(optimizer, whole, 13)
    resumed.model.load_state_dict(whole.model.state_dict())
    again = KFAC(resumed.model)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # brings the limit with it
    random = torch.get_rng_state()
    expected = train(optimizer, whole, 8)
    torch.set_rng_state(random)
    assert train(again, Problem(resumed.model, whole.loss_fn, whole.batch), 8) == expected


def test_the_limit_may_change_on_the_way() -> None:
    p = problem("mlp, cross-entropy")
    optimizer = KFAC(p.model, ekfac=True)
    train(optimizer, p, 3)
    for limit, ndim in ((4, 3), (2048, 2)):
        optimizer.param_groups[0]["max_dim"] = limit
        losses = train(optimizer, p, 3)
        assert losses[-1] < losses[0]
        assert {g.ndim for g in factors_of(optimizer).values()} == {ndim}


@pytest.mark.parametrize("limit", [0, -1, 2.5, None])
def test_a_limit_that_is_no_size_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid max_dim.*whole number of at least 1"):
        KFAC(nn.Linear(2, 1), max_dim=limit)
