"""Where the examples of a batch are, against backward passes of one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from hesse.curvature.examples import Examples, example_dims, guess_examples, powers
from hesse.curvature.layers import Entries, Lookups, Rows, rows_of
from hesse.curvature.uses import Use, output_gradients, watch_uses
from tolerances import ALGEBRA


def watched(module: nn.Module, x: Any) -> tuple[list[Use], Tensor, Tensor]:
    """The uses of one forward pass, its outputs, and something random to send back."""
    with watch_uses(dict(module.named_parameters())) as uses:
        outputs = module(x)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    r = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return uses, outputs, r.to(outputs.dtype)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Called(nn.Module):
    """A module called by a function."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x: Any) -> Any:
        return self.call(self.module, x)


def places(module: nn.Module, x: Tensor, batch: int) -> list[Examples | None]:
    uses, outputs, r = watched(module, x)
    factors = powers(batch)
    scaled = output_gradients(uses, outputs, r * factors.view(-1, *[1] * (r.ndim - 1)))
    found = example_dims(uses, output_gradients(uses, outputs, r), scaled, factors)
    for use, place in zip(uses, found, strict=True):
        if place is not None:
            assert_each_example_is_its_own(use, place, outputs, r)
    return found


def assert_each_example_is_its_own(use: Use, place: Examples, outputs: Tensor, r: Tensor) -> None:
    """Row b of a use is what only the outputs of example b give."""
    (g,) = output_gradients([use], outputs, r)
    assert g is not None
    rows = rows_of(use, g, place)
    for b in range(place.batch):
        only = torch.zeros_like(r)
        only[b] = r[b]
        (alone,) = output_gradients([use], outputs, only)
        assert alone is not None
        for name, found in rows_of(use, alone).items():
            mine = rows[name]
            if isinstance(mine, Rows):
                mine = Rows(mine.a[b : b + 1], mine.g[b : b + 1])
            elif isinstance(mine, Lookups):
                mine = Lookups(mine.index[b : b + 1], mine.g[b : b + 1], mine.padding, mine.size)
            else:
                mine = Entries(mine.grads[b : b + 1])
            torch.testing.assert_close(mine.total(), found.total(), **ALGEBRA)


def folded(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


PLACES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Examples]] = {
    "first": (lambda: nn.Linear(3, 2), (4, 3), Examples(0, 4)),
    "first, as long as the sequence": (lambda: nn.Linear(3, 2), (4, 4, 3), Examples(0, 4)),
    "second": (
        lambda: Called(nn.Linear(3, 2), lambda m, x: m(x.transpose(0, 1)).transpose(0, 1)),
        (4, 4, 3),
        Examples(1, 4),
    ),
    "folded": (lambda: Called(nn.Linear(3, 2), folded), (4, 5, 3), Examples(0, 4)),
    "folded, last": (
        lambda: Called(nn.Linear(3, 2), lambda m, x: folded(m, x.transpose(0, 1)).transpose(0, 1)),
        (4, 5, 3),
        Examples(0, 4, False),
    ),
    "images": (lambda: nn.Conv2d(3, 2, 2), (4, 3, 4, 4), Examples(0, 4)),
    "frames": (lambda: Called(nn.Conv1d(3, 2, 2), folded), (4, 5, 3, 6), Examples(0, 4)),
    "norm": (lambda: nn.LayerNorm(4), (4, 4, 4), Examples(0, 4)),
    "norm in eval mode": (lambda: nn.BatchNorm1d(4).eval(), (4, 4, 4), Examples(0, 4)),
    "attention": (
        lambda: Called(nn.MultiheadAttention(4, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
        (4, 4, 4),
        Examples(1, 4),
    ),
    "recurrence": (lambda: nn.GRU(3, 2, batch_first=True), (4, 4, 3), Examples(1, 4)),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_the_examples_are_is_proved(name: str) -> None:
    torch.manual_seed(0)
    make, shape, expected = PLACES[name]
    found = places(make().double(), noise(*shape), shape[0])
    states = [Examples(0, shape[0])] if name == "recurrence" else []  # a state has no dimension of time
    assert found == [expected] + (states * shape[1] if states else [expected] * (len(found) - 1))


def test_examples_of_tokens() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(5, (4, 4))
    assert places(nn.Embedding(5, 3, padding_idx=0).double(), tokens, 4) == [Examples(0, 4)]
    positions = Called(nn.Embedding(4, 3).double(), lambda m, x: m(torch.arange(4)) + torch.zeros(4, 4, 3))
    assert places(positions, tokens, 4) == [None]


def test_examples_of_packed_sequences() -> None:
    torch.manual_seed(0)
    packed = pack_sequence([noise(4, 3), noise(2, 3), noise(1, 3)])
    network = Called(nn.LSTM(3, 2), lambda m, x: m(x)[1][0][0]).double()  # last states, [B, 2]
    found = places(network, packed, 3)
    assert found == [Examples(0, 3)] * 5


MIXED: dict[str, nn.Module] = {
    "batch norm": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
    "attention across the batch": Called(nn.MultiheadAttention(3, 1), lambda m, x: m(x, x, x)[0]),
    "another order": Called(nn.Linear(3, 3), lambda m, x: m(x).flip(0)),
    "pairs": Called(nn.Linear(3, 3), lambda m, x: m(x) + m(x).mean(0)),
    "no batch": Called(nn.Linear(3, 3), lambda m, x: x * m(x.new_ones(3))),
}


@pytest.mark.parametrize("name", MIXED)
def test_where_examples_mix_they_have_no_place(name: str) -> None:
    torch.manual_seed(0)
    found = places(MIXED[name].double(), noise(6, 3), 6)
    assert None in found


def test_a_guess_by_size_is_made_only_where_one_dimension_fits() -> None:
    uses = watched(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(4, 5, 3))[0]
    assert guess_examples(uses[0], 4) == Examples(0, 4)
    assert guess_examples(uses[0], 5) == Examples(1, 5)
    assert guess_examples(uses[0], 3) is None  # features are no examples
    uses = watched(nn.Linear(3, 3), torch.randn(4, 4, 3))[0]
    assert guess_examples(uses[0], 4) is None
