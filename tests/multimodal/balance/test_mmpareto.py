"""MMPareto: the shortest combination by brute force, and what becomes of gradients that agree or do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from balanced_models import SIZES, batch, flat, loss_by_rows, make
from hesse.multimodal.balance import MMPareto
from hesse.multimodal.balance.mmpareto import shortest


@pytest.mark.parametrize("seed", range(6))
def test_the_combination_is_the_shortest_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    g, u = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 3.0])[:, None, None]
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    a = grid[((grid[:, None, None] * g + (1 - grid[:, None, None]) * u).flatten(1).norm(dim=1)).argmin()]
    assert float(shortest(g, u)) == pytest.approx(float(a), abs=1e-4)


def test_equal_gradients_have_no_shortest_combination_and_half_is_taken() -> None:
    g = torch.ones(3)
    assert float(shortest(g, g)) == 0.5


def test_gradients_that_agree_are_added() -> None:
    cure = make(MMPareto, gamma=1.5)
    g, u = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0])
    torch.testing.assert_close(cure.combine(g, u), torch.tensor([4.5, 1.5]))


@pytest.mark.parametrize("seed", range(5))
def test_gradients_that_disagree_give_a_descent_for_both_no_shorter_than_their_sum(seed: int) -> None:
    cure = make(MMPareto, gamma=1.0)
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(6, generator=generator)
    u = torch.randn(6, generator=generator) - 2 * g
    h = cure.combine(g, u)
    assert float(g @ u) < 0
    assert float(h @ g) > -1e-4 and float(h @ u) > -1e-4
    assert float(h.norm()) >= (1 - 1e-5) * float((g + u).norm())
    a = float(shortest(g, u))
    direction = a * g + (1 - a) * u
    torch.testing.assert_close(h / h.norm(), direction / direction.norm())


def test_a_combination_that_is_longer_than_the_sum_is_not_shortened() -> None:
    cure = make(MMPareto, gamma=1.0)
    g, u = torch.tensor([1.0, 0.2]), torch.tensor([-1.0, 0.2])
    a = float(shortest(g, u))
    torch.testing.assert_close(cure.combine(g, u), 2 * a * g + 2 * (1 - a) * u)


@pytest.mark.parametrize("absent", [False, True], ids=["all present", "some absent"])
def test_towers_get_what_is_combined_at_their_features_by_hand(absent: bool) -> None:
    conflicts = 0
    for seed in range(8):
        cure = make(MMPareto, seed=seed)
        inputs, targets = batch(absent=absent, seed=seed)
        features = cure.model.features(**inputs)
        fused = F.cross_entropy(cure.model.fuse(features, {k: here for k, (_, here) in inputs.items()}), targets)
        wanted = {}
        for key in SIZES:
            here = inputs[key][1]
            own = here.double().mean() * loss_by_rows(cure.heads[key](features[key]), targets, here)
            (g,) = torch.autograd.grad(fused, features[key], retain_graph=True)
            (u,) = torch.autograd.grad(own, features[key], retain_graph=True)
            agree = float((g * u).sum()) >= 0
            conflicts += not agree
            a = 0.5 if agree else float(shortest(g, u))
            h = 2 * a * g + 2 * (1 - a) * u
            h = 1.5 * max(1.0, float((g + u).norm() / h.norm())) * h
            wanted[key] = torch.autograd.grad(
                features[key], list(cure.model.encoders[key].parameters()), h, retain_graph=True
            )
        cure.loss(F.cross_entropy)(cure(**inputs), targets).backward()
        for key in SIZES:
            found = flat(p.grad for p in cure.model.encoders[key].parameters())
            torch.testing.assert_close(found, flat(wanted[key]))
    assert conflicts >= 2


def test_curvature_sampled_from_the_same_graph_is_plain() -> None:
    cure = make(MMPareto)
    inputs, targets = batch()
    outputs = cure(**inputs)
    params = list(cure.model.encoders["image"].parameters())
    wanted = torch.autograd.grad(outputs.square().sum(), params, retain_graph=True)
    loss = cure.loss(F.cross_entropy)(outputs, targets)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(outputs.square().sum(), params), wanted)
