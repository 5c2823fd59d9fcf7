"""Columns: missing numbers, unseen categories, outliers."""

from __future__ import annotations

import pytest
import torch

from hesse.multimodal.encoders import FEATURES, columns


def make(numbers: int, categories: list[int]) -> columns.Encoder:
    torch.manual_seed(0)
    return columns.Encoder({"numbers": numbers, "categories": categories})


@pytest.mark.parametrize(("numbers", "categories"), [(3, [4, 200]), (3, []), (0, [2])])
def test_any_mixture(numbers: int, categories: list[int]) -> None:
    codes = (
        torch.stack([torch.randint(0, c, (64,)) for c in categories], 1) if categories else torch.zeros(64, 0).long()
    )
    features = make(numbers, categories)((torch.randn(64, numbers), codes))
    assert features.shape == (64, FEATURES)
    assert 0.3 < features.square().mean().sqrt() < 3


def test_a_missing_number_starts_as_the_mean_and_can_be_learnt() -> None:
    encoder = make(2, [])
    none = torch.zeros(1, 0, dtype=torch.int64)
    missing = encoder((torch.tensor([[0.5, float("nan")]]), none))
    assert torch.equal(missing, encoder((torch.tensor([[0.5, 0.0]]), none)))
    missing.sum().backward()
    assert encoder.hidden.weight.grad is not None
    assert encoder.hidden.weight.grad.isfinite().all()
    flags = encoder.hidden.weight.grad[:, 2:4]
    assert flags[:, 1].any() and not flags[:, 0].any()


def test_an_unseen_category_starts_without_effect_and_can_be_learnt() -> None:
    encoder = make(0, [3])
    encoder((torch.zeros(1, 0), torch.tensor([[0]]))).sum().backward()
    (embedding,) = encoder.embeddings
    assert not embedding.weight[0].any()
    encoder.hidden.bias.data += 0.1
    encoder((torch.zeros(1, 0), torch.tensor([[0]]))).sum().backward()
    assert embedding.weight.grad[0].any()


def test_outliers_are_bounded() -> None:
    encoder = make(1, [])
    none = torch.zeros(3, 0, dtype=torch.int64)
    features = encoder((torch.tensor([[10.0], [1e30], [float("inf")]]), none))
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[2])
