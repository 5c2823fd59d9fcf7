"""The fused model: absent modalities, both modes of differentiation, readable names, plain layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from hesse.multimodal.model import FusedModel

# torch itself warns so when forward mode is first used in a process
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

SETTINGS: dict[str, dict[str, Any]] = {
    "image_photo": {
        "kind": "image",
        "height": 12,
        "width": 9,
        "channels": 3,
        "mean": [120.0] * 3,
        "std": [60.0] * 3,
    },
    "audio_Klang": {"kind": "audio", "rate": 8000, "samples": 900, "mean": [-8.0] * 32, "std": 3.0},
    "text_имя": {"kind": "text", "length": 7, "alphabet": "abcde"},
    "columns": {"kind": "columns", "numbers": 3, "categories": [4, 5]},
}
ROWS = 6
Inputs = dict[str, tuple[Any, Tensor]]


def make_model(dtype: torch.dtype = torch.float32, outputs: int = 4) -> FusedModel:
    torch.manual_seed(0)
    return FusedModel(SETTINGS, outputs).to(dtype)


def make_inputs(seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randn(ROWS, 3, generator=g)
    numbers[1, 2] = torch.nan
    data = {
        "image_photo": torch.randint(0, 256, (ROWS, 3, 12, 9), generator=g, dtype=torch.uint8),
        "audio_Klang": torch.randint(-9999, 9999, (ROWS, 900), generator=g, dtype=torch.int16),
        "text_имя": torch.randint(0, 7, (ROWS, 7), generator=g, dtype=torch.int16),
        "columns": (numbers, torch.randint(0, 4, (ROWS, 2), generator=g)),
    }
    rows = torch.arange(ROWS)
    return {key: (value, rows % 4 != i) for i, (key, value) in enumerate(data.items())}  # each is absent somewhere


def loss_and_gradients(model: FusedModel, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    outputs = model(**inputs)
    return outputs, list(torch.autograd.grad(outputs.square().sum(), list(model.parameters())))


def test_absent_data_influence_nothing() -> None:
    model, inputs = make_model(), make_inputs()
    outputs, gradients = loss_and_gradients(model, inputs)
    other = make_inputs(seed=1)
    for key, (data, present) in inputs.items():  # other data wherever something is absent, NaN among them
        parts = data if isinstance(data, tuple) else (data,)
        strange = other[key][0] if isinstance(other[key][0], tuple) else (other[key][0],)
        for part, replacement in zip(parts, strange, strict=True):
            part[~present] = (
                torch.full_like(part, torch.nan)[~present] if part.is_floating_point() else replacement[~present]
            )
    assert inputs["columns"][0][0][3].isnan().all()
    outputs2, gradients2 = loss_and_gradients(model, inputs)
    assert torch.equal(outputs, outputs2)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients2, strict=True))
    assert all(g.isfinite().all() for g in gradients)


def test_presence_itself_is_seen() -> None:
    model, inputs = make_model(), make_inputs()
    blank = {key: (data, torch.zeros_like(present)) for key, (data, present) in inputs.items()}
    nothing = model(**blank)
    assert torch.equal(nothing, nothing[:1].expand_as(nothing))
    with torch.no_grad():
        for encoder in model.encoders.values():  # features that are zero although present
            encoder.get_submodule("features").weight.zero_()
    everything = model(**{key: (data, torch.ones_like(present)) for key, (data, present) in inputs.items()})
    assert not torch.isclose(everything, nothing, atol=1e-4).all(1).any()


@pytest.mark.parametrize("key", list(SETTINGS))
def test_each_modality_reaches_the_output_and_learns(key: str) -> None:
    model = make_model()
    inputs = {k: (data, torch.ones(ROWS, dtype=torch.bool)) for k, (data, _) in make_inputs().items()}
    other = {**inputs, key: (make_inputs(seed=1)[key][0], inputs[key][1])}
    assert not torch.isclose(model(**inputs), model(**other)).all(1).any()
    model(**inputs).square().sum().backward()
    for name, p in model.encoders[key].named_parameters():
        assert p.grad is not None and p.grad.any(), name


def test_forward_mode_agrees_with_a_finite_difference() -> None:
    model, inputs = make_model(torch.float64), make_inputs()
    params = {name: p.detach() for name, p in model.named_parameters()}
    g = torch.Generator().manual_seed(2)
    v = {name: torch.randn(p.shape, generator=g, dtype=p.dtype) / p.numel() ** 0.5 for name, p in params.items()}

    def outputs(params: dict[str, Tensor]) -> Tensor:
        return functional_call(model, params, (), inputs)

    _, tangent = jvp(outputs, (params,), (v,))
    h = 1e-7
    ahead, behind = (outputs({name: p + sign * h * v[name] for name, p in params.items()}) for sign in (1, -1))
    assert tangent.dtype == torch.float64
    assert torch.allclose(tangent, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)


def test_second_derivatives_agree_in_both_modes_and_with_a_finite_difference() -> None:
    model, inputs = make_model(torch.float64), make_inputs()
    targets = torch.arange(ROWS) % 4
    params = {name: p.detach() for name, p in model.named_parameters()}
    g = torch.Generator().manual_seed(3)
    v = {name: torch.randn(p.shape, generator=g, dtype=p.dtype) / p.numel() ** 0.5 for name, p in params.items()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, params, (), inputs), targets)

    def slope(params: dict[str, Tensor]) -> Tensor:
        return torch.stack([(d * v[name]).sum() for name, d in grad(loss)(params).items()]).sum()

    reverse = grad(slope)(params)
    _, forward = jvp(grad(loss), (params,), (v,))
    h = 1e-6
    ahead, behind = (grad(loss)({n: p + s * h * v[n] for n, p in params.items()}) for s in (1, -1))
    for name in params:
        assert torch.allclose(forward[name], reverse[name], rtol=1e-8, atol=1e-10), name
        assert torch.allclose(forward[name], (ahead[name] - behind[name]) / (2 * h), rtol=1e-4, atol=1e-6), name


def test_layers_are_plain_and_their_names_readable() -> None:
    model = make_model()
    plain = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm)
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            assert isinstance(module, plain), name
    names = dict(model.named_parameters())
    assert {
        "encoders.image_photo.conv1.weight",
        "encoders.text_имя.embedding.weight",
        "head.0.weight",
    } <= set(names)
    assert set(model.state_dict()) == set(names)  # all else is in the settings


def test_the_same_seed_gives_the_same_bits() -> None:
    inputs = make_inputs()
    first, second = (loss_and_gradients(make_model(), inputs) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_one_output_is_a_column() -> None:
    assert make_model(outputs=1)(**make_inputs()).shape == (ROWS, 1)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="at least one modality"):
        FusedModel({}, 2)
    with pytest.raises(ValueError, match="video"):
        FusedModel({"clip": {"kind": "video"}}, 2)
    inputs = make_inputs()
    del inputs["columns"]
    with pytest.raises(ValueError, match="columns"):
        make_model()(**inputs)


def test_a_few_steps_learn_the_classes_of_a_batch() -> None:
    model, inputs = make_model(), make_inputs()
    targets = torch.arange(ROWS) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(**inputs), targets)
        loss.backward()
        optimizer.step()
    assert loss < 0.1
