"""Statistics of whole models, against dense Gauss-Newton blocks by autograd in float64.

Sampling is left out where it can be: sending back every column of the loss's square root, one by one, and adding up
gives what the draws give on average, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import oracles
from hesse.curvature.layers import as_matrix
from hesse.curvature.output import output_curvature
from hesse.curvature.statistics import Diagonal, Kronecker, Statistics, find_blocks, statistics
from hesse.curvature.uses import coverage, watch_uses
from hesse.objective import Objective
from problems import PROBLEMS, FreeParameter, SelfAttention, Unused, problem
from tolerances import ALGEBRA, STANDARD_ERRORS


def learn(objective: Objective, draws: int = 1, seed: int = 0, variant: Any = "expand") -> list[Statistics]:
    """Statistics of one forward pass, from so many draws."""
    torch.manual_seed(seed)
    with watch_uses(objective.params) as uses:
        outputs = objective.forward()
    curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
    return [statistics(uses, objective.params, outputs, curvature, variant) for _ in range(draws)]


def expected(objective: Objective, variant: Any = "expand") -> Statistics:
    """What :func:`learn` gives on average: the sum over all columns of a square root of H_L."""
    with watch_uses(objective.params) as uses:
        outputs = objective.forward()
    curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
    total: Statistics = {}
    for column in pieces(curvature.root()):
        one = SimpleNamespace(draw=lambda column=column: column, weight=1.0)
        for name, found in statistics(uses, objective.params, outputs, one, variant).items():
            before = total.get(name)
            if isinstance(found, Kronecker):
                g = found.g if before is None else before.g + found.g
                total[name] = Kronecker(found.a, g, found.form, found.bias)
            else:
                total[name] = Diagonal(found.values if before is None else before.values + found.values)
    return total


def pieces(columns: Iterator[Tensor]) -> Iterator[Tensor]:
    """The columns cut so that each touches one example."""
    for column in columns:
        for b in range(len(column)):
            piece = torch.zeros_like(column)
            piece[b] = column[b]
            if piece.any():
                yield piece


def objective_of(name: str, examples: int = 24) -> Objective:
    model, loss_fn, (x, y) = problem(name)
    model.double()
    double = [t[:examples].double() if t.is_floating_point() else t[:examples] for t in (x, y)]
    return Objective(model, loss_fn, *double)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def squared(model: nn.Module, *inputs: Any) -> Objective:
    """The model with a squared error, in float64."""
    model.double()
    with torch.no_grad():
        shape = model(*inputs).shape
    return Objective(model, F.mse_loss, inputs, noise(*shape))


def assert_mean(samples: Tensor, exact: Tensor) -> None:
    """The mean over the first dimension is ``exact``, to so many of its standard errors."""
    error = (samples.mean(0) - exact).abs()
    limit = STANDARD_ERRORS * samples.std(0) / len(samples) ** 0.5 + 1e-12
    assert bool((error <= limit).all()), f"off by {float((error / limit).max()) * STANDARD_ERRORS:.1f} standard errors"


def dense_blocks(objective: Objective, weight: str, found: Kronecker) -> Tensor:
    """The Gauss-Newton block of a weight and its bias, for each of its matrices in their order: [G, m n, m n]."""
    names = [name for name in (weight, found.bias) if name is not None]
    params = {name: objective.params[name] for name in names}
    where = torch.cat([torch.arange(p.numel()) + oracles.rows_of(objective, name).start for name, p in params.items()])
    block = oracles.gauss_newton(objective)[where][:, where]
    number = torch.arange(len(where)).split([p.numel() for p in params.values()])
    parts = [n.view(p.shape) for n, p in zip(number, params.values(), strict=True)]
    order = as_matrix(parts[0], found.form, parts[1] if found.bias else None).flatten(1)
    return torch.stack([block[o][:, o] for o in order])


def kronecker_blocks(found: Kronecker) -> Tensor:
    a = found.a.diag() if found.a.ndim == 1 else found.a
    a, g = (t if t.ndim == 3 else t[None] for t in (a, found.g))
    return torch.stack([torch.kron(one, other) for one, other in zip(g, a, strict=True)])


class Called(nn.Module):
    """Modules called by a function."""

    def __init__(self, call: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.call = call

    def forward(self, *inputs: Any) -> Tensor:
        return self.call(self, *inputs)


@dataclass
class Case:
    """A model that applies each of ``weights`` to one row: there A (x) G is the block itself."""

    model: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    weights: list[str]


def state_first(m: nn.Module, x: Tensor) -> Tensor:
    """One step from a state that is not zero."""
    kind = type(m.layer)
    batch = 1 if m.layer.batch_first else x.shape[1]
    h = torch.ones(1, batch, m.layer.proj_size or m.layer.hidden_size, dtype=x.dtype)
    c = torch.ones(1, batch, m.layer.hidden_size, dtype=x.dtype)
    return m.layer(x, (h, c) if kind is nn.LSTM else h)[0]


CELL = ["layer.weight_ih_l0", "layer.weight_hh_l0"]
ATTENTION = ["layer.in_proj_weight", "layer.out_proj.weight"]
ENCODER = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
# fmt: off
ONE_ROW = {
    "linear": Case(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)), (noise(1, 4),), ["0.weight", "2.weight"]),  # noqa: E501
    "conv1d": Case(lambda: nn.Conv1d(2, 3, 4), (noise(1, 2, 4),), ["weight"]),
    "conv2d, grouped, dilated": Case(lambda: nn.Conv2d(4, 6, 2, dilation=2, groups=2), (noise(1, 4, 3, 3),), ["weight"]),  # noqa: E501
    "conv2d, depthwise, circular": Case(lambda: nn.Conv2d(3, 3, 3, padding=1, stride=9, groups=3, padding_mode="circular"), (noise(1, 3, 2, 2),), ["weight"]),  # noqa: E501
    "conv3d": Case(lambda: nn.Conv3d(2, 3, (1, 2, 2)), (noise(1, 2, 1, 2, 2),), ["weight"]),
    "transposed 1d": Case(lambda: nn.ConvTranspose1d(3, 2, 4, bias=False), (noise(1, 3, 1),), ["weight"]),
    "transposed 2d, grouped": Case(lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, stride=2, output_padding=1), (noise(1, 4, 1, 1),), ["weight"]),  # noqa: E501
    "transposed 3d": Case(lambda: nn.ConvTranspose3d(2, 3, (1, 3, 2), padding=(0, 1, 0)), (noise(1, 2, 1, 1, 1),), ["weight"]),  # noqa: E501
    "embedding": Case(lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), (torch.tensor([3]),), ["0.weight", "1.weight"]),  # noqa: E501
    "attention": Case(lambda: Called(lambda m, x: m.layer(x, x, x)[0], layer=nn.MultiheadAttention(4, 2)), (noise(1, 1, 4),), ATTENTION),  # noqa: E501
    "attention, other widths": Case(lambda: Called(lambda m, x: m.layer(x, x[..., :3], x[..., :3])[0], layer=nn.MultiheadAttention(4, 2, kdim=3, vdim=3)), (noise(1, 1, 4),), ["layer.q_proj_weight", "layer.v_proj_weight", "layer.out_proj.weight"]),  # noqa: E501
    "attention with itself and another": Case(lambda: Called(lambda m, x, y: m.layer(x, y, y)[0], layer=nn.MultiheadAttention(4, 2)), (noise(1, 1, 4), noise(1, 1, 4)), ATTENTION),  # noqa: E501
    "encoder layer": Case(lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True).eval(), (noise(1, 1, 4),), ENCODER),  # noqa: E501
    "RNN": Case(lambda: Called(state_first, layer=nn.RNN(3, 4)), (noise(1, 1, 3),), CELL),
    "LSTM": Case(lambda: Called(state_first, layer=nn.LSTM(3, 4, proj_size=2)), (noise(1, 1, 3),), [*CELL, "layer.weight_hr_l0"]),  # noqa: E501
    "GRU": Case(lambda: Called(state_first, layer=nn.GRU(3, 4, batch_first=True)), (noise(1, 1, 3),), CELL),
}
# fmt: on


@pytest.mark.parametrize("variant", ["expand", "reduce"])
@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row_has_the_exact_block(name: str, variant: str) -> None:
    torch.manual_seed(0)
    case = ONE_ROW[name]
    objective = squared(case.model(), *case.inputs)
    found = expected(objective, variant)
    for weight in case.weights:
        one = found[weight]
        assert isinstance(one, Kronecker)
        torch.testing.assert_close(kronecker_blocks(one), dense_blocks(objective, weight, one), **ALGEBRA)
    assert {n for n, one in found.items() if isinstance(one, Kronecker)} >= set(case.weights)


def test_one_example_is_exact_for_every_loss() -> None:
    for name in ("mlp, cross-entropy", "mlp, binary cross-entropy", "mlp, squared error"):
        objective = objective_of(name, examples=1)
        for weight, one in expected(objective).items():
            assert isinstance(one, Kronecker)
            torch.testing.assert_close(kronecker_blocks(one), dense_blocks(objective, weight, one), **ALGEBRA)


def test_a_deep_linear_network_with_squared_error_is_exact() -> None:
    # The gradient at a layer's output is W' times noise that knows nothing of the inputs.
    torch.manual_seed(0)
    objective = squared(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 3)), noise(6, 3))
    for weight, one in expected(objective).items():
        assert isinstance(one, Kronecker)
        torch.testing.assert_close(kronecker_blocks(one), dense_blocks(objective, weight, one), **ALGEBRA)


POOLED = {
    "tokens": (lambda: Called(lambda m, x: m.layer(x).mean(1), layer=nn.Linear(3, 2)), (5, 4, 3)),
    "time first": (lambda: Called(lambda m, x: m.layer(x.transpose(0, 1)).mean(0), layer=nn.Linear(3, 2)), (5, 4, 3)),
    "image": (lambda: Called(lambda m, x: m.layer(x).mean((2, 3)), layer=nn.Conv2d(2, 3, 2)), (5, 2, 3, 4)),
    "grouped": (lambda: Called(lambda m, x: m.layer(x).mean(2), layer=nn.Conv1d(4, 6, 2, groups=2)), (5, 4, 3)),
}


@pytest.mark.parametrize("name", POOLED)
def test_reduce_is_exact_where_positions_are_averaged(name: str) -> None:
    torch.manual_seed(0)
    make, shape = POOLED[name]
    objective = squared(make(), noise(*shape))
    one = expected(objective, "reduce")["layer.weight"]
    other = expected(objective)["layer.weight"]
    assert isinstance(one, Kronecker)
    assert isinstance(other, Kronecker)
    exact = dense_blocks(objective, "layer.weight", one)
    torch.testing.assert_close(kronecker_blocks(one), exact, **ALGEBRA)
    assert float((kronecker_blocks(other) - exact).norm() / exact.norm()) > 0.1  # expand is for the other setting


def test_reduce_is_the_loop_over_examples_that_it_stands_for() -> None:
    torch.manual_seed(0)
    model = Called(lambda m, x: m.layer(m.layer(x).sin()).tanh(), layer=nn.Linear(3, 3)).double()
    x = noise(4, 5, 3)
    objective = squared(model, x)
    torch.manual_seed(1)
    (found,) = learn(objective, variant="reduce", seed=1)
    one = found["layer.weight"]
    assert isinstance(one, Kronecker)
    hidden = model.layer(x)
    second = model.layer(hidden.sin())
    outputs = second.tanh()
    curvature = output_curvature(F.mse_loss, outputs, objective.targets)
    torch.manual_seed(1)
    grads = torch.autograd.grad(outputs, [hidden, second], curvature.draw())
    a, g = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for b in range(4):
        inputs = torch.cat([x[b], hidden[b].detach().sin()])
        mean = torch.cat([inputs.mean(0), torch.ones(1)])
        total = torch.cat([grads[0][b], grads[1][b]]).sum(0)
        a += mean.outer(mean) / 4
        g += curvature.weight * total.outer(total)
    torch.testing.assert_close(one.a, a, **ALGEBRA)
    torch.testing.assert_close(one.g, g, **ALGEBRA)


def test_reduce_averages_over_the_length_of_each_sequence() -> None:
    torch.manual_seed(0)
    sequences = [noise(4, 3), noise(2, 3), noise(1, 3)]
    last = Called(lambda m, x: m.layer(x)[1][0], layer=nn.RNN(3, 4))
    objective = squared(last, pack_sequence(sequences))
    (found,) = learn(objective, variant="reduce")
    rows = torch.stack([torch.cat([one.mean(0), torch.ones(1)]) for one in sequences])
    torch.testing.assert_close(found["layer.weight_ih_l0"].a, rows.T @ rows / 3, **ALGEBRA)
    g = torch.zeros(4, 4, dtype=torch.float64)
    (r,) = torch.autograd.grad(objective.loss_fn(outputs := last(*objective.inputs), objective.targets), outputs)
    for b, one in enumerate(sequences):  # a sequence alone; its bias adds up the gradients of its positions
        alone = last(pack_sequence([one]))
        (total,) = torch.autograd.grad(alone, last.layer.bias_ih_l0, r[b : b + 1])
        g += total.outer(total)
    torch.manual_seed(0)
    draw = SimpleNamespace(draw=lambda: r, weight=1.0)
    with watch_uses(objective.params) as uses:
        outputs = objective.forward()
    one = statistics(uses, objective.params, outputs, draw, "reduce")["layer.weight_ih_l0"]
    torch.testing.assert_close(one.g, g, **ALGEBRA)


def test_reduce_needs_to_know_the_examples() -> None:
    torch.manual_seed(0)
    folded = Called(lambda m, x: m.layer(x.flatten(0, 1)).view(4, 5, 2).mean(1), layer=nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"'layer.weight', of shape \[20, 3\].*the 4 examples.*variant='expand'"):
        learn(squared(folded, noise(4, 5, 3)), variant="reduce")
    with pytest.raises(ValueError, match="variant must be 'expand' or 'reduce'; got 'sum'"):
        learn(squared(nn.Linear(3, 2), noise(4, 3)), variant="sum")


def test_all_diagonals_are_exact_on_average() -> None:
    # Except for batch norm in training mode: its examples share a mean, and only the whole gradient's square is.
    names = [name for name in PROBLEMS if name != "convnet, BatchNorm"]
    for name in names:
        objective = objective_of(name, examples=3)
        exact = oracles.gauss_newton(objective).diagonal()
        for param, one in expected(objective).items():
            if isinstance(one, Diagonal):
                where = oracles.rows_of(objective, param)
                torch.testing.assert_close(one.values.flatten(), exact[where], **ALGEBRA, msg=f"{name}: {param}")


NORMS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "LayerNorm": (nn.LayerNorm(4), (3, 5, 4)),
    "LayerNorm, as long as the batch": (nn.LayerNorm(4), (3, 3, 4)),
    "RMSNorm": (nn.RMSNorm((5, 4)), (3, 5, 4)),
    "GroupNorm": (nn.GroupNorm(2, 4), (3, 4, 5)),
    "BatchNorm2d": (nn.BatchNorm2d(4).eval(), (3, 4, 2, 2)),
    "InstanceNorm1d": (nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    "shared bias": (Called(lambda m, x: F.linear(m.one(x), x, m.one.bias), one=nn.Linear(4, 4)), (4, 4)),
    "tied conv": (
        Called(lambda m, x: F.conv_transpose1d(m.one(x).tanh(), m.one.weight), one=nn.Conv1d(2, 3, 2)),
        (3, 2, 4),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_scales_shifts_and_what_has_no_matrix_have_their_exact_diagonal(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = NORMS[name]
    objective = squared(nn.Sequential(layer, nn.Tanh()), noise(*shape))
    exact, found = oracles.gauss_newton(objective).diagonal(), expected(objective)
    diagonals = {param: one for param, one in found.items() if isinstance(one, Diagonal)}
    assert diagonals
    for param, one in diagonals.items():
        where = oracles.rows_of(objective, param)
        torch.testing.assert_close(one.values.flatten(), exact[where], **ALGEBRA)
        assert one.values.shape == objective.params[param].shape


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("free parameter", ["scale"]),
        ("text", ["middle.1.weight", "middle.1.bias"]),
        ("convnet, grouped", ["1.weight"]),
    ],
)
def test_draws_have_the_diagonal_as_mean(name: str, params: list[str]) -> None:
    objective = objective_of(name)
    draws, exact = learn(objective, 200), oracles.gauss_newton(objective).diagonal()
    for param in params:
        shape = objective.params[param].shape
        samples = torch.stack([draw[param].values for draw in draws])
        assert_mean(samples, exact[oracles.rows_of(objective, param)].view(shape))


def test_draws_have_the_factors_as_mean() -> None:
    for name in ("mlp, cross-entropy", "convnet, grouped", "LSTM", "attention"):
        objective = objective_of(name)
        draws, mean = learn(objective, 200), expected(objective)
        weights = [weight for weight, one in mean.items() if isinstance(one, Kronecker)]
        assert weights
        for weight in weights:
            assert_mean(torch.stack([draw[weight].g for draw in draws]), mean[weight].g)
            torch.testing.assert_close(draws[0][weight].a, mean[weight].a, **ALGEBRA)


class Twice(nn.Module):
    """One layer called twice, or two layers called once with the same weights."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first if shared else nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


