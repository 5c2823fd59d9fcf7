"""The loss's noise and fall, and how gradients turn, against cases known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from health_runs.made import made
from hesse.health.rules.progress import coherence, fall, kept, noise, rising, told, turn, turns


def test_noise_is_the_standard_deviation_about_a_trend() -> None:
    generator = torch.Generator().manual_seed(0)
    scatter = 0.3 * torch.randn(40_000, generator=generator)
    values = (5 - 0.001 * torch.arange(40_000) + scatter).tolist()
    assert noise(values) == pytest.approx(0.3, rel=0.02)
    assert noise([1.0]) == 0.0


def test_fall_counts_in_standard_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(300, generator=generator)
    assert abs(fall(flat.tolist())[1]) < 3
    down, errors = fall((flat - 0.01 * torch.arange(300)).tolist())
    assert down == pytest.approx(2.0, abs=0.3) and errors > 10
    assert fall([1.0, 1.0, 1.0]) == (0.0, 0.0)
    assert fall([3.0, 2.0]) == (1.0, pytest.approx(1.0 / (noise([3.0, 2.0]) * math.sqrt(2))))


def test_told_prefers_every_step_and_leaves_out_what_is_not_finite() -> None:
    assert told(made(3, loss=2.0))[0] == [1, 11, 21]
    assert told(made(3, loss=2.0, told=[1.0, math.nan, 3.0])) == ([1, 3], [1.0, 3.0])
    assert told(made(2, loss=None)) == ([], [])


def test_whole_turn_and_coherence_are_those_of_the_gradient_of_all_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(3, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    lr, weight = 0.01, 10.0
    slopes, left = -lr * old.square().sum(1), -lr * (new * old).sum(1)

    def of(values: torch.Tensor) -> dict[str, float]:
        return dict(zip(("first", "middle", "last"), values.tolist(), strict=True))

    norms, ratios = of(old.norm(dim=1)), of(lr * old.norm(dim=1) / weight)
    angles, parts = of(torch.cosine_similarity(old, new, dim=1)), of(left / slopes)
    numbers = {f"{k}_grad_norm": v for k, v in norms.items()} | {f"{k}_update_ratio": v for k, v in ratios.items()}
    before = made(1, **numbers).records[0]
    sizes = {f"{k}_grad_norm": v for k, v in of(new.norm(dim=1)).items()}
    now = made(1, **sizes, **{f"{k}_coherence": v for k, v in angles.items()}).records[0]
    assert coherence(before, now) == pytest.approx(float((old * new).sum() / old.norm() / new.norm()))
    turned = made(1, **numbers, **{f"{k}_turn": v for k, v in parts.items()}).records[0]
    assert turn(turned) == pytest.approx(float(left.sum() / slopes.sum()))
    assert turn(turned | {"turn": -3.0}) == -3.0
    assert coherence(before, now | {"coherence": 0.25}) == 0.25
    assert turn(made(1, turn=None).records[0]) is None


def test_turns_are_the_last_ones() -> None:
    assert turns(made(9, turn=lambda i: float(i)), 3) == pytest.approx([6.0, 7.0, 8.0])


def test_kept_is_the_middle_layers_share_and_zero_when_gradients_are_gone() -> None:
    assert kept(made(20)) == 1.0
    assert kept(made(20, first_grad_norm=lambda i: 0.0 if i > 10 else 1.0)) == 1.0
    assert kept(made(20, grad_norm=lambda i: 0.0 if i > 10 else 1.0)) == 0.0


def test_rising_learning_rates() -> None:
    assert rising(made(10, lr=lambda i: 0.1 * i))
    assert not rising(made(10)) and not rising(made(10, lr=None))
