"""K-FAC on copies of a model in two and four processes takes the steps of one, and divides its factors among them."""

from __future__ import annotations

import copy
import functools
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hesse
from hesse.objective.replicas import Replicas
from hesse.optim import KFAC, GaussNewton, kfac
from hesse.optim.factors import CURVATURE
from problems import Problem, as_double, mlp, problem
from processes import in_processes
from tolerances import ALGEBRA

STEPS = 14  # beyond the burn-in, so that some use statistics and inverses of steps before

EXACT = (
    "mlp, cross-entropy",
    "mlp, binary cross-entropy",
    "mlp, squared error",
    "convnet",
    "convnet, grouped",
    "text",
    "attention",
    "transformer, eval",
    "RNN",
    "LSTM",
)
LOOSE = ("free parameter", "tied weights", "weight norm")
SHOWN = ("lr", "momentum", "damping", "trust_ratio", "effective_dimension")


def made(name: str) -> Problem:
    p = as_double(problem(name))
    x, y = p.batch
    # A token of padding counts for nothing, and one part may have more of them than another.
    return Problem(p.model, p.loss_fn, (x if x.is_floating_point() else x.clamp(min=1), y))


def part(p: Problem, rank: int, size: int) -> tuple[Tensor, Tensor]:
    x, y = (t.chunk(size)[rank] for t in p.batch)
    return x, y


def place() -> tuple[int, int]:
    """This process's number and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def replica(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if torch.distributed.is_initialized() else model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def kept(optimizer: KFAC) -> int:
    """Numbers in factors and inverses."""
    return sum(v.numel() for state in optimizer.state.values() for key, v in state.items() if key in CURVATURE)


def begin(p: Problem, **settings: Any) -> tuple[KFAC, Callable[[], Any]]:
    """An optimiser, and the closure of this process's part of the batch, which in one process is the whole."""
    model, batch = replica(p.model), part(p, *place())
    return KFAC(model, **settings), lambda: hesse.closure(model, p.loss_fn, batch)


def train(p: Problem, steps: int = STEPS, **settings: Any) -> dict[str, Any]:
    optimizer, closure = begin(p, **settings)
    losses = torch.stack([optimizer.step(closure()) for _ in range(steps)])
    found = [optimizer.param_groups[0][key] for key in SHOWN]
    return {"weights": weights(p.model), "losses": losses.tolist(), "found": found, "kept": kept(optimizer)}


def exactly(p: Problem, **settings: Any) -> dict[str, Any]:
    """With exact products: kernels round a part of a batch otherwise than the whole, and differences carry that on."""
    agree, kfac.AGREE = kfac.AGREE, 0.0
    try:
        return train(p, **settings)
    finally:
        kfac.AGREE = agree


# -- cases, each run in every process ------------------------------------------------------------------------------


def deep() -> Problem:
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(12, 12), nn.Tanh())]
    x = torch.randn(24, 12, dtype=torch.float64)
    return Problem(nn.Sequential(*layers).double(), F.mse_loss, (x, x.flip(1)))


def broken() -> dict[str, Any]:
    """A NaN in the last process's part, after five good steps."""
    p = made("convnet, BatchNorm")
    optimizer, closure = begin(p)
    for _ in range(5):
        optimizer.step(closure())
    before, rejected = copy.deepcopy(p.model.state_dict()), optimizer.param_groups[0]["rejections"]
    rank, size = place()
    x, y = part(p, rank, size)
    good = closure()
    loss = optimizer.step(hesse.closure(good.model, p.loss_fn, (x * (torch.nan if rank == size - 1 else 1), y)))
    return {
        "untouched": all(torch.equal(value, before[name]) for name, value in p.model.state_dict().items()),
        "rejected": optimizer.param_groups[0]["rejections"] - rejected,
        "loss": float(loss),
        "later": float(optimizer.step(good)),
        "weights": weights(p.model),
    }


def resumed() -> dict[str, Any]:
    """From its own state, saved after eleven steps; and from the first process's, which lacks what others keep."""
    p = made("text")
    optimizer, closure = begin(p)
    for _ in range(11):
        optimizer.step(closure())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved, model = torch.load(file, weights_only=True), copy.deepcopy(p.model)
    states = [saved]
    torch.distributed.broadcast_object_list(states)
    for _ in range(4):
        optimizer.step(closure())
    found = {"uninterrupted": weights(p.model), "kept": kept(optimizer)}
    for key, state in (("own", saved), ("first", states[0])):
        q = Problem(copy.deepcopy(model), p.loss_fn, p.batch)
        second, again = begin(q)
        second.load_state_dict(state)
        losses = [float(second.step(again()))]  # not one at which statistics would have been due
        found[f"{key}, kept"] = kept(second)
        losses += [float(second.step(again())) for _ in range(3)]
        found |= {key: weights(q.model), f"{key}, losses": losses}
    return found


