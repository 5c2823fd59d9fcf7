"""Entropy of attention against the plain softmax of all scores."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.health.sensors import SENSORS
from hesse.health.sensors.attention import Attention, sharpness
from hesse.health.sensors.functional import Calls
from hesse.health.stats import find_layers


def sensed(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, dict[str, Tensor]]:
    calls = Calls(model)
    sensor = Attention(model, [], calls)
    calls.listen()
    sensor.listen()
    model(*args, **kwargs)
    calls.rest()
    sensor.rest()
    return sensor.read()


def plainly(scores: Tensor) -> tuple[float, float, float]:
    """Row by row."""
    entropies, shares, largest = [], [], 0.0
    for row in scores.reshape(-1, scores.shape[-1]).tolist():
        seen = [s for s in row if s > -1e4]
        if not seen:
            continue
        largest = max(largest, *map(abs, seen))
        if len(seen) > 1:
            p = torch.tensor(seen, dtype=torch.float64).softmax(0)
            entropies.append(-(p * p.clamp_min(1e-300).log()).sum().item() / log(len(seen)))
            shares.append(p.max().item())
    return sum(entropies) / len(entropies), sum(shares) / len(shares), largest


def agree(reading: dict[str, Tensor], scores: Tensor) -> None:
    for key, value in zip(("entropy", "share", "logits"), plainly(scores), strict=True):
        assert reading[key].item() == pytest.approx(value, rel=1e-4), key


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.f = f

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.f(*args, **kwargs)


MASKS = {
    "none": None,
    "boolean": torch.ones(5, 7, dtype=torch.bool).tril(2),
    "additive": torch.zeros(5, 7).masked_fill(torch.ones(5, 7).triu(3) > 0, -1e9),
    "per row": torch.rand(2, 1, 1, 7, generator=torch.Generator().manual_seed(0)) > 0.3,
}


@pytest.mark.parametrize("mask", MASKS)
def test_scaled_dot_product(mask: str) -> None:
    torch.manual_seed(0)
    q, k = 3 * torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    scores = q @ k.mT / 2
    m = MASKS[mask]
    if m is not None:
        scores = scores.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else scores + m
    reading = sensed(Call(F.scaled_dot_product_attention), q, k, k, m)
    agree(reading["Call.scaled_dot_product_attention"], scores)


def test_causal_scaled_and_grouped() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    future = torch.ones(6, 6).triu(1) > 0
    reading = sensed(Call(F.scaled_dot_product_attention), q, k, k, is_causal=True, scale=2.0, enable_gqa=True)
    scores = (2 * q @ k.repeat_interleave(2, 1).mT).masked_fill(future, -torch.inf)
    agree(reading["Call.scaled_dot_product_attention"], scores)
    single = sensed(Call(F.scaled_dot_product_attention), q[0, 0], k[0, 0], k[0, 0])
    agree(single["Call.scaled_dot_product_attention"], q[0, 0] @ k[0, 0].T / 8**0.5)


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("separate", [True, False], ids=["separate", "packed"])
@pytest.mark.parametrize("masked", ["none", "padding", "attention", "both", "per head"])
def test_multi_head_attention(weights: bool, separate: bool, masked: str) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6 if separate else None, vdim=6 if separate else None)
    nn.init.normal_(model.in_proj_bias)
    q, k = torch.randn(3, 4, 8), torch.randn(3, 5, 6 if separate else 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [True] + [False] * 4])
    mask = torch.ones(4, 5).triu(2) > 0
    given: dict[str, Any] = {}
    if masked in ("padding", "both"):
        given["key_padding_mask"] = padding
    if masked in ("attention", "both"):
        given["attn_mask"] = mask
    if masked == "per head":
        given["attn_mask"] = torch.rand(6, 4, 5) > 0.7
    reading = sensed(model, q, k, k, need_weights=weights, **given)["MultiheadAttention"]
    _, p = model(q, k, k, need_weights=True, average_attn_weights=False, **given)
    count = (p > 0).sum(-1)
    entropy = (torch.special.entr(p).sum(-1) / count.log())[count > 1].mean()
    assert torch.allclose(reading["entropy"], entropy, rtol=1e-4)
    assert torch.allclose(reading["share"], p.amax(-1)[count > 1].mean(), rtol=1e-4)


def test_the_size_of_multi_head_scores() -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    nn.init.normal_(model.in_proj_bias, std=3.0)
    q, k, _ = (
        part.unflatten(-1, (2, 4)) for part in F.linear(x, model.in_proj_weight, model.in_proj_bias).chunk(3, -1)
    )
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) / 2
    assert torch.allclose(sensed(model, x, x, x)["MultiheadAttention"]["logits"], scores.abs().max())


def test_encoder_layers_are_seen_in_training() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    reading = sensed(model, torch.randn(3, 5, 8))
    assert list(reading) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(0.5 < keys["entropy"] <= 1 for keys in reading.values())


def test_handwritten_attention() -> None:
    torch.manual_seed(0)
    scores = 5 * torch.randn(2, 3, 5, 5)
    causal = scores.masked_fill(torch.ones(5, 5).triu(1) > 0, torch.finfo(torch.float32).min)
    for f in (lambda s: s.softmax(-1), lambda s: torch.softmax(s, 3), lambda s: F.softmax(s, dim=-1)):
        agree(sensed(Call(f), causal)["Call.softmax"], causal)
    agree(sensed(Call(lambda s: s.softmax(-1)), scores[0])["Call.softmax"], scores[0])


@pytest.mark.parametrize("shape", [(8, 5), (8, 6, 5)], ids=["classes", "classes of tokens"])
def test_a_softmax_over_classes_is_not_attention(shape: tuple[int, ...]) -> None:
    assert sensed(Call(lambda s: s.softmax(-1)), torch.randn(shape)) == {}


def test_large_attention_is_sampled_well() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(4, 8, 300, 16), torch.randn(4, 8, 300, 16)
    reading = sensed(Call(F.scaled_dot_product_attention), q, k, k)["Call.scaled_dot_product_attention"]
    entropy, share, _ = plainly(q[:, :2, :100] @ k[:, :2].mT / 4)
    assert reading["entropy"].item() == pytest.approx(entropy, rel=0.02)
    assert reading["share"].item() == pytest.approx(share, rel=0.1)


def test_heads_of_different_sharpness_all_count() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(16, 8, 6, 4) * torch.linspace(0, 50, 8)[:, None, None], torch.randn(16, 8, 6, 4)
    reading = sensed(Call(F.scaled_dot_product_attention), q, k, k)["Call.scaled_dot_product_attention"]
    assert reading["entropy"].item() == pytest.approx(plainly(q @ k.mT / 2)[0], abs=0.03)


def test_rows_without_keys_and_with_one_are_left_aside() -> None:
    scores = torch.tensor([[0.0, -torch.inf, -torch.inf], [-torch.inf] * 3, [1.0, 1.0, -torch.inf]])
    entropy, share, logits = sharpness(scores)
    assert (entropy, share, logits) == (1.0, 0.5, 1.0)
    assert sharpness(scores[:2])[0].isnan()


def test_a_path_is_not_numbered_because_other_sensors_name_it_too() -> None:
    model = nn.MultiheadAttention(4, 2)
    calls = Calls(model)
    sensors = [make(model, find_layers(model), calls) for make in SENSORS]
    calls.listen()
    x = torch.randn(3, 2, 4)
    calls.rest((x, x, x), model(x, x, x))
    for sensor in sensors:
        sensor.rest()
    assert set().union(*(sensor.read() for sensor in sensors)) == {"MultiheadAttention"}
