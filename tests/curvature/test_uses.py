"""Uses of parameters: all are seen, and a parameter that is also used in another way is never half covered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hesse.curvature.layers import rows_of
from hesse.curvature.uses import Coverage, Use, coverage, output_gradients, watch_uses
from problems import FreeParameter, Recurrent, SelfAttention, Unused, mlp


def watch(model: nn.Module, *args: Any) -> tuple[list[Use], Coverage, Tensor]:
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with watch_uses(params) as uses:
        outputs = model(*args)
    return uses, coverage(uses, params, outputs), outputs


def names(uses: list[Use]) -> list[tuple[str | None, str | None]]:
    return [(use.weight, use.bias) for use in uses]


def test_each_call_is_a_use_in_the_order_of_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.first(x)))

    uses, found, _ = watch(Twice(), torch.zeros(2, 4))
    assert names(uses) == [("first.weight", "first.bias")] * 2 + [("first.weight", "second.bias")]
    assert found == ({"first.weight", "first.bias", "second.bias"}, set())


def test_a_use_has_the_input_and_the_gradient_of_the_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Conv1d(1, 2, 2))
    x = torch.randn(5, 1, 3)
    uses, _, outputs = watch(model, x)
    hidden = model[0](x)
    r = torch.randn_like(outputs)
    (expected,) = torch.autograd.grad(model[2](model[1](hidden)), hidden, r)
    grads = output_gradients(uses, outputs, r)
    assert torch.equal(uses[0].x, x)
    assert torch.equal(uses[1].x, hidden.tanh())
    assert not any(use.x.requires_grad for use in uses)
    torch.testing.assert_close(grads[0], expected)
    assert torch.equal(grads[1], r)
    assert [use.shape for use in uses] == [hidden.shape, outputs.shape]
    assert uses[1].options["stride"] == (1,)


def test_functional_calls_and_exchanged_parameters_are_seen() -> None:
    model = mlp()
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with watch_uses(params) as uses:
        outputs = functional_call(model, params, (torch.zeros(2, 5),))
    assert names(uses) == [("0.weight", "0.bias"), ("2.weight", "2.bias")]
    assert coverage(uses, params, outputs).known == set(params)
    with watch_uses(dict(model.named_parameters())) as uses:
        functional_call(model, params, (torch.zeros(2, 5),))
    assert not uses


def test_parameters_may_be_computed_from_others() -> None:
    model = mlp()
    params = {name: 2 * p for name, p in model.named_parameters()}
    with watch_uses(params) as uses:
        outputs = functional_call(model, params, (torch.zeros(2, 5),))
    assert coverage(uses, params, outputs) == (set(params), set())
    assert coverage(uses, params, outputs @ params["2.weight"]).loose == {"2.weight"}


def test_complex_parameters_are_loose() -> None:
    _, found, _ = watch(nn.Linear(3, 2, dtype=torch.complex64), torch.ones(4, 3, dtype=torch.complex64))
    assert found == (set(), {"weight", "bias"})


def test_keyword_arguments_are_read() -> None:
    w, b, x = (nn.Parameter(torch.randn(s)) for s in ((3, 2, 2), (3,), (4, 2, 5)))
    with watch_uses({"w": w, "b": b}) as uses:
        torch.conv1d(input=x, weight=w, bias=b, dilation=2)
        F.linear(bias=b, weight=w[:, 0], input=x[..., :2])
        F.layer_norm(x.mT[..., :2], normalized_shape=(3, 2, 2)[2:], weight=None)
    assert names(uses) == [("w", "b"), (None, "b")]
    assert uses[0].options["dilation"] == 2


def test_packed_projections_say_which_part_they_use() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x[:2], x[1:])[0]

    uses, found, _ = watch(Cross(), torch.randn(3, 2, 4))
    assert [(use.rows, use.bias_rows) for use in uses[:3]] == [(slice(i, i + 4),) * 2 for i in (0, 4, 8)]
    assert uses[3].rows is None
    assert not found.loose
    uses, _, _ = watch(SelfAttention(True), torch.randn(3, 2, 8))
    assert [use.rows for use in uses] == [None, None]


def test_a_recurrent_network_uses_its_weights_at_every_step() -> None:
    uses, found, _ = watch(Recurrent(nn.LSTM), torch.randn(2, 5, 3))
    assert names(uses).count(("cell.weight_hh_l0", "cell.bias_hh_l0")) == 5
    assert names(uses).count(("cell.weight_ih_l0", "cell.bias_ih_l0")) == 1
    assert not found.loose


def test_what_the_outputs_do_not_depend_on_is_neither() -> None:
    model = Unused()
    uses, found, outputs = watch(model, torch.randn(4, 5))
    assert found == ({"used.weight", "used.bias"}, set())
    assert [g is None for g in output_gradients(uses, outputs, torch.ones_like(outputs))] == [True, False]
    assert not output_gradients([], outputs, torch.ones_like(outputs))


class Double(torch.autograd.Function):
    """An operation that the watching sees only from inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x