def test_a_layer_called_twice_adds_up() -> None:
    torch.manual_seed(0)
    shared, apart = Twice(True).double(), Twice(False).double()
    apart.load_state_dict(shared.state_dict())
    x, y = noise(8, 4), torch.randint(2, (8,))
    (one,), (two,) = (learn(Objective(model, F.cross_entropy, x, y)) for model in (shared, apart))
    first, second = two["first.weight"], two["second.weight"]
    torch.testing.assert_close(one["first.weight"].a, (first.a + second.a) / 2, **ALGEBRA)
    torch.testing.assert_close(one["first.weight"].g, first.g + second.g, **ALGEBRA)
    assert one["first.weight"].bias == "first.bias"


def test_a_recurrent_layer_is_its_cell_called_again_and_again() -> None:
    torch.manual_seed(0)
    layer, cell = nn.GRU(3, 4).double(), nn.GRUCell(3, 4).double()
    for ours, theirs in zip(cell.parameters(), layer.parameters(), strict=True):
        ours.data = theirs.data

    def unroll(m: nn.Module, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 4)
        return torch.stack([h := m.layer(step, h) for step in x])

    x = noise(5, 2, 3)
    (one,) = learn(squared(Called(lambda m, x: m.layer(x)[0], layer=layer), x))
    (two,) = learn(squared(Called(unroll, layer=cell), x))
    for kind in ("ih", "hh"):
        ours, theirs = one[f"layer.weight_{kind}_l0"], two[f"layer.weight_{kind}"]
        torch.testing.assert_close(ours.a, theirs.a, **ALGEBRA)
        torch.testing.assert_close(ours.g, theirs.g, **ALGEBRA)