def torchs_own(kind: str) -> dict[str, Any]:
    """An optimiser of torch on a hesse closure of the replica; or AdamW in a loop of torch alone."""
    p = made("mlp, cross-entropy")
    model, (x, y) = replica(p.model), part(p, *place())
    if kind == "LBFGS":
        optimizer: torch.optim.Optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2 if kind == "LBFGS" else STEPS):
        if kind == "plain loop":
            optimizer.zero_grad()
            p.loss_fn(model(x), y).backward()
            optimizer.step()
        else:
            losses.append(float(optimizer.step(hesse.closure(model, p.loss_fn, (x, y)))))
    return {"weights": weights(p.model), "losses": losses}


class Branches(nn.Module):
    """The sign of the first input decides which layer is used."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left if x[0, 0] > 0 else self.right)(x).tanh())


def branches() -> dict[str, Any]:
    """Processes that use different layers at most steps."""
    torch.manual_seed(0)
    x = torch.randn(24, 5, dtype=torch.float64)
    p = Problem(Branches().double(), F.cross_entropy, (x, x[:, :3].argmax(1)))
    optimizer, closure = begin(p)
    rank, size = place()
    x, _ = part(p, rank, size)  # a view of the batch in the closure
    losses = []
    for i in range(12):
        x[0, 0] = x[0, 0].abs() * (1 if i % 3 == 0 or (rank + i) % 2 else -1)
        losses.append(float(optimizer.step(closure())))
    return {"weights": weights(p.model), "losses": losses}


def uneven() -> dict[str, Any]:
    """A part larger than the others."""
    p = made("mlp, cross-entropy")
    model, (rank, size) = replica(p.model), place()
    x, y = (t[:14] if rank == 0 else t[14:].chunk(size - 1)[rank - 1] for t in p.batch)
    optimizer = KFAC(model)
    losses = [float(optimizer.step(hesse.closure(model, p.loss_fn, (x, y)))) for _ in range(STEPS)]
    return {"weights": weights(p.model), "losses": losses}


def refusals() -> dict[str, str]:
    p = made("mlp, squared error")
    model, found = replica(p.model), {}
    attempts: dict[str, Callable[[], Any]] = {
        "GaussNewton": lambda: GaussNewton(model),
        "EKFAC": lambda: KFAC(model, ekfac=True),
        "closure": lambda: KFAC(p.model).step(hesse.closure(model, p.loss_fn, p.batch)),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    return found


def fourth_power(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).pow(4).mean()


CASES: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(lambda name: exactly(made(name)), name) for name in EXACT},
    "deep": lambda: exactly(deep()),
    "penalties": lambda: exactly(made("mlp, squared error"), weight_decay=1e-2, l1=1e-3),
    "differences": lambda: train(made("mlp, cross-entropy")),
    "own loss": lambda: train(made("mlp, squared error")._replace(loss_fn=fourth_power)),
    **{name: functools.partial(lambda name: train(made(name)), name) for name in LOOSE},
    "broken": broken,
    "resumed": resumed,
    **{kind: functools.partial(torchs_own, kind) for kind in ("AdamW", "plain loop", "LBFGS")},
    "branches": branches,
    "uneven": uneven,
    "refusals": refusals,
}
OF_FOUR = ("mlp, cross-entropy", "convnet", "text", "deep", "broken", "resumed", "branches", "uneven")


def run(rank: int, size: int) -> dict[str, Any]:
    return {name: CASES[name]() for name in (OF_FOUR if size == 4 else CASES)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """What every case came to in each of so many processes, which are started once."""

    @functools.cache
    def of(size: int) -> list[dict[str, Any]]:
        return in_processes(run, tmp_path_factory.mktemp("replicas"), size)

    return of


def in_two_and_four(*names: str) -> pytest.MarkDecorator:
    pairs = [(name, size) for name in names for size in (2, 4) if size == 2 or name in OF_FOUR]
    return pytest.mark.parametrize(("name", "size"), pairs)


Outcomes = Callable[[int], list[dict[str, Any]]]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **ALGEBRA)


# -- what is true --------------------------------------------------------------------------------------------------


@in_two_and_four(*EXACT, "deep", "penalties")
def test_several_processes_are_one(name: str, size: int, outcomes: Outcomes) -> None:
    alone = CASES[name]()
    for found in outcomes(size):
        close(found[name]["weights"], alone["weights"])
        assert found[name]["losses"] == pytest.approx(alone["losses"], rel=1e-10)
        assert found[name]["found"] == pytest.approx(alone["found"], rel=1e-8)  # a ratio of small differences
    assert alone["losses"][-1] < 0.9 * alone["losses"][0]


AVERAGED = ("differences", "own loss", *LOOSE, "branches", "uneven")


@in_two_and_four(*EXACT, "deep", "penalties", *AVERAGED, "broken")
def test_processes_take_the_same_steps_to_the_last_bit(name: str, size: int, outcomes: Outcomes) -> None:
    first, *others = outcomes(size)
    assert all(same(found[name]["weights"], first[name]["weights"]) for found in others)


@in_two_and_four(*AVERAGED)
def test_what_is_one_process_on_average_only_trains_all_the_same(name: str, size: int, outcomes: Outcomes) -> None:
    losses = outcomes(size)[0][name]["losses"]
    assert losses[-1] < 0.8 * losses[0]


def test_products_by_differences_change_no_decision(outcomes: Outcomes) -> None:
    alone = train(made("mlp, cross-entropy"))
    # Differences have half the digits: as much of a step is alike.
    assert outcomes(2)[0]["differences"]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@in_two_and_four("deep")
def test_each_process_keeps_its_share_of_the_factors(name: str, size: int, outcomes: Outcomes) -> None:
    whole, shares = CASES[name]()["kept"], [found[name]["kept"] for found in outcomes(size)]
    assert sum(shares) == whole
    assert max(shares) == whole / size  # eight layers of one size


@in_two_and_four("broken")
def test_a_nan_in_one_part_makes_all_reject(name: str, size: int, outcomes: Outcomes) -> None:
    for found in outcomes(size):
        assert found[name]["untouched"]
        assert found[name]["rejected"] == 1
        assert math.isnan(found[name]["loss"])
        assert math.isfinite(found[name]["later"])


@in_two_and_four("resumed")
def test_each_process_resumes_from_its_own_state_as_if_never_interrupted(
    name: str, size: int, outcomes: Outcomes
) -> None:
    for found in outcomes(size):
        assert same(found[name]["own"], found[name]["uninterrupted"])


@in_two_and_four("resumed")
def test_a_state_without_what_a_process_keeps_makes_that_anew(name: str, size: int, outcomes: Outcomes) -> None:
    for found in outcomes(size):
        assert same(found[name]["first"], outcomes(size)[0][name]["first"])
        assert found[name]["first, kept"] == found[name]["kept"]
        assert found[name]["first, losses"][-1] < found[name]["first, losses"][0]


def test_adamw_on_a_closure_of_the_replica_is_plain_distributed_training(outcomes: Outcomes) -> None:
    for found in outcomes(2):
        assert same(found["AdamW"]["weights"], found["plain loop"]["weights"])
        close(found["AdamW"]["weights"], torchs_own("plain loop")["weights"])


def test_line_searches_of_torch_see_the_loss_of_all(outcomes: Outcomes) -> None:
    alone = torchs_own("LBFGS")
    for found in outcomes(2):
        close(found["LBFGS"]["weights"], alone["weights"])
        assert found["LBFGS"]["losses"] == pytest.approx(alone["losses"], rel=1e-10)


def test_what_works_in_one_process_only_says_so(outcomes: Outcomes) -> None:
    for found in outcomes(2):
        for name, words in (("GaussNewton", "one process"), ("EKFAC", "one process"), ("closure", "same object")):
            assert words in found["refusals"][name]


def test_a_step_leaves_the_random_numbers_of_others_alone() -> None:
    before = torch.get_rng_state()
    train(made("mlp, cross-entropy"), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_one_process_sends_nothing() -> None:
    alone, x = Replicas(mlp()), torch.randn(3)
    for act in (alone.mean_, alone.sum_):
        y = x.clone()
        act([y])
        assert torch.equal(y, x)
    assert alone.gather(x) is x
    assert alone.same(x)
    assert copy.deepcopy(alone) is alone