class Layer(nn.Module):
    def __init__(self, call: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def changed_in_place(m: nn.Linear, x: Tensor) -> Tensor:
    x = x + 1
    y = m(x)
    x.mul_(2)
    return y


# What is done with a layer's parameters, and which of them are loose for it.
LOOSE: dict[str, tuple[Callable[[nn.Linear, Tensor], Tensor], set[str]]] = {
    "a use that is known": (lambda m, x: m(x), set()),
    "by hand": (lambda m, x: x @ m.weight.T + m.bias, {"weight", "bias"}),
    "addmm": (lambda m, x: torch.addmm(m.bias, x, m.weight.t()), {"weight", "bias"}),
    "also by hand": (lambda m, x: m(x) @ m.weight, {"weight"}),
    "also the bias by hand": (lambda m, x: m(x) * m.bias, {"bias"}),
    "a penalty beside": (lambda m, x: m(x) + m.weight.square().sum(), {"weight"}),
    "the transposed weight": (lambda m, x: F.linear(m(x), m.weight.t()), {"weight"}),
    "a part of the weight": (lambda m, x: F.linear(x[:, :2], m.weight[:, :2], m.bias), {"weight"}),
    "a scaled weight": (lambda m, x: F.linear(x, 2 * m.weight, m.bias), {"weight"}),
    "as its own input": (lambda m, x: F.linear(m.weight, m.weight), {"weight"}),
    "another's input": (lambda m, x: m(x) + F.linear(m.weight, m.weight.detach(), m.bias), {"weight", "bias"}),
    "a custom function": (lambda m, x: Double.apply(x, m.weight) + m.bias, {"weight", "bias"}),
    "a custom function beside": (lambda m, x: m(x) + Double.apply(x, m.weight), {"weight"}),
    "under vmap": (lambda m, x: vmap(m)(x), {"weight", "bias"}),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.weight[:, :, None].expand(-1, -1, 3)), {"weight"}),
    "einsum": (lambda m, x: torch.einsum("bi,oi->bo", x, m.weight), {"weight"}),
    "a bias that broadcasts": (lambda m, x: F.linear(x, m.weight[:1], m.bias[:1]), {"weight", "bias"}),
    "one output": (lambda m, x: F.linear(x, m.bias), {"bias"}),
    "an embedding with a largest norm": (
        lambda m, x: F.embedding(torch.tensor([1]), m.weight, max_norm=9.0),
        {"weight"},
    ),
    "an embedding scaled by frequency": (
        lambda m, x: F.embedding(torch.tensor([1, 1]), m.weight, scale_grad_by_freq=True),
        {"weight"},
    ),
    "a sparse input": (lambda m, x: F.linear(x.to_sparse(), m.weight), {"weight"}),
    "a complex input": (lambda m, x: F.linear(x + 1j, m.weight + 0j).real + m.bias, {"weight", "bias"}),
    "the input changed in place": (changed_in_place, {"weight", "bias"}),
    "without gradients beside": (lambda m, x: m(x) + m(x).detach() * m.weight.detach(), set()),
    "a checkpoint": (lambda m, x: checkpoint(m, x, use_reentrant=False), set()),
    "called in vain beside": (lambda m, x: [m(x), m.weight * 2][0], set()),
    "changed in place afterwards": (lambda m, x: m(x[:, None]).relu_(), set()),
    "a view changed in place": (lambda m, x: m(x[:, None])[:, :, :2].mul_(2), set()),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", LOOSE)
def test_a_parameter_used_in_another_way_is_loose(name: str) -> None:
    torch.manual_seed(0)
    call, loose = LOOSE[name]
    model, x = Layer(call), torch.randn(3, 3)
    uses, found, outputs = watch(model, x)
    assert {n.removeprefix("layer.") for n in found.loose} == loose
    if "in place" in name and loose:
        return  # torch itself refuses to differentiate it
    r = torch.randn_like(outputs)
    params = dict(model.named_parameters())
    exact = torch.autograd.grad(outputs, list(params.values()), r, retain_graph=True, allow_unused=True)
    assert {n for n, g in zip(params, exact, strict=True) if g is not None} == found.known | found.loose
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for use, g in zip(uses, output_gradients(uses, outputs, r), strict=True):
        for n, rows in {} if g is None else rows_of(use, g).items():
            total[n] += rows.total().view_as(total[n])
    for n, g in zip(params, exact, strict=True):
        if n in found.known:
            torch.testing.assert_close(total[n], g)