def test_packed_sequences_count_the_rows_they_have() -> None:
    torch.manual_seed(0)
    sequences = [noise(4, 3), noise(1, 3)]
    objective = squared(Called(lambda m, x: m.layer(x)[0].data, layer=nn.RNN(3, 4)), pack_sequence(sequences))
    (found,) = learn(objective)
    rows = torch.cat([torch.cat(sequences), torch.ones(5, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(found["layer.weight_ih_l0"].a, rows.T @ rows / 5, **ALGEBRA)


def test_a_grouped_convolution_is_several_convolutions() -> None:
    torch.manual_seed(0)
    whole = nn.Conv1d(4, 6, 3, groups=2).double()
    halves = [nn.Conv1d(2, 3, 3).double() for _ in range(2)]
    for half, weight, bias in zip(halves, whole.weight.chunk(2), whole.bias.chunk(2), strict=True):
        half.weight.data, half.bias.data = weight.data, bias.data
    x = noise(5, 4, 6)
    apart = Called(lambda m, x: torch.cat([m.one(x[:, :2]), m.two(x[:, 2:])], 1), one=halves[0], two=halves[1])
    (one,), (two,) = learn(squared(whole, x)), learn(squared(apart, x))
    for i, name in enumerate(("one", "two")):
        torch.testing.assert_close(one["weight"].a[i], two[f"{name}.weight"].a, **ALGEBRA)
        torch.testing.assert_close(one["weight"].g[i], two[f"{name}.weight"].g, **ALGEBRA)
    assert one["weight"].bias == "bias"


@pytest.mark.parametrize("shared", [False, True])
def test_attention_between_inputs_is_three_linear_layers(shared: bool) -> None:
    """And, called once more with itself, those three layers called once more."""
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(4, 1).double()

    def parts(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = attend(m, x, y, y.cos())
        return attend(m, z, z, z) if shared else z

    def attend(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (layer(t).transpose(0, 1) for layer, t in ((m.q, q), (m.k, k), (m.v, v)))
        return m.out((q @ k.mT / 2).softmax(-1) @ v).transpose(0, 1).contiguous()  # draws follow the strides

    def whole(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = m.layer(x, y, y.cos())[0]
        return m.layer(z, z, z)[0] if shared else z

    layers = {name: nn.Linear(4, 4) for name in ("q", "k", "v")}
    for layer, weight, bias in zip(
        layers.values(), packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3), strict=True
    ):
        layer.weight.data, layer.bias.data = weight.data, bias.data
    x, y = noise(3, 2, 4), noise(5, 2, 4)
    (one,) = learn(squared(Called(whole, layer=packed), x, y))
    (two,) = learn(squared(Called(parts, out=packed.out_proj, **layers), x, y))
    assert one["layer.in_proj_weight"].bias == "layer.in_proj_bias"
    for i, name in enumerate(layers):
        torch.testing.assert_close(one["layer.in_proj_weight"].a[i], two[f"{name}.weight"].a, **ALGEBRA)
        torch.testing.assert_close(one["layer.in_proj_weight"].g[i], two[f"{name}.weight"].g, **ALGEBRA)


@pytest.mark.parametrize("variant", ["expand", "reduce"])
def test_a_part_that_leads_nowhere_has_no_curvature(variant: str) -> None:
    torch.manual_seed(0)
    weights = Called(
        lambda m, x: m.layer(x, x[:, :2], x[:, 1:])[1], layer=nn.MultiheadAttention(4, 1, batch_first=True)
    )
    (found,) = learn(squared(weights, noise(5, 3, 4)), variant=variant)
    one = found["layer.in_proj_weight"]
    assert one.g[0].any()
    assert one.g[1].any()
    assert not one.g[2].any()
    assert found.keys() == {"layer.in_proj_weight"}


class Swallow(torch.autograd.Function):
    """A custom function that passes nothing back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None


def test_what_a_custom_function_swallows_has_no_statistics() -> None:
    torch.manual_seed(0)
    layers = {"one": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "slope": nn.PReLU(), "two": nn.Linear(4, 2)}
    model = Called(lambda m, x: m.two(Swallow.apply(m.slope(m.norm(m.one(x))))), **layers)
    (found,) = learn(squared(model, noise(5, 4)))
    assert found.keys() == {"two.weight"}


def test_an_embedding_called_twice_counts_both() -> None:
    torch.manual_seed(0)
    model = Called(lambda m, x, y: m.layer(x) * m.layer(y), layer=nn.Embedding(4, 3, padding_idx=0))
    (found,) = learn(squared(model, torch.tensor([1, 2, 0]), torch.tensor([1, 1, 3])))
    torch.testing.assert_close(found["layer.weight"].a, torch.tensor([0.0, 3.0, 1.0, 1.0]).double() / 5, **ALGEBRA)


def test_an_activation_in_place_corrupts_nothing() -> None:
    def model(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        last = nn.Sequential(nn.Flatten(2), nn.Linear(4, 2), nn.ReLU(inplace), nn.Flatten(), nn.Linear(6, 2))
        return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(inplace), nn.BatchNorm2d(3), nn.ReLU(inplace), last).double()

    x, y = noise(6, 1, 3, 3), torch.randint(2, (6,))
    (one,), (other,) = (learn(Objective(model(inplace), F.cross_entropy, x, y)) for inplace in (True, False))
    assert one.keys() == other.keys() == {"0.weight", "2.weight", "2.bias", "4.1.weight", "4.4.weight"}
    for name, found in one.items():
        same = other[name]
        if isinstance(found, Kronecker):
            assert torch.equal(found.a, same.a)
            assert torch.equal(found.g, same.g)
        else:
            assert torch.equal(found.values, same.values)


def embedding_and_head(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(m.one(x), m.one.weight)


def one_weight_in_all_places(m: nn.Module, x: Tensor) -> Tensor:
    """Attention whose weight is used whole three times, each time with another part of one bias."""
    w, b = m.one.weight, m.two.bias
    separate = {"use_separate_proj_weight": True, "q_proj_weight": w, "k_proj_weight": w, "v_proj_weight": w}
    rest = {"bias_k": None, "bias_v": None, "add_zero_attn": False, "dropout_p": 0.0, "out_proj_bias": None}
    return F.multi_head_attention_forward(x, x, x, 3, 1, None, b, out_proj_weight=torch.eye(3), **separate, **rest)[0]


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


# A model and its input; which weights have a block, with the bias that it takes in; what else is known or mixed.
# fmt: off
BLOCKS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, str | None], set[str]]] = {
    "a layer": (lambda: nn.Linear(3, 3), torch.randn(2, 3), {"weight": "bias"}, set()),
    "no bias": (lambda: nn.Linear(3, 3, bias=False), torch.randn(2, 3), {"weight": None}, set()),
    "frozen bias": (lambda: frozen(nn.Linear(3, 3), "bias"), torch.randn(2, 3), {"weight": None}, set()),
    "frozen weight": (lambda: frozen(nn.Linear(3, 3), "weight"), torch.randn(2, 3), {}, set()),
    "called twice": (lambda: Called(lambda m, x: m.one(m.one(x)), one=nn.Linear(3, 3)), torch.randn(2, 3), {"one.weight": "one.bias"}, set()),  # noqa: E501
    "two biases": (lambda: Called(lambda m, x: F.linear(m.one(x), m.one.weight, m.two.bias), one=nn.Linear(3, 3), two=nn.LayerNorm(3)), torch.randn(2, 3), {"one.weight": None}, set()),  # noqa: E501
    "a bias now and then": (lambda: Called(lambda m, x: F.linear(m.one(x), m.one.weight), one=nn.Linear(3, 3)), torch.randn(2, 3), {"one.weight": None}, set()),  # noqa: E501
    "a bias of two weights": (lambda: Called(lambda m, x: F.linear(m.one(x), m.two.weight, m.one.bias), one=nn.Linear(3, 3), two=nn.Linear(3, 3)), torch.randn(2, 3), {"one.weight": None, "two.weight": None}, set()),  # noqa: E501
    "a bias that is loose": (lambda: Called(lambda m, x: m.one(x) * m.one.bias, one=nn.Linear(3, 3)), torch.randn(2, 3), {"one.weight": None}, set()),  # noqa: E501
    "a weight that is loose": (lambda: Called(lambda m, x: m.one(x) @ m.one.weight, one=nn.Linear(3, 3)), torch.randn(2, 3), {}, set()),  # noqa: E501
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 2), torch.randn(2, 2, 4), {"weight": None}, set()),
    "embedding": (lambda: nn.Embedding(3, 3), torch.tensor([1]), {"weight": None}, set()),
    "embedding and head": (lambda: Called(embedding_and_head, one=nn.Embedding(3, 3)), torch.tensor([1]), {}, {"one.weight"}),  # noqa: E501
    "convolution and its transposed": (lambda: Called(lambda m, x: F.conv_transpose1d(m.one(x), m.one.weight), one=nn.Conv1d(2, 3, 2)), torch.randn(2, 2, 4), {}, {"one.weight"}),  # noqa: E501
    "a scale that is also a bias": (lambda: Called(lambda m, x: F.linear(m.one(x), m.two.weight, m.one.weight), one=nn.LayerNorm(3), two=nn.Linear(3, 3)), torch.randn(2, 3), {"two.weight": None}, {"one.weight"}),  # noqa: E501
    "one weight in all places": (lambda: Called(one_weight_in_all_places, one=nn.Linear(3, 3), two=nn.Linear(1, 9)), torch.randn(4, 2, 3), {"one.weight": None}, set()),  # noqa: E501
    "attention of other widths": (lambda: Called(lambda m, x: m.one(x, x[..., :2], x[..., :2])[0], one=nn.MultiheadAttention(3, 1, kdim=2, vdim=2)), torch.randn(2, 2, 3), {"one.q_proj_weight": None, "one.k_proj_weight": None, "one.v_proj_weight": None, "one.out_proj.weight": "one.out_proj.bias"}, set()),  # noqa: E501
}
# fmt: on


@pytest.mark.parametrize("name", BLOCKS)
def test_which_weights_have_a_block_and_which_biases_join_them(name: str) -> None:
    make, x, blocks, mixed = BLOCKS[name]
    model = make()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with watch_uses(params) as uses:
        outputs = model(x)
    reached = coverage(uses, params, outputs)
    found = find_blocks(uses, params, reached.known)
    assert {block.weight: block.bias for block in found[0]} == blocks
    assert found[1] == mixed
    (learned,) = learn(Objective(model, F.mse_loss, (x,), torch.zeros_like(outputs)))
    assert learned.keys() == (reached.known | reached.loose) - set(blocks.values())
    assert {n for n, one in learned.items() if isinstance(one, Kronecker)} == set(blocks)


def test_attention_has_blocks_and_what_the_loss_does_not_reach_has_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8)
    (found,) = learn(Objective(SelfAttention(True), F.mse_loss, x, x))
    assert found.keys() == {"attention.in_proj_weight", "attention.out_proj.weight"}
    (found,) = learn(Objective(Unused(), F.mse_loss, torch.randn(4, 5), torch.randn(4, 3)))
    assert found.keys() == {"used.weight"}
    model = FreeParameter()
    model.idle = nn.Parameter(torch.ones(2))
    (found,) = learn(Objective(model, F.mse_loss, torch.randn(4, 5), torch.randn(4, 3)))
    assert found.keys() == {"linear.weight", "scale"}
    nothing = Called(lambda m, x: (x + 0 * m.one.bias.detach()).requires_grad_(), one=nn.Linear(3, 3))
    assert learn(Objective(nothing, F.mse_loss, torch.randn(4, 3), torch.randn(4, 3))) == [{}]


def test_a_text_of_nothing_but_padding_gives_numbers() -> None:
    model, loss_fn, (x, y) = problem("text")
    (found,) = learn(Objective(model, loss_fn, torch.zeros_like(x), y))
    assert not any(tensor.isnan().any() for one in found.values() for tensor in tensors_of(one))


def tensors_of(one: Kronecker | Diagonal) -> list[Tensor]:
    return [one.a, one.g] if isinstance(one, Kronecker) else [one.values]


def test_bfloat16_models_have_float32_statistics() -> None:
    for name in ("text", "free parameter", "LSTM", "attention"):
        model, loss_fn, (x, y) = problem(name)
        x = x.bfloat16() if x.is_floating_point() else x
        (found,) = learn(Objective(model.bfloat16(), loss_fn, x, y))
        assert {tensor.dtype for one in found.values() for tensor in tensors_of(one)} == {torch.float32}
