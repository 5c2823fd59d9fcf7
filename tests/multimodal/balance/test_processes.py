"""Cures in DistributedDataParallel: two processes with half the rows each take the steps of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import hesse
from balanced_models import batch, make
from hesse.multimodal.balance import OGMGE, PMR, GBlend, Heads, MMPareto, Pool
from processes import in_processes

# torch itself warns so when forward mode is first used in a process
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

CURES: dict[str, Any] = {"heads": Heads, "gblend": GBlend, "pool": Pool}  # their steps depend on no single batch
BY_BATCH: dict[str, Any] = {"ogm_ge": OGMGE, "mmpareto": MMPareto, "pmr": PMR}
ROWS, STEPS = 24, 3


def steps(cls: Any, optimizer: str, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """Weights after a few steps on this process's part of the rows."""
    cure = make(cls)
    inputs, targets = batch(ROWS)
    cure.begin_epoch(F.cross_entropy, [(inputs, targets)], [batch(ROWS, seed=1)])
    model = DistributedDataParallel(cure) if size > 1 else cure
    part = {key: (x.chunk(size)[rank], here.chunk(size)[rank]) for key, (x, here) in inputs.items()}
    taken: Any = hesse.optim.KFAC(model) if optimizer == "kfac" else torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = cure.loss(F.cross_entropy)
    torch.manual_seed(rank)
    for _ in range(STEPS):
        taken.step(hesse.closure(model, loss_fn, (part, targets.chunk(size)[rank])))
    return {name: p.detach().clone() for name, p in cure.named_parameters()}


def run(rank: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: steps(cls, "sgd", rank, size) for name, cls in {**CURES, **BY_BATCH}.items()}
    return {**found, "pool, kfac": steps(Pool, "kfac", rank, size)}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_processes(run, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CURES)
def test_two_processes_take_the_steps_of_one(name: str, together: list[dict[str, Any]]) -> None:
    alone = steps(CURES[name], "sgd")
    for found in together:
        torch.testing.assert_close(found[name], alone)


@pytest.mark.parametrize("name", [*BY_BATCH, "pool, kfac"])
def test_two_processes_stay_together(name: str, together: list[dict[str, Any]]) -> None:
    for key, p in together[0][name].items():
        assert torch.equal(p, together[1][name][key]), key
        assert bool(p.isfinite().all())
