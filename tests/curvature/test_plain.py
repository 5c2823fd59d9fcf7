"""Attention and recurrent layers written out, against torch's own operations: outputs, states, gradients, draws."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from hesse.curvature.plain import PLAIN, Order, attention
from hesse.curvature.uses import watch_uses
from tolerances import ROUNDING

EXACT = ROUNDING[torch.float64]


def by_hand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: slice | None = None,
    bias_rows: slice | None = None,
    order: Order | None = None,
) -> Tensor:
    weight = weight if rows is None else weight[rows]
    bias = bias if bias is None or bias_rows is None else bias[bias_rows]
    return x @ weight.T if bias is None else x @ weight.T + bias


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for one in value for t in tensors_of(one)] if isinstance(value, list | tuple) else []


def assert_alike(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """The watched module, whose operation is replaced, gives torch's outputs and gradients, from the same draws."""
    kwargs = kwargs or {}
    params = dict(module.named_parameters())
    leaves = [*params.values(), *(t for t in tensors_of(args) if t.requires_grad)]
    found = []
    for watched in (False, True):
        torch.manual_seed(3)
        if watched:
            with watch_uses(params) as uses:
                outputs = module(*args, **kwargs)
            assert uses
        else:
            outputs = module(*args, **kwargs)
        outputs = [t for t in tensors_of(outputs) if t.is_floating_point()]
        random = torch.Generator().manual_seed(5)
        total = sum((t * torch.randn(t.shape, generator=random, dtype=t.dtype)).sum() for t in outputs)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        found.append(([t.detach() for t in outputs], grads))
    (ours, our_grads), (theirs, their_grads) = found
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    for one, other in zip((*ours, *our_grads), (*theirs, *their_grads), strict=True):
        if one is None or other is None:
            assert one is other
        else:
            torch.testing.assert_close(one, other, **EXACT)


