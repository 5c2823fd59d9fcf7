"""Processes that should train the same model: when they do not, it is said, and nothing ever waits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import hesse
from hesse.finding import Finding
from hesse.health.teams import compare

Body = Callable[[int], Any]


def inside(rank: int, size: int, path: str, body: Body) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=size)
    answer = body(rank)
    torch.distributed.barrier()
    torch.save(answer, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def shown(w: Any) -> list[tuple[str, str, str]]:
    found = [f for f in w.report().findings if f.kind == "ranks_disagree"]
    return [(f.where, f.severity, f.message) for f in found]


def train(rank: int, *, fault: str, wrapped: bool = True, watched: tuple[int, ...] = (0, 1), every: int = 2) -> Any:
    """Ten steps of two processes on different data."""
    torch.manual_seed(rank if "seeds" in fault else 0)
    inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    model: nn.Module = DistributedDataParallel(inner) if wrapped else inner
    opt = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(10 + rank)
    with hesse.watch(model, every=every, guard=None) as w:
        if rank not in watched:
            w.__exit__(None, None, None)
        for step in range(1, 11):
            opt.zero_grad()
            called = inner if fault == "inner" else model
            called(torch.randn(8, 4)).square().mean().backward()
            if not wrapped and "not averaged" not in fault:
                for p in inner.parameters():
                    torch.distributed.all_reduce(p.grad)
            opt.step()
            if fault == "one decays" and rank == 0 and step == 5:
                with torch.no_grad():
                    inner[2].weight.mul_(0.99)
            torch.distributed.barrier()
    torch.distributed.barrier()
    return shown(w)


CASES: dict[str, tuple[Callable[..., Any], list[tuple[str, str]]]] = {
    "averaged by DDP": (functools.partial(train, fault="none"), []),
    "averaged by hand": (functools.partial(train, fault="none", wrapped=False), []),
    "models of their own": (functools.partial(train, fault="not averaged, seeds", wrapped=False), []),
    "one process changes a weight": (functools.partial(train, fault="one decays"), [("2", "weights in 1 of 2")]),
    "DDP is gone round": (functools.partial(train, fault="inner"), [("0", "gradients")]),
    "not averaged by hand": (functools.partial(train, fault="not averaged", wrapped=False), [("0", "gradients")]),
    "never made equal": (functools.partial(train, fault="seeds", wrapped=False), [("0", "weights")]),
    "watched in one process only": (functools.partial(train, fault="one decays", watched=(0,)), []),
}


def all_cases(rank: int) -> dict[str, list[tuple[str, str, str]]]:
    return {name: body(rank) for name, (body, _) in CASES.items()}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[tuple[str, str, str]]]]:
    """What two processes said in each case."""
    path = tmp_path_factory.mktemp("team")
    multiprocessing.start_processes(inside, args=(2, str(path), all_cases), nprocs=2, start_method="spawn")
    return [torch.load(f"{path}/{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_processes_that_disagree_and_those_that_do_not(name: str, said: Any) -> None:
    expected = CASES[name][1]
    for rank in range(2):
        found = said[rank][name]
        assert [(where, severity) for where, severity, _ in found] == [(where, "error") for where, _ in expected]
        for (_, _, message), (_, words) in zip(found, expected, strict=True):
            assert words in message


def test_the_same_gradients_on_different_weights_are_copies_that_were_never_made_equal() -> None:
    own = {"0": (1.0, 0.0, 0.5, 0.0), "1": (2.0, 0.0, 0.25, 0.0)}
    [finding] = compare(3, own, {1: own | {"0": (1.5, 0.0, 0.5, 1.0)}}, 0, copies=False)
    assert isinstance(finding, Finding) and finding.where == "0" and "broadcast" in finding.remedy
    assert compare(3, own, {1: own}, 0, copies=True) == []
    assert compare(3, own, {1: {"other": (1.0, 1.0, 1.0, 1.0)}}, 0, copies=True) == []
    bad = {"0": (math.nan, math.nan, 1.0, 0.0)}
    assert compare(3, bad, {1: dict(bad)}, 0, copies=True) == []