def test_a_loose_parameter_leaves_the_others_known() -> None:
    _, found, _ = watch(FreeParameter(), torch.randn(4, 5))
    assert found == ({"linear.weight", "linear.bias"}, {"scale"})
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.PReLU(), nn.Linear(8, 3))
    _, found, _ = watch(model, torch.randn(4, 5))
    originals = {f"0.parametrizations.weight.original{i}" for i in (0, 1)}
    assert found == ({"0.bias", "2.weight", "2.bias"}, originals | {"1.weight"})


def test_bias_vectors_of_attention_are_loose_and_the_rest_is_known() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    _, found, _ = watch(Attention(), torch.randn(3, 2, 4))
    assert found.loose == {"attention.bias_k", "attention.bias_v"}


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(4, 4), nn.GRUCell(4, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_checkpoint_finds_the_same_operations_when_it_runs_them_again(layer: nn.Module) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(self.layer, x, use_reentrant=False)
            return y[0] if isinstance(y, tuple) else y

    torch.manual_seed(0)
    x = torch.randn(5, 4) if isinstance(layer, nn.GRUCell) else torch.randn(2, 5, 4)
    model = Checkpointed()
    params = dict(model.named_parameters())
    _, found, outputs = watch(model, x)
    r = torch.randn_like(outputs)
    grads = torch.autograd.grad(outputs, list(params.values()), r)
    exact = torch.autograd.grad(model(x), list(params.values()), r)
    for one, other in zip(grads, exact, strict=True):
        torch.testing.assert_close(one, other)
    inside = {name for name in params if "linear" not in name and "norm" not in name}
    assert inside <= found.loose


def test_automatic_casts_that_are_shared_are_seen_through() -> None:
    model = Layer(lambda m, x: m(m(x)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        uses, found, outputs = watch(model, torch.randn(3, 3))
        _, beside, _ = watch(Layer(lambda m, x: m(x) @ m.weight), torch.randn(3, 3))
    assert outputs.dtype == torch.bfloat16
    assert len(uses) == 2
    assert not found.loose
    assert "layer.weight" in beside.loose


def test_frozen_parameters_are_not_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Embedding(3, 3))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    uses, found, _ = watch(model[:2], torch.randn(2, 3))
    assert names(uses) == [(None, "0.bias"), ("1.weight", None)]
    assert found == ({"0.bias", "1.weight"}, set())
    with watch_uses(dict(model.named_parameters())) as uses:  # frozen ones given by mistake are left out
        model[:2](torch.randn(2, 3))
    assert names(uses) == [(None, "0.bias"), ("1.weight", None)]


def test_nothing_is_noted_without_gradients_or_after_the_context() -> None:
    model = mlp()
    params = dict(model.named_parameters())
    with watch_uses(params) as uses:
        with torch.no_grad():
            model(torch.zeros(1, 5))
        with torch.inference_mode():
            model(torch.zeros(1, 5))
    model(torch.zeros(1, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), watch_uses(params) as others:
        model(torch.zeros(1, 7))
    model(torch.zeros(1, 5))
    assert not uses
    assert not others


def test_hooks_of_modules_and_their_results_are_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.MultiheadAttention(4, 2), nn.LSTM(3, 2))
    seen: list[str] = []
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(lambda m, i, o, name=name: seen.append(name))
    with watch_uses(dict(model.named_parameters())):
        model[0](torch.zeros(2, 3))
        model[1](*[torch.zeros(2, 2, 4)] * 3)
        output, (h, c) = model[2](torch.zeros(2, 2, 3))
    assert seen == ["0", "1", "2"]  # attention calls its projection as a function
    assert (output.shape, h.shape, c.shape) == ((2, 2, 2), (1, 2, 2), (1, 2, 2))


def test_watching_inside_watching_sees_the_same() -> None:
    model = mlp()
    params = dict(model.named_parameters())
    with watch_uses(params) as outer, watch_uses(params) as inner:
        model(torch.zeros(2, 5))
    assert names(inner) == names(outer) == [("0.weight", "0.bias"), ("2.weight", "2.bias")]


def test_several_outputs_are_walked_together() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    params = dict(model.named_parameters())
    with watch_uses(params) as uses:
        one, other = model(torch.zeros(1, 3)), torch.zeros(1, 3) @ model.weight
    assert coverage(uses, params, one).loose == set()
    assert coverage(uses, params, [one, other]) == ({"bias"}, {"weight"})
    assert coverage(uses, params, torch.zeros(2)) == (set(), set())
    assert coverage(uses, params, model.weight) == (set(), {"weight"})
