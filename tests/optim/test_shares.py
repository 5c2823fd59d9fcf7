"""A draw that several processes share is the whole batch's, whatever the targets are."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.curvature.losses.several import Part, several_losses
from hesse.curvature.output import output_curvature
from hesse.objective import closure
from hesse.objective.replicas import Replicas
from hesse.optim.shares import draw

N, WIDTH = 6, 4


class Half(Replicas):
    """One of two processes, which knows what the other has."""

    def __init__(self, rank: int, whole: list[Tensor]) -> None:
        super().__init__()
        self.rank, self.size, self.whole = rank, 2, whole

    def gather(self, x: Tensor) -> Tensor:
        return next(each for each in self.whole if each.chunk(2)[self.rank].equal(x) and each.dtype == x.dtype)

    def same(self, thing: object) -> bool:
        return not isinstance(thing, str)


PARTS = (Part(F.cross_entropy, 3), Part(F.mse_loss, 1, 2.0))
CASES = {
    "one target": (F.cross_entropy, torch.tensor([0, 3, 1, 2, 2, 1])),
    "several targets": (
        functools.partial(several_losses, parts=PARTS),
        (torch.tensor([0, 1, -100, 2, 2, -100]), torch.arange(6.0)[:, None].double()),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_halves_of_a_draw_are_the_draw_of_the_whole(name: str) -> None:
    loss_fn, targets = CASES[name]
    torch.manual_seed(0)
    outputs = torch.randn(N, WIDTH, dtype=torch.float64)
    every: tuple[Any, ...] = targets if isinstance(targets, tuple) else (targets,)
    expected = output_curvature(loss_fn, outputs, targets).draw(torch.Generator().manual_seed(3))
    found = []
    for rank in range(2):
        own = tuple(each.chunk(2)[rank] for each in every)
        objective = closure(nn.Identity(), loss_fn, (outputs.chunk(2)[rank], own if len(own) > 1 else own[0])).objective
        objective.replicas = Half(rank, [outputs, *every])
        here = outputs.chunk(2)[rank]
        found.append(draw(objective, here, output_curvature(loss_fn, here, objective.targets), 3))
    assert torch.cat(found).equal(expected)
