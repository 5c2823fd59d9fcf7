"""One form for every layer: the rows of all uses add up to autograd's gradient, for every layer and option."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from hesse.curvature.layers import Entries, Form, Lookups, Rows, as_matrix, form_of, from_matrix, rows_of
from hesse.curvature.uses import Use, coverage, output_gradients, watch_uses
from tolerances import ALGEBRA, ROUNDING

Found = Rows | Lookups | Entries


def tensor_of(outputs: Any) -> Tensor:
    """The first tensor in what a module returned."""
    while not isinstance(outputs, Tensor):
        outputs = outputs[0]
    return outputs


def watched(module: nn.Module, *args: Any) -> tuple[list[Use], dict[str, nn.Parameter], Tensor, Tensor]:
    """The uses of one forward pass, the parameters, one tensor of outputs, and something random to send back."""
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with watch_uses(params) as uses:
        outputs = tensor_of(module(*args))
    r = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return uses, params, outputs, r.to(outputs.dtype)


def rebuilt(uses: list[Use], params: dict[str, nn.Parameter], outputs: Tensor, r: Tensor) -> dict[str, Tensor]:
    """The gradient of sum(r * outputs) by adding up what each use says."""
    total = {name: torch.zeros_like(p).flatten(1 if p.ndim > 1 else 0) for name, p in params.items()}
    for use, g in zip(uses, output_gradients(uses, outputs, r), strict=True):
        if g is None:
            continue
        for name, found in rows_of(use, g).items():
            sum_of = found.total()
            if isinstance(found, Rows):
                height = params[name].shape[0] if found.part is None else found.part.stop - found.part.start
                sum_of, _ = from_matrix(sum_of, form_of(use), (height, total[name].shape[1]))
            if not isinstance(found, Entries):
                total[name][getattr(found, "part", None) or slice(None)] += sum_of
            else:
                total[name].view(-1)[found.part or slice(None)] += sum_of
    return {name: value.view(params[name].shape) for name, value in total.items()}


def assert_rebuilt(module: nn.Module, *args: Any) -> list[Use]:
    uses, params, outputs, r = watched(module, *args)
    expected = torch.autograd.grad(outputs, list(params.values()), r, retain_graph=True, materialize_grads=True)
    reached = {name for name, g in zip(params, expected, strict=True) if bool(g.any())}
    found = coverage(uses, params, outputs)
    assert not found.loose
    assert reached <= found.known
    for (name, ours), g in zip(rebuilt(uses, params, outputs, r).items(), expected, strict=True):
        torch.testing.assert_close(ours, g, **ALGEBRA, msg=lambda text, name=name: f"{name}: {text}")
    return uses


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# Linear maps, embeddings and norms: (module, input).
# fmt: off
LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(4, 3), noise(5, 4)),
    "linear, no bias": lambda: (nn.Linear(4, 3, bias=False), noise(5, 4)),
    "linear, no batch": lambda: (nn.Linear(4, 3), noise(4)),
    "linear, sequence": lambda: (nn.Linear(4, 3), noise(5, 2, 4)),
    "linear, sequence, no bias": lambda: (nn.Linear(4, 3, bias=False), noise(5, 2, 4)),
    "linear, strided": lambda: (nn.Linear(4, 3), noise(5, 2, 4).transpose(0, 1)),
    "linear, one number": lambda: (nn.Linear(1, 1), noise(5, 1)),
    "linear, empty": lambda: (nn.Linear(4, 3), noise(0, 4)),
    "embedding": lambda: (nn.Embedding(7, 3), torch.randint(7, (5, 4))),
    "embedding, vector of tokens": lambda: (nn.Embedding(7, 3), torch.randint(7, (5,))),
    "embedding, one token": lambda: (nn.Embedding(7, 3), torch.tensor(3)),
    "embedding, padding": lambda: (nn.Embedding(7, 3, padding_idx=2), torch.randint(7, (5, 4))),
    "embedding, padding last": lambda: (nn.Embedding(7, 3, padding_idx=-1), torch.randint(7, (5, 4))),
    "LayerNorm": lambda: (nn.LayerNorm(4), noise(5, 4)),
    "LayerNorm, no batch": lambda: (nn.LayerNorm(4), noise(4)),
    "LayerNorm, two axes": lambda: (nn.LayerNorm((3, 4)), noise(5, 2, 3, 4)),
    "LayerNorm, no bias": lambda: (nn.LayerNorm(4, bias=False), noise(5, 3, 4)),
    "LayerNorm, eps": lambda: (nn.LayerNorm(4, eps=0.5), noise(5, 3, 4)),
    "RMSNorm": lambda: (nn.RMSNorm(4), noise(5, 3, 4)),
    "RMSNorm, eps, two axes": lambda: (nn.RMSNorm((3, 4), eps=0.5), noise(5, 3, 4)),
    "GroupNorm": lambda: (nn.GroupNorm(2, 4, eps=0.5), noise(5, 4, 2, 3)),
    "GroupNorm, vectors": lambda: (nn.GroupNorm(2, 4), noise(5, 4)),
    "BatchNorm1d": lambda: (nn.BatchNorm1d(4, eps=0.5), noise(5, 4)),
    "BatchNorm1d, sequence": lambda: (nn.BatchNorm1d(4), noise(5, 4, 3)),
    "BatchNorm2d": lambda: (nn.BatchNorm2d(4), noise(5, 4, 2, 3)),
    "BatchNorm2d, eval": lambda: (nn.BatchNorm2d(4).eval(), noise(5, 4, 2, 3)),
    "BatchNorm2d, eval, no statistics": lambda: (nn.BatchNorm2d(4, track_running_stats=False).eval(), noise(5, 4, 2, 3)),  # noqa: E501
    "BatchNorm3d": lambda: (nn.BatchNorm3d(4), noise(3, 4, 2, 1, 2)),
    "InstanceNorm1d": lambda: (nn.InstanceNorm1d(4, affine=True, eps=0.5), noise(5, 4, 3)),
    "InstanceNorm1d, no batch": lambda: (nn.InstanceNorm1d(4, affine=True), noise(4, 3)),
    "InstanceNorm2d, eval": lambda: (nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), noise(5, 4, 2, 3)),  # noqa: E501
    "InstanceNorm3d": lambda: (nn.InstanceNorm3d(4, affine=True, track_running_stats=True), noise(2, 4, 2, 3, 2)),
}
# fmt: on


@pytest.mark.parametrize("name", LAYERS)
def test_rows_add_up_to_the_gradient(name: str) -> None:
    torch.manual_seed(0)
    module, x = LAYERS[name]()
    with torch.no_grad():
        for t in itertools.chain(module.double().parameters(), module.buffers()):
            if t.is_floating_point():
                t.uniform_(0.5, 2.0)
    assert_rebuilt(module, x)


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 2, "stride": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 2, "padding": "same"},  # one side gets more padding than the other
    {"kernel_size": 2, "padding": "same", "dilation": 3},
    {"kernel_size": 2, "padding": "valid", "dilation": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 2, "stride": 2, "groups": 4, "bias": False},
]
MODES = ["zeros", "reflect", "replicate", "circular"]
SIZES = {1: (7,), 2: (5, 6), 3: (3, 4, 5)}
AXES = pytest.mark.parametrize("axes", [1, 2, 3], ids=["1d", "2d", "3d"])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@AXES
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_convolutions(axes: int, mode: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = getattr(nn, f"Conv{axes}d")(4, 8, padding_mode=mode, **settings).double()
    assert_rebuilt(module, noise(2, 4, *SIZES[axes]))
    assert_rebuilt(module, noise(4, *SIZES[axes]))  # one image, without a batch


TRANSPOSED: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 2, "stride": 3},  # elements between the patches belong to none
    {"kernel_size": 2, "stride": 3, "output_padding": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 2, "stride": 2, "output_padding": 1},
    {"kernel_size": 3, "dilation": 2},
    {"kernel_size": 3, "dilation": 3, "padding": 2, "output_padding": 2},
    {"kernel_size": 3, "groups": 2},
    {"kernel_size": 2, "stride": 2, "groups": 4, "bias": False},
]


@AXES
@pytest.mark.parametrize("settings", TRANSPOSED, ids=str)
def test_transposed_convolutions(axes: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = getattr(nn, f"ConvTranspose{axes}d")(4, 8, **settings).double()
    assert_rebuilt(module, noise(2, 4, *SIZES[axes]))
    assert_rebuilt(module, noise(4, *SIZES[axes]))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_running_statistics_are_those_of_the_forward_pass(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind(4, affine=True, track_running_stats=True).double().eval()
    uses, params, outputs, r = watched(module, noise(5, 4, 3))
    expected = torch.autograd.grad(outputs, params["weight"], r, retain_graph=True)
    module.train()(noise(5, 4, 3))
    torch.testing.assert_close(rebuilt(uses, params, outputs, r)["weight"], *expected, **ALGEBRA)


def test_batches_of_no_example_or_one() -> None:
    for kind in (nn.Conv2d, nn.ConvTranspose2d):
        for batch in (0, 1):
            assert_rebuilt(kind(2, 4, 2, groups=2).double(), noise(batch, 2, 5, 4))


def test_settings_of_each_axis() -> None:
    torch.manual_seed(0)
    each: dict[str, Any] = {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}
    assert_rebuilt(nn.Conv2d(2, 3, (3, 2), **each).double(), noise(3, 2, 6, 7))
    assert_rebuilt(nn.ConvTranspose2d(2, 3, (3, 2), output_padding=(0, 1), **each).double(), noise(3, 2, 6, 7))


class Called(nn.Module):
    """A module called by a function, so that other inputs and outputs than a tensor can be tried."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x: Any) -> Any:
        return self.call(self.module, x)


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: nn.RNN(3, 4),
    "RNN, relu": lambda: nn.RNN(3, 4, nonlinearity="relu", bias=False),
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2, dropout=0.3, bidirectional=True),
    "LSTM, projected": lambda: nn.LSTM(3, 4, proj_size=2, num_layers=2),
    "GRU": lambda: nn.GRU(3, 4, bidirectional=True, batch_first=True),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str) -> None:
    torch.manual_seed(0)
    module = RECURRENT[name]().double()
    assert_rebuilt(module, noise(5, 2, 3))
    assert_rebuilt(module, noise(5, 3))
    assert_rebuilt(module, pack_sequence([noise(4, 3), noise(2, 3), noise(1, 3)]))


CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_cells(name: str) -> None:
    def unroll(cell: nn.Module, x: Tensor) -> Tensor:
        state = None
        for step in x:
            state = cell(step, state)
        return state[0] if isinstance(state, tuple) else state

    torch.manual_seed(0)
    uses = assert_rebuilt(Called(CELLS[name](3, 4).double(), unroll), noise(5, 2, 3))
    assert len(uses) == 10


ATTENTION: dict[str, tuple[dict[str, Any], Callable[[nn.Module, Tensor], Any]]] = {
    "self": ({}, lambda m, x: m(x, x, x)),
    "self, fused": ({"dropout": 0.3}, lambda m, x: m(x, x, x, need_weights=False)),
    "cross": ({"add_zero_attn": True}, lambda m, x: m(x, x[:2], x[:2])),
    "three inputs": ({"batch_first": True}, lambda m, x: m(x, x + 1, x.sin())),
    "other widths": ({"kdim": 3, "vdim": 2, "batch_first": True}, lambda m, x: m(x, x[..., :3], x[..., :2])),
    "no bias": ({"bias": False}, lambda m, x: m(x, x, x.exp(), need_weights=False)),
    "one example": ({}, lambda m, x: m(x[0], x[1], x[1])),
    "self, then cross": ({}, lambda m, x: m(m(x, x, x)[0], x, x)),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    torch.manual_seed(0)
    options, call = ATTENTION[name]
    assert_rebuilt(Called(nn.MultiheadAttention(4, 2, **options).double(), call), noise(5, 3, 4))


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers(norm_first: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dropout": 0.1, "batch_first": True, "norm_first": norm_first}
    assert_rebuilt(nn.TransformerEncoderLayer(4, 2, 6, **options).double(), noise(3, 5, 4))
    assert_rebuilt(nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", **options).double().eval(), noise(3, 5, 4))
    decoder = nn.TransformerDecoderLayer(4, 2, 6, **options).double()
    assert_rebuilt(Called(decoder, lambda m, x: m(x, x[:, :2].cos())), noise(3, 5, 4))


def test_weights_that_are_tied_or_called_several_times() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    assert_rebuilt(Called(layer, lambda m, x: m(m(x).tanh()) + m(x.sum(0))), noise(3, 4))
    tied = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6)}).double()
    tied["head"].weight = tied["embedding"].weight
    assert_rebuilt(Called(tied, lambda m, x: m["head"](m["embedding"](x).sin())), torch.randint(6, (3, 5)))
    coder = nn.ModuleDict({"down": nn.Conv1d(2, 4, 3), "up": nn.ConvTranspose1d(4, 2, 3)}).double()
    coder["up"].weight = coder["down"].weight
    assert_rebuilt(Called(coder, lambda m, x: m["up"](m["down"](x).sin())), noise(3, 2, 7))