def noise(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


NETWORKS = [
    {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias, "dropout": 0.4 * (layers > 1)}
    for layers, both, first, bias in itertools.product((1, 3), (False, True), (False, True), (True, False))
]
KINDS = {
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "GRU": (nn.GRU, {}),
    "LSTM": (nn.LSTM, {}),
    "LSTM, projected": (nn.LSTM, {"proj_size": 2}),
}


@pytest.mark.parametrize("given", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_networks(kind: str, given: bool) -> None:
    torch.manual_seed(0)
    make, own = KINDS[kind]
    for options in NETWORKS:
        module = make(3, 4, **own, **options).double()
        x = noise(2, 5, 3)
        state = start(module, batch=2 if options["batch_first"] else 5)
        assert_alike(module, (x, state) if given else (x,))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers_draws_the_same_in_float32(kind: str) -> None:
    torch.manual_seed(0)
    make, own = KINDS[kind]
    module = make(3, 4, num_layers=2, dropout=0.5, batch_first=True, **own)
    x = torch.randn(2, 5, 3)
    with torch.random.fork_rng(devices=[]):
        theirs = module(x)[0]
    with watch_uses(dict(module.named_parameters())):
        torch.testing.assert_close(module(x)[0], theirs, **ROUNDING[torch.float32])


def start(module: nn.RNNBase, batch: int) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = noise(count, batch, module.proj_size or module.hidden_size)
    return (h, noise(count, batch, module.hidden_size)) if isinstance(module, nn.LSTM) else h


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_networks_in_eval_mode_and_on_one_sequence(kind: str) -> None:
    torch.manual_seed(0)
    make, own = KINDS[kind]
    module = make(3, 4, num_layers=2, dropout=0.5, **own).double()
    assert_alike(module, (noise(5, 3),))
    assert_alike(module.eval(), (noise(5, 2, 3),))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("both", [False, True])
def test_packed_sequences(kind: str, both: bool) -> None:
    torch.manual_seed(0)
    make, own = KINDS[kind]
    module = make(3, 4, num_layers=2, bidirectional=both, dropout=0.3, **own).double()
    for lengths in ([5, 3, 3, 1], [2, 2], [4], [1, 1, 1]):
        packed = pack_sequence([noise(n, 3) for n in lengths])
        assert_alike(module, (packed,))
        assert_alike(module, (packed, start(module, len(lengths))))
    unsorted = pack_padded_sequence(noise(6, 3, 3), torch.tensor([2, 6, 4]), enforce_sorted=False)
    assert_alike(module, (unsorted, start(module, 3)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda *a, **k: nn.RNNCell(*a, **k, nonlinearity="relu")])  # fmt: skip # noqa: E501
def test_cells(make: Any, bias: bool) -> None:
    torch.manual_seed(0)
    module = make(3, 4, bias=bias).double()
    state = (noise(2, 4), noise(2, 4)) if isinstance(module, nn.LSTMCell) else noise(2, 4)
    assert_alike(module, (noise(2, 3),))
    assert_alike(module, (noise(2, 3), state))
    assert_alike(module, (noise(3),))


ATTENTION = [
    {"bias": bias, "add_bias_kv": kv, "add_zero_attn": zero, "batch_first": first, "dropout": dropout}
    for bias, kv, zero, first, dropout in itertools.product(
        (True, False), (False, True), (False, True), (False, True), (0.0, 0.4)
    )
]


def masks(length: int, source: int, batch: int, heads: int, kind: str) -> dict[str, Any]:
    causal = torch.ones(length, source, dtype=torch.bool).triu(1)
    padding = torch.zeros(batch, source, dtype=torch.bool)
    padding[0, -1] = True
    return {
        "none": {},
        "causal": {"attn_mask": causal},
        "causal hint": {"attn_mask": causal, "is_causal": True},
        "numbers": {"attn_mask": torch.randn(length, source, dtype=torch.float64)},
        "per head": {"attn_mask": torch.randn(batch * heads, length, source, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "padding, numbers": {"key_padding_mask": torch.randn(batch, source, dtype=torch.float64)},
        "both": {"key_padding_mask": padding, "attn_mask": causal},
        "both, causal hint": {"key_padding_mask": padding, "attn_mask": causal, "is_causal": True},
    }[kind]


MASKS = ["none", "causal", "causal hint", "numbers", "per head", "padding", "padding, numbers", "both", "both, causal hint"]  # fmt: skip # noqa: E501


@pytest.mark.parametrize("need", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("shared", ["all", "keys and values", "none"])
@pytest.mark.parametrize("kind", MASKS)
def test_attention(kind: str, shared: str, need: bool) -> None:
    torch.manual_seed(0)
    for options in ATTENTION:
        module = nn.MultiheadAttention(4, 2, **options).double()
        length, batch, source = 3, 2, 3 if shared == "all" or "hint" in kind else 5
        q, k, v = noise(length, batch, 4), noise(source, batch, 4), noise(source, batch, 4)
        q, k, v = (t.detach().transpose(0, 1).requires_grad_() if module.batch_first else t for t in (q, k, v))
        args = {"all": (q, q, q), "keys and values": (q, k, k), "none": (q, k, v)}[shared]
        assert_alike(module, args, {**masks(length, source, batch, 2, kind), "need_weights": need})


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_with_keys_and_values_of_other_widths(need: bool, bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=bias, dropout=0.2).double()
    assert_alike(module, (noise(3, 2, 4), noise(6, 2, 3), noise(6, 2, 5)), {"need_weights": need})


@pytest.mark.parametrize("need", [True, False])
def test_attention_of_one_example_and_weights_of_each_head(need: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, dropout=0.2).double()
    x, k = noise(3, 4), noise(5, 4)
    padding = torch.tensor([False, False, True, False, False])
    assert_alike(module, (x, x, x), {"need_weights": need, "average_attn_weights": False})
    assert_alike(module, (x, k, k), {"need_weights": need, "key_padding_mask": padding})
    assert_alike(module, (noise(3, 2, 4), *[noise(5, 2, 4)] * 2), {"average_attn_weights": False})


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformers_with_dropout_draw_as_torch_draws(activation: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    module = nn.Transformer(4, 2, 2, 1, 6, 0.3, activation, batch_first=True, norm_first=norm_first).double()
    assert_alike(module, (noise(2, 3, 4), noise(2, 5, 4)))


def attention_arguments(**changed: Any) -> dict[str, Any]:
    x = noise(3, 2, 4)
    given = dict(zip(("query", "key", "value"), (x, x, x), strict=True), embed_dim_to_check=4, num_heads=2)
    given |= {"in_proj_weight": noise(12, 4), "in_proj_bias": noise(12), "out_proj_weight": noise(4, 4)}
    given |= dict.fromkeys(("bias_k", "bias_v", "out_proj_bias")) | {"add_zero_attn": False, "dropout_p": 0.0}
    return {**given, **changed}


@pytest.mark.parametrize(
    "changed",
    [
        {"embed_dim_to_check": 5},
        {"num_heads": 3},
        {"query": torch.zeros(3, 2, 1, 4)},
        {"key": torch.zeros(4, 2, 4)},
        {"attn_mask": torch.zeros(3, 4)},
        {"attn_mask": torch.zeros(3, 3, dtype=torch.long)},
        {"is_causal": True},
        {"key_padding_mask": torch.zeros(2, 4)},
        {"bias_k": torch.zeros(1, 1, 4)},
        {"static_k": torch.zeros(4, 3, 2)},
        {"use_separate_proj_weight": True},
        {"attn_mask": torch.zeros(3, 3), "key_padding_mask": torch.zeros(2, 3, dtype=torch.bool)},
    ],
    ids=lambda changed: ", ".join(changed),
)
def test_what_is_out_of_the_ordinary_is_left_to_torch(changed: dict[str, Any]) -> None:
    assert attention(by_hand, **attention_arguments()) is not None
    assert attention(by_hand, **attention_arguments(**changed)) is None


def test_wrong_shapes_get_torchs_own_message() -> None:
    lstm, attend, cell = nn.LSTM(3, 2), nn.MultiheadAttention(4, 2), nn.GRUCell(3, 2)
    for module, args, message in (
        (lstm, (torch.zeros(2, 2, 5),), "input.size"),
        (attend, (torch.zeros(2, 2, 5),) * 3, "embedding dimension of 4"),
        (cell, (torch.zeros(2, 5),), "inconsistent input_size"),
        (cell, (torch.zeros(2, 3), torch.zeros(1, 2)), "doesn't match hidden"),
    ):
        with pytest.raises((RuntimeError, AssertionError), match=message), watch_uses(dict(module.named_parameters())):
            module(*args)


def test_other_products_than_torchs_can_be_handed_in() -> None:
    torch.manual_seed(0)
    module = nn.GRU(3, 4).double()
    x, h = noise(5, 2, 3), torch.zeros(1, 2, 4, dtype=torch.float64)
    ours = PLAIN[torch.gru](by_hand, x, h, list(module.parameters()), True, 1, 0.0, True, False, False)
    for one, other in zip(ours, module(x), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_without_gradients_torchs_own_operation_runs() -> None:
    module = nn.LSTM(3, 4).double()
    x = noise(5, 2, 3, grad=False)
    with torch.no_grad(), watch_uses(dict(module.named_parameters())) as uses:
        watched = module(x)[0]
    assert not uses
    assert torch.equal(watched, module(x)[0].detach())


def test_the_attention_function_runs_as_the_module_does() -> None:
    torch.manual_seed(0)
    arguments = attention_arguments()
    ours = attention(by_hand, **arguments)
    theirs = F.multi_head_attention_forward(**arguments)
    assert ours is not None
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
