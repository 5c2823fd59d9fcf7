"""The whole model where modalities are missing: in a row, in all rows of a batch, and all of them at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hesse
from hesse.multimodal.fusion import FUSIONS
from hesse.multimodal.model import FusedModel
from hesse.optim import KFAC

SETTINGS: dict[str, dict[str, Any]] = {
    "image_p": {"kind": "image", "height": 8, "width": 8, "channels": 1, "mean": [90.0], "std": [50.0]},
    "text_t": {"kind": "text", "length": 5, "alphabet": "abc"},
    "columns": {"kind": "columns", "numbers": 2, "categories": [4]},
}
ROWS, OUTPUTS = 8, 3
PRIOR = [-0.2, -2.0, -3.0]
Inputs = dict[str, tuple[Any, Tensor]]


def make_model(fusion: str, prior: list[float] | None = None) -> FusedModel:
    torch.manual_seed(0)
    return FusedModel(SETTINGS, OUTPUTS, fusion, prior=prior)


def make_inputs(seed: int = 0) -> Inputs:
    """Every subset of the modalities: one a row."""
    g = torch.Generator().manual_seed(seed)
    data = {
        "image_p": torch.randint(0, 256, (ROWS, 1, 8, 8), generator=g, dtype=torch.uint8),
        "text_t": torch.randint(0, 5, (ROWS, 5), generator=g, dtype=torch.int16),
        "columns": (torch.randn(ROWS, 2, generator=g), torch.randint(0, 4, (ROWS, 1), generator=g)),
    }
    return {key: (value, torch.arange(ROWS) & (1 << i) > 0) for i, (key, value) in enumerate(data.items())}


def step(model: FusedModel, inputs: Inputs) -> float:
    targets = torch.arange(ROWS) % OUTPUTS
    return float(KFAC(model).step(hesse.closure(model, F.cross_entropy, (model.prepare(inputs), targets))))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_other_data_where_something_is_absent_give_the_same_step(fusion: str) -> None:
    inputs, other = make_inputs(), make_inputs(seed=1)
    mixed: Inputs = {}
    for key, (data, here) in inputs.items():
        pairs = zip(data, other[key][0], strict=True) if isinstance(data, tuple) else [(data, other[key][0])]
        parts = [torch.where(here.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs]
        mixed[key] = (tuple(parts) if isinstance(data, tuple) else parts[0]), here
    assert not torch.equal(mixed["image_p"][0], inputs["image_p"][0])
    one, two = make_model(fusion), make_model(fusion)
    assert step(one, inputs) == step(two, mixed)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("key", list(SETTINGS))
def test_a_modality_that_no_row_of_a_batch_has_is_not_moved_by_it(key: str, fusion: str) -> None:
    model, inputs = make_model(fusion), make_inputs()
    inputs[key] = inputs[key][0], torch.zeros(ROWS, dtype=torch.bool)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, inputs)
    for name, p in model.named_parameters():
        assert p.isfinite().all()
        if name.startswith(f"encoders.{key}."):
            assert torch.equal(p, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_row_with_nothing_has_the_prior_and_no_gradient(fusion: str) -> None:
    model, inputs = make_model(fusion, PRIOR), make_inputs()
    out = model(**inputs)
    assert out[0].tolist() == pytest.approx(PRIOR)
    assert torch.equal(out[1:], make_model(fusion)(**inputs)[1:])
    slopes = torch.autograd.grad(out[0].sum(), list(model.parameters()), allow_unused=True, retain_graph=True)
    assert all(slope is None or not slope.any() for slope in slopes)
    assert set(model.state_dict()) == set(make_model(fusion).state_dict())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_batch_of_nothing_at_all_is_survived(fusion: str) -> None:
    nothing = {key: (data, torch.zeros(ROWS, dtype=torch.bool)) for key, (data, _) in make_inputs().items()}
    model = make_model(fusion, PRIOR)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, nothing)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_prior_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="prior has 3 numbers, and the output is 2 wide"):
        FusedModel(SETTINGS, 2, prior=PRIOR)
    with pytest.raises(ValueError, match="no fusion 'early'"):
        FusedModel(SETTINGS, 2, "early")
    with pytest.raises(ValueError, match="not 2 wide"):
        FusedModel(SETTINGS, 2, answers=[("classification", 3)])
