"""OGM-GE: the paper's coefficients, gradients scaled by hand, noise of the right covariance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import hesse
from balanced_models import SIZES, THREE, batch, flat, make, tower_grads
from hesse.multimodal.balance import OGMGE


def coefficients(cure: OGMGE, inputs: Any, targets: Any) -> dict[str, float]:
    """As the paper has them, for one linear layer on concatenated modalities."""
    layer: Any = cure.model.head
    features = cure.model.features(**inputs)  # type: ignore[operator]
    scores, begin = {}, 0
    for key, f in features.items():
        part = layer.weight[:, begin : begin + f.shape[1]]
        begin += f.shape[1]
        probabilities = (f @ part.T + layer.bias / len(features)).softmax(1)
        present = inputs[key][1]
        right = [float(probabilities[i, t].detach()) for i, t in enumerate(targets.tolist()) if present[i]]
        scores[key] = sum(right) / len(right)
    found = {}
    for key, s in scores.items():
        others = [x for other, x in scores.items() if other != key]
        ratio = s / (sum(others) / len(others))
        found[key] = 1 - math.tanh(cure.alpha * ratio) if ratio > 1 else 1.0
    return found


@pytest.mark.parametrize("absent", [False, True], ids=["all present", "some absent"])
@pytest.mark.parametrize("sizes", [SIZES, THREE], ids=["two", "three"])
def test_gradients_are_those_scaled_by_hand(sizes: dict[str, int], absent: bool) -> None:
    cure = make(OGMGE, sizes, hidden=None, enhance=False)
    inputs, targets = batch(sizes=sizes, absent=absent)
    k = coefficients(cure, inputs, targets)
    assert min(k.values()) < 1 and max(k.values()) == 1
    plain = F.cross_entropy(cure.model(**inputs), targets)
    wanted = {key: [k[key] * g for g in tower_grads(cure.model, plain, key)] for key in sizes}
    head = torch.autograd.grad(plain, list(cure.model.head.parameters()))
    cure.loss(F.cross_entropy)(cure(**inputs), targets).backward()
    for key in sizes:
        torch.testing.assert_close([p.grad for p in cure.model.encoders[key].parameters()], wanted[key])
    torch.testing.assert_close([p.grad for p in cure.model.head.parameters()], list(head))
    assert cure.factors.tolist() == pytest.approx([k[key] for key in sizes], rel=1e-6)


def test_the_noise_has_the_covariance_of_the_batch_gradient() -> None:
    cure = make(OGMGE, hidden=None)
    inputs, targets = batch(8)
    layer = cure.model.encoders["image"][0]
    rows = []
    for i in range(8):
        one = {key: (x[i : i + 1], here[i : i + 1]) for key, (x, here) in inputs.items()}
        loss = F.cross_entropy(cure.model(**one), targets[i : i + 1])
        rows.append(torch.autograd.grad(loss, layer.bias)[0] / 8)
    by_row = torch.stack(rows)
    spread = by_row - by_row.mean(0)
    torch.manual_seed(0)
    drawn = []
    for _ in range(2000):
        loss = cure.loss(F.cross_entropy)(cure(**inputs), targets)
        drawn.append(torch.autograd.grad(loss, layer.bias)[0])
    found = torch.stack(drawn)
    k = float(cure.factors[0])
    deviation = spread.square().sum(0).sqrt()
    assert k < 1
    assert bool(((found.mean(0) - k * by_row.sum(0)).abs() < 5 * deviation / 2000**0.5).all())
    torch.testing.assert_close(found.T.cov(), spread.T @ spread, rtol=0.1, atol=0.15 * float(deviation.max()) ** 2)


def test_curvature_sampled_from_the_same_graph_is_not_scaled() -> None:
    """The factors of K-FAC are made after the gradient: scaled too, they would take the scale out again."""
    cure = make(OGMGE, enhance=False)
    inputs, targets = batch()
    outputs = cure(**inputs)
    params = list(cure.model.encoders["image"].parameters())
    r = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.autograd.grad(outputs, params, r, retain_graph=True)
    loss = cure.loss(F.cross_entropy)(outputs, targets)
    scaled = torch.autograd.grad(loss, params, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(outputs, params, r, retain_graph=True), wanted)
    plain = torch.autograd.grad(F.cross_entropy(cure.model(**inputs), targets), params)
    assert float(cure.factors[0]) < 1
    torch.testing.assert_close(flat(scaled), float(cure.factors[0]) * flat(plain))


def test_a_gradient_that_stopped_at_the_head_changes_nothing_later() -> None:
    cure = make(OGMGE, enhance=False)
    inputs, targets = batch()
    loss = cure.loss(F.cross_entropy)(cure(**inputs), targets)
    torch.autograd.grad(loss, list(cure.model.head.parameters()))
    assert float(cure.factors[0]) < 1
    params = list(cure.model.encoders["image"].parameters())
    found = torch.autograd.grad(cure(**inputs)[:, :4].sum(), params)
    torch.testing.assert_close(found, torch.autograd.grad(cure.model(**inputs).sum(), params))


def test_kfac_slows_the_leading_tower() -> None:
    moved = {}
    for alpha in (1e-9, 3.0):
        cure = make(OGMGE, enhance=False, alpha=alpha)
        inputs, targets = batch(40, seed=1)
        before = flat(p.detach().clone() for p in cure.model.encoders["image"].parameters())
        # One coefficient for the first step: damping and length are found together for all.
        optimizer = hesse.optim.KFAC(cure, lr=0.1, momentum=0.0, damping=1.0)
        optimizer.step(hesse.closure(cure, cure.loss(F.cross_entropy), (inputs, targets)))
        moved[alpha] = float((flat(p.detach() for p in cure.model.encoders["image"].parameters()) - before).norm())
        moved[-alpha] = float(cure.factors[0])
    assert moved[3.0] / moved[1e-9] == pytest.approx(moved[-3.0] / moved[-1e-9], rel=0.2)
    assert moved[-3.0] < 0.1
