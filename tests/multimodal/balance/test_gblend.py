"""G-Blend: weights by the closed form, measured losses, what happens when nothing is gained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from balanced_models import batch, loss_by_rows, make
from hesse.multimodal.balance import GBlend
from hesse.multimodal.balance.gblend import blend


def test_weights_are_gain_by_squared_overfitting() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = 3 + torch.rand(2, 3, generator=generator), 2 + torch.rand(2, 3, generator=generator)
    wanted = []
    for k in range(3):
        gain = float(before[1, k] - after[1, k])
        overfit = float(after[1, k] - after[0, k]) - float(before[1, k] - before[0, k])
        wanted.append(gain / overfit**2)
    assert blend(before, after).tolist() == pytest.approx([w / sum(wanted) for w in wanted], rel=1e-4)


def test_the_weights_minimise_overfitting_of_a_given_gain() -> None:
    """Of all blends of three independent steps with the same total gain the one with the least mean square excess."""
    gain, overfit = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([1.0, 0.2, 0.3])
    before = torch.stack([torch.zeros(3), gain])
    w = blend(before, torch.stack([-overfit, torch.zeros(3)]) + torch.stack([-gain, torch.zeros(3)]))
    best = float((w * overfit).square().sum() / (w @ gain) ** 2)
    for _ in range(200):
        other = torch.rand(3)
        assert float((other * overfit).square().sum() / (other @ gain) ** 2) >= best - 1e-6


def test_what_gains_nothing_has_no_weight() -> None:
    w = blend(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.5, 0.5], [0.8, 1.1]]))
    assert w.tolist() == [1.0, 0.0]
    assert blend(torch.ones(2, 2), torch.full((2, 2), 2.0)).tolist() == [0.0, 0.0]


def test_an_overfitting_of_zero_explodes_nothing() -> None:
    w = blend(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.6]]))
    assert bool(w.isfinite().all())
    assert float(w.sum()) == pytest.approx(1)
    assert float(w[0]) > 0.99


def test_losses_are_measured_on_both_kinds_of_rows_and_weights_follow() -> None:
    cure = make(GBlend)
    train, valid = [batch(absent=True), batch(7, seed=2)], [batch(absent=True, seed=1)]
    cure.begin_epoch(F.cross_entropy, train, valid)
    assert cure.weights.tolist() == pytest.approx([1 / 3] * 3)
    wanted = 0.0
    for inputs, targets in train:
        own = cure.heads["audio"](cure.model.features(**inputs)["audio"])
        n = int(inputs["audio"][1].sum())
        wanted += n * float(loss_by_rows(own, targets, inputs["audio"][1]).detach())
    total = sum(int(inputs["audio"][1].sum()) for inputs, _ in train)
    assert float(cure.before[0, 2]) == pytest.approx(wanted / total)
    assert cure.training

    optimizer = torch.optim.SGD(cure.parameters(), lr=0.5)
    inputs, targets = train[0]
    before = cure.before.clone()
    for _ in range(10):
        optimizer.zero_grad()
        cure.loss(F.cross_entropy)(cure(**inputs), targets).backward()
        optimizer.step()
    cure.begin_epoch(F.cross_entropy, train, valid)
    assert cure.weights.tolist() == pytest.approx(blend(before, cure.before).tolist())


def test_a_super_epoch_is_several() -> None:
    cure = make(GBlend, every=2)
    rows = [batch()], [batch(seed=1)]
    cure.begin_epoch(F.cross_entropy, *rows)
    measured = cure.before.clone()
    with torch.no_grad():
        for p in cure.parameters():
            p.mul_(0.9)
    cure.begin_epoch(F.cross_entropy, *rows)
    assert torch.equal(cure.before, measured)
    cure.begin_epoch(F.cross_entropy, *rows)
    assert not torch.equal(cure.before, measured)