def test_frozen_parts_and_inputs_that_are_differentiated() -> None:
    torch.manual_seed(0)
    for kind in ("weight", "bias"):
        layers = nn.Sequential(
            nn.Linear(4, 4), nn.Conv1d(1, 2, 2), nn.LayerNorm(3), nn.ConvTranspose1d(2, 2, 2)
        ).double()
        for name, p in layers.named_parameters():
            p.requires_grad_(not name.endswith(kind))
        assert_rebuilt(Called(layers, lambda m, x: m[3](m[2](m[1](m[0](x)[:, None])))), noise(5, 4).requires_grad_())


@pytest.mark.parametrize("inplace", [True, False])
def test_what_is_done_in_place_to_outputs_changes_nothing(inplace: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.ReLU(inplace), nn.LayerNorm(4), nn.ReLU(inplace), nn.Linear(4, 2)]
    assert_rebuilt(nn.Sequential(*layers).double(), noise(3, 5, 4))
    assert_rebuilt(nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(inplace)).double(), noise(2, 5))
    assert_rebuilt(nn.Sequential(nn.InstanceNorm1d(2, affine=True), nn.ReLU(inplace)).double(), noise(3, 2, 5))


# One row: the gradient is g a', and the outer product of it with itself is (a a') (x) (g g').


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3), (1, 4)),
        (nn.Linear(4, 3, bias=False), (4,)),
        (nn.Conv1d(2, 3, 4), (1, 2, 4)),
        (nn.Conv2d(2, 3, 2, dilation=2), (1, 2, 3, 3)),
        (nn.Conv3d(2, 3, (1, 2, 2), bias=False), (2, 1, 2, 2)),
        (nn.ConvTranspose1d(3, 2, 4, bias=False), (1, 3, 1)),
        (nn.ConvTranspose2d(3, 2, 2, stride=2, bias=False), (1, 3, 1, 1)),
    ],
    ids=str,
)
def test_one_row_is_the_outer_product_of_its_gradient(module: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    uses, params, outputs, r = watched(module.double(), noise(*shape))
    grads = dict(zip(params, torch.autograd.grad(outputs, list(params.values()), r, retain_graph=True), strict=True))
    row = rows_of(uses[0], output_gradients(uses, outputs, r)[0])["weight"]
    assert isinstance(row, Rows)
    row = row.joined() if "bias" in params else row
    a, g = row.a.flatten(), row.g.flatten()
    vector = as_matrix(grads["weight"], form_of(uses[0]), grads.get("bias")).flatten()
    torch.testing.assert_close(torch.kron(g.outer(g), a.outer(a)), vector.outer(vector), **ALGEBRA)


def test_an_embedding_drops_the_rows_of_its_padding() -> None:
    module = nn.Embedding(4, 3, padding_idx=1).double()
    uses, _, outputs, r = watched(module, torch.tensor([[1, 2], [3, 1]]))
    found = rows_of(uses[0], output_gradients(uses, outputs, r)[0])["weight"]
    assert isinstance(found, Lookups)
    assert (found.padding, found.size) == (1, 4)
    assert found.g.any(-1).flatten().tolist() == [False, True, True, False]


FORMS = [
    (noise(3, 4), Form(), noise(3), (1, 3, 5)),
    (noise(3, 2, 2), Form(), None, (1, 3, 4)),
    (noise(6, 2, 2), Form(groups=3), noise(6), (3, 2, 5)),
    (noise(6, 2, 3), Form(groups=3, transposed=True), None, (3, 6, 2)),
    (noise(5, 3), Form(transposed=True), None, (1, 3, 5)),
]


@pytest.mark.parametrize(("weight", "form", "bias", "shape"), FORMS)
def test_a_weight_comes_back_from_its_matrices(
    weight: Tensor, form: Form, bias: Tensor | None, shape: tuple[int, ...]
) -> None:
    matrices = as_matrix(weight, form, bias)
    assert matrices.shape == shape
    back = from_matrix(matrices, form, weight.shape, bias is not None)
    assert torch.equal(back[0], weight)
    assert back[1] is None if bias is None else torch.equal(back[1], bias)


@pytest.mark.parametrize("kind", ["linear", "embedding", "norm", "convolution"])
def test_sums_over_a_bfloat16_batch_are_float32(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randint(3, (3000,)) if kind == "embedding" else torch.randn(3000, 4, dtype=torch.bfloat16)
    make = {"linear": nn.Linear(4, 2), "embedding": nn.Embedding(3, 2), "norm": nn.LayerNorm(4)}
    module = make.get(kind, nn.Conv1d(4, 2, 1)).bfloat16()
    uses, _, outputs, r = watched(module, x[..., None] if kind == "convolution" else x)
    (g,) = output_gradients(uses, outputs, r)
    assert g is not None
    for name, found in rows_of(uses[0], g).items():
        assert found.total().dtype == torch.float32
        if name == "bias":
            exact = g.double().movedim(1, -1).flatten(0, -2).sum(0)
            torch.testing.assert_close(found.total().double(), exact, rtol=1e-5, atol=1e-3)  # 3000 float32 sums


def test_half_precision_gradients_are_rebuilt_too() -> None:
    torch.manual_seed(0)
    uses, params, outputs, r = watched(nn.Linear(4, 3).bfloat16(), torch.randn(5, 4).bfloat16())
    expected = torch.autograd.grad(outputs, list(params.values()), r, retain_graph=True)
    for ours, g in zip(rebuilt(uses, params, outputs, r).values(), expected, strict=True):
        torch.testing.assert_close(ours, g, **ROUNDING[torch.bfloat16])
