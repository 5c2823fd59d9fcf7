"""Cases of the contract that look at the state: what is saved comes back, bit for bit, by every way torch has."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optim.contract import Row, closure_of, double, frozen_copy, same, snapshot, train
from problems import Problem, mlp, problem

__all__ = ["STATE"]

# What they have in common: a layer with a bias, a padding row, a norm; convolutions and running statistics.
SAVED = ("mlp, cross-entropy", "text", "convnet, BatchNorm")


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def twin_of(row: Row, name: str, p: Problem, seed: int = 7) -> tuple[Problem, Optimizer]:
    """The same model elsewhere, with the same weights, and a fresh optimiser."""
    other = problem(name, seed)
    other.model.to(next(p.model.parameters()).dtype)
    other.model.load_state_dict(p.model.state_dict())
    other.model.train(p.model.training)
    return Problem(other.model, p.loss_fn, p.batch), row.of(other.model)


def resumed_is_uninterrupted(row: Row) -> None:
    for name in SAVED:
        for steps in (1, 5):
            p = problem(name)
            optimizer = row.of(p.model)
            train(optimizer, p, steps)
            other, again = twin_of(row, name, p)
            again.load_state_dict(through_a_file(optimizer.state_dict()))
            assert same(optimizer.state_dict(), again.state_dict())
            assert train(optimizer, p, 5, seed=1) == train(again, other, 5, seed=1)
            assert same(p.model, other.model)
            assert same(optimizer.state_dict(), again.state_dict())


def dtypes_survive(row: Row) -> None:
    p = problem("text")
    p.model.bfloat16()
    optimizer = row.of(p.model)
    train(optimizer, p, 3)
    other, again = twin_of(row, "text", p)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same(optimizer.state_dict(), again.state_dict())
    train(again, other, 2)


def state_is_flat_tensors(row: Row) -> None:
    p = problem("text")
    optimizer = row.of(p.model)
    train(optimizer, p, 3)
    for values in optimizer.state_dict()["state"].values():
        assert all(isinstance(key, str) for key in values)
        assert all(v is None or (isinstance(v, Tensor) and not v.requires_grad) for v in values.values())


def state_is_deterministic(row: Row) -> None:
    states = []
    for _ in range(2):
        p = problem("text")
        optimizer = row.of(p.model)
        train(optimizer, p, 4)
        states.append(optimizer.state_dict())
    assert same(*states)
    assert same(states[0], optimizer.state_dict())
    keys = [[list(values) for values in state["state"].values()] for state in states]
    assert keys[0] == keys[1]


def state_of_another_size_is_refused(row: Row) -> None:
    one, two = row.of(mlp()), row.of(nn.Linear(5, 3))
    with pytest.raises(ValueError, match="doesn't match the size"):
        two.load_state_dict(one.state_dict())


def names(row: Row) -> None:
    p, other = double(), double()
    one, two = row.on(p.model.named_parameters()), row.on(other.model.parameters())
    train(one, p, 3)
    train(two, other, 3)
    assert one.param_groups[0]["param_names"] == [name for name, _ in p.model.named_parameters()]
    assert same(p.model, other.model)
    third = row.on(double().model.named_parameters())
    third.load_state_dict(through_a_file(one.state_dict()))
    assert same(one.state_dict(), third.state_dict())
    unnamed = row.on(double().model.parameters())
    unnamed.load_state_dict(through_a_file(two.state_dict()))
    assert same(two.state_dict(), unnamed.state_dict())


def hooks_around_a_step(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    optimizer, seen = row.of(p.model), list[Any]()
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre 1", o, args))),
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre 2", o, args))),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post 1", o, args))),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post 2", o, args))),
    ]
    closure = closure_of(p)
    optimizer.step(closure)
    assert [word for word, *_ in seen] == ["pre 1", "pre 2", "post 1", "post 2"]
    assert all(o is optimizer and args[-1] is closure for _, o, args in seen)
    for handle in handles:
        handle.remove()
    used = list[bool]()
    p.model.register_forward_pre_hook(lambda module, args: used.append(args[0] is other.batch[0]))
    other = Problem(p.model, p.loss_fn, (p.batch[0].clone(), p.batch[1]))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((args[0], closure_of(other)), kwargs))
    optimizer.step(closure)
    assert len(seen) == 4
    assert all(used)


def hooks_around_saving_and_loading(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    optimizer, seen = row.of(p.model), list[str]()
    train(optimizer, p, 2)
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save pre 1"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save pre 0"), prepend=True)

    def mark(o: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("save post")
        return {**state, "mark": 1}

    optimizer.register_state_dict_post_hook(mark)
    state = optimizer.state_dict()
    assert seen == ["save pre 0", "save pre 1", "save post"]
    assert state["mark"] == 1

    def halve(o: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("load pre")
        changed = {
            number: {key: v / 2 if v.is_floating_point() else v for key, v in values.items() if v is not None}
            for number, values in state["state"].items()
        }
        return {**state, "state": changed}

    _, again = twin_of(row, "mlp, cross-entropy", p)
    again.register_load_state_dict_pre_hook(halve)
    again.register_load_state_dict_post_hook(lambda o: seen.append(f"load post {len(o.state)}"))
    again.load_state_dict(state)
    assert seen[3:] == ["load pre", f"load post {len(state['state'])}"]
    found = again.state_dict()["state"]
    for number, values in state["state"].items():
        for key, v in values.items():
            if v is not None and v.is_floating_point():
                assert torch.equal(found[number][key], v / 2)


def deep_copy(row: Row) -> None:
    p = problem("text")
    optimizer = row.of(p.model)
    train(optimizer, p, 3)
    before, state = snapshot(p.model), frozen_copy(optimizer.state_dict())
    model, twin = copy.deepcopy((p.model, optimizer))
    assert same(twin.state_dict(), state)
    losses = train(twin, Problem(model, p.loss_fn, p.batch), 4)
    assert same(before, p.model)
    assert same(state, optimizer.state_dict())
    assert train(optimizer, p, 4) == losses
    assert same(p.model, model)


def pickled(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    optimizer = row.of(p.model)
    train(optimizer, p, 3)
    model, twin = pickle.loads(pickle.dumps((p.model, optimizer)))  # noqa: S301
    assert train(twin, Problem(model, p.loss_fn, p.batch), 3) == train(optimizer, p, 3)


def distributed_checkpoint(row: Row, tmp_path: Path) -> None:
    checkpointed(row, tmp_path, flatten=False)


def flat_distributed_checkpoint(row: Row, tmp_path: Path) -> None:
    checkpointed(row, tmp_path, flatten=True)


def checkpointed(row: Row, path: Path, flatten: bool) -> None:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    p = problem("text")
    optimizer = row.of(p.model)
    train(optimizer, p, 4)
    state = get_optimizer_state_dict(p.model, optimizer, options=options)
    other, again = twin_of(row, "text", p)
    if row.looks or "groups" in row.offers:  # the others have no state before the first batch
        fresh = get_optimizer_state_dict(other.model, again, options=options)
        assert fresh.keys() == state.keys()
    else:
        fresh = frozen_copy(state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is: one process
        dcp.save(state, checkpoint_id=path, no_dist=True)
        dcp.load(fresh, checkpoint_id=path, no_dist=True)
    set_optimizer_state_dict(other.model, again, fresh, options=options)
    one, two = ({n: s for n, s in o.state_dict()["state"].items() if s} for o in (optimizer, again))
    assert same(one, two)  # torch unflattens what has no state to what has an empty one
    assert train(optimizer, p, 4, seed=1) == train(again, other, 4, seed=1)


def shown(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    optimizer = row.of(p.model)
    train(optimizer, p, 2)
    text = repr(optimizer)
    assert text.startswith(type(optimizer).__name__)
    assert "Parameter Group 0" in text


def zeroed(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    optimizer = row.of(p.model)
    train(optimizer, p, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all(q.grad is not None and not bool(q.grad.any()) for q in p.model.parameters())
    optimizer.zero_grad()
    assert all(q.grad is None for q in p.model.parameters())


STATE: dict[str, tuple[Callable[..., None], set[str]]] = {
    "resumed is uninterrupted": (resumed_is_uninterrupted, set()),
    "dtypes survive a reload": (dtypes_survive, set()),
    "state is flat tensors": (state_is_flat_tensors, set()),
    "state is deterministic": (state_is_deterministic, set()),
    "state of another size": (state_of_another_size_is_refused, set()),
    "names": (names, {"groups"}),
    "hooks around a step": (hooks_around_a_step, set()),
    "hooks around saving and loading": (hooks_around_saving_and_loading, set()),
    "deepcopy": (deep_copy, set()),
    "pickle": (pickled, set()),
    "distributed checkpoint": (distributed_checkpoint, set()),
    "flat distributed checkpoint": (flat_distributed_checkpoint, set()),
    "repr": (shown, set()),
    "zero_grad": (zeroed, set()),
}
