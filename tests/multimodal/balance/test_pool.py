"""The pool: shares by brute force, Bayes' rule, absent modalities, several targets, falling back and saying so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hesse
from balanced_models import SIZES, THREE, K, Towers, batch, flat, make
from hesse.curvature.jacobian import jvp, secant
from hesse.multimodal.balance import Pool, fallback
from hesse.multimodal.balance.shares import best_constant, pooled, shares

ONE = torch.zeros(K, dtype=torch.int64)


def experts(rows: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [3, N, K] of one who knows, one who knows a little and one who guesses, and targets [N]."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(K, (rows,), generator=g)
    right = F.one_hot(targets, K).double()
    noise = torch.randn(3, rows, K, generator=g, dtype=torch.float64)
    return torch.tensor([2.0, 0.7, 0.0])[:, None, None] * right + noise, targets


def test_shares_are_the_best_on_a_grid() -> None:
    outputs, targets = experts()
    base, prior = torch.zeros(K), torch.full((2, 1), 0.5, dtype=torch.float64)

    def mean(o: Tensor) -> Tensor:
        return F.cross_entropy(o, targets)

    v = shares(mean, outputs[:2], base, prior, ONE)[:, 0]
    axis = torch.linspace(0, 3, 151, dtype=torch.float64)
    best = min(
        (float(mean(a * outputs[0] + b * outputs[1])) + ((a - 0.5) ** 2 + (b - 0.5) ** 2) / 600, float(a), float(b))
        for a in axis
        for b in axis
    )
    assert v.tolist() == pytest.approx(best[1:], abs=0.02)


def test_who_only_harms_has_no_share() -> None:
    outputs, targets = experts()
    outputs[2] = -outputs[0] + 0.3 * outputs[2]  # says the opposite of the best: a negative share would be of use
    v = shares(lambda o: F.cross_entropy(o, targets), outputs[1:], torch.zeros(K), torch.full((2, 1), 0.5), ONE)
    assert float(v[0]) > 0.1
    assert float(v[1]) == 0


def test_of_values_shares_are_nonnegative_least_squares() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(400, 1, generator=g, dtype=torch.float64)
    outputs = torch.stack([y + 0.5 * torch.randn(400, 1, generator=g), 0.5 * y + torch.randn(400, 1, generator=g)])
    X = outputs[:, :, 0].T
    wanted = torch.linalg.lstsq(X, y).solution[:, 0]
    one = torch.zeros(1, dtype=torch.int64)
    found = shares(lambda o: F.mse_loss(o, y), outputs, torch.zeros(1), torch.full((2, 1), 0.5), one)[:, 0]
    assert bool((wanted > 0).all())
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.01)


def test_several_targets_have_shares_of_their_own() -> None:
    a, y = experts(seed=1)
    b, z = experts(seed=2)
    outputs = torch.cat([a, b.flip(0)], dim=2)
    two = torch.arange(2 * K) // K
    prior = torch.full((3, 2), 0.5)
    found = shares(
        lambda o: F.cross_entropy(o[:, :K], y) + F.cross_entropy(o[:, K:], z), outputs, torch.zeros(2 * K), prior, two
    )
    first = shares(lambda o: F.cross_entropy(o, y), a, torch.zeros(K), prior[:, :1], ONE)
    second = shares(lambda o: F.cross_entropy(o, z), b.flip(0), torch.zeros(K), prior[:, :1], ONE)
    torch.testing.assert_close(found, torch.cat([first, second], dim=1), rtol=1e-3, atol=1e-3)


def test_the_best_constant_is_the_class_frequencies_and_the_mean() -> None:
    targets = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    a = best_constant(lambda o: F.cross_entropy(o, targets), torch.zeros(100, 3))
    torch.testing.assert_close(a.softmax(0), torch.tensor([0.6, 0.3, 0.1]), rtol=0.05, atol=0.01)
    values = torch.linspace(0, 4, 101)[:, None]
    assert float(best_constant(lambda o: F.mse_loss(o, values), values)) == pytest.approx(2, abs=0.05)


def test_of_independent_witnesses_the_pool_with_ones_is_bayes_rule() -> None:
    g = torch.Generator().manual_seed(0)
    prior = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    likelihoods = torch.rand(2, 5, 3, generator=g, dtype=torch.float64)  # of what is seen, by witness, row and class
    posterior = (likelihoods * prior).log().log_softmax(2)
    wanted = (likelihoods.prod(0) * prior).log().log_softmax(1)
    found = pooled(posterior, prior.log(), torch.ones(2, 3)).log_softmax(1)
    torch.testing.assert_close(found, wanted)
    only = pooled(posterior, prior.log(), torch.tensor([[1.0], [0.0]]).expand(2, 3)).log_softmax(1)
    torch.testing.assert_close(only, posterior[0])


def trained(rows: int = 120, steps: int = 60, sizes: Any = SIZES, **settings: Any) -> Any:
    pool = make(Pool, sizes, **settings)
    optimizer = torch.optim.AdamW(pool.parameters(), lr=0.02)
    inputs, targets = batch(rows, sizes, absent=True)
    for _ in range(steps):
        optimizer.zero_grad()
        pool.loss(F.cross_entropy)(pool(**inputs), targets).backward()
        optimizer.step()
    return pool


def test_every_combination_has_the_shares_that_its_rows_ask_for() -> None:
    pool = trained(sizes=THREE)
    inputs, targets = batch(200, THREE, seed=4)
    pool.fit(F.cross_entropy, [(inputs, targets)])
    pool.eval()
    losses = {}
    for members in ((0,), (1,), (0, 2), (0, 1, 2)):
        shown = {
            key: (x, here if i in members else torch.zeros_like(here))
            for i, (key, (x, here)) in enumerate(inputs.items())
        }
        losses[members] = float(F.cross_entropy(pool(**shown), targets).detach())
        v = pool.v[sum(2**m for m in members), :, 0]
        assert [i for i in range(3) if float(v[1 + i]) > 0 and i not in members] == []
        features = pool.features(**shown)
        own = pool.own(features, {})
        outputs = [pool.model(**shown), *(own[key] for key in THREE)]
        by_hand = pool.base + sum(float(w) * (o - pool.base) for w, o in zip(v, outputs, strict=True))
        torch.testing.assert_close(pool(**shown), by_hand)
    assert losses[0, 1, 2] < losses[0, 2] < losses[0,] < losses[1,]


def test_rows_are_answered_by_those_who_are_there() -> None:
    pool = trained()
    pool.fit(F.cross_entropy, [batch(80, absent=True, seed=5)])
    pool.eval()
    inputs, _ = batch(10, absent=True, seed=6)
    whole = pool(**inputs)
    for i in range(10):
        torch.testing.assert_close(
            pool(**{k: (x[i : i + 1], h[i : i + 1]) for k, (x, h) in inputs.items()})[0], whole[i]
        )
    absurd = {key: (torch.where(here[:, None], x, torch.inf), here) for key, (x, here) in inputs.items()}
    assert bool(pool(**absurd).isfinite().all())


def test_with_nobody_there_the_answer_is_the_constant() -> None:
    pool = trained()
    pool.fit(F.cross_entropy, [batch(80, seed=5)])
    pool.eval()
    pool.v[0] = 0
    inputs, _ = batch(3)
    nobody = {key: (x, torch.zeros_like(here)) for key, (x, here) in inputs.items()}
    torch.testing.assert_close(pool(**nobody), pool.base.expand(3, -1))


def test_the_pool_is_better_calibrated_and_no_worse_than_its_parts() -> None:
    pool = trained(steps=200)
    inputs, targets = batch(400, seed=7)
    pool.fit(F.cross_entropy, [(inputs, targets)])
    fresh, answers = batch(400, seed=8)
    parts, _ = pool.split(pool.parts(**fresh))
    whole = float(F.cross_entropy(pool.predict(**fresh), answers).detach())
    assert whole < min(float(F.cross_entropy(o, answers).detach()) for o in parts.values())
    assert int(pool.alone) == -1
    assert fallback(pool) is None


def test_who_fails_on_validation_rows_is_not_asked_and_a_finding_says_so() -> None:
    pool = trained()
    inputs, targets = batch(200, seed=9)
    others = torch.roll(torch.arange(200), 1)  # another class: sure and wrong
    inputs["audio"] = (inputs["audio"][0][others], inputs["audio"][1])
    shares_found = pool.fit(F.cross_entropy, [(inputs, targets)])
    assert shares_found["fused"] == 0 and shares_found["audio"] == 0 and shares_found["image"] > 0
    pool.eval()
    own = pool.heads["image"](pool.features(**inputs)["image"])
    torch.testing.assert_close(
        pool(**inputs), pool.base + shares_found["image"] * (own - pool.base), rtol=1e-5, atol=1e-6
    )
    finding = fallback(pool)
    assert finding is not None
    assert (finding.kind, finding.where, finding.severity) == ("fallback", "image", "warning")
    assert "image alone" in finding.message
    assert finding.evidence["together"] >= finding.evidence["alone"] - finding.evidence["standard error"] - 1e-6


def test_of_a_few_rows_nobody_is_sent_away() -> None:
    pool = trained()
    inputs, targets = batch(39, seed=9)
    others = torch.roll(torch.arange(39), 1)
    inputs["audio"] = (inputs["audio"][0][others], inputs["audio"][1])
    pool.fit(F.cross_entropy, [(inputs, targets)])
    assert int(pool.alone) == -1 and fallback(pool) is None


def test_who_adds_nothing_but_noise_is_not_asked() -> None:
    pool = trained(steps=200)
    inputs, targets = batch(200, seed=9)
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    inputs["audio"] = (inputs["audio"][0][shuffled], inputs["audio"][1])
    found = pool.fit(F.cross_entropy, [(inputs, targets)])
    alone, together, error = pool.verdict.tolist()
    assert together > alone - error
    assert int(pool.alone) == 0
    assert [key for key, share in found.items() if share > 0] == ["image"]


@pytest.mark.parametrize("reach", [0.0, 0.3, 1.0])
def test_the_fused_loss_reaches_the_towers_as_far_as_it_may(reach: float) -> None:
    pool = make(Pool, reach=reach)
    inputs, targets = batch(absent=True)
    fused = F.cross_entropy(pool.model(**inputs), targets)
    params = list(pool.model.encoders.parameters())
    head = list(pool.model.head.parameters())
    whole = torch.autograd.grad(fused, [*params, *head])
    loss = pool.loss(F.cross_entropy)(pool(**inputs), targets)
    own = make(Pool, reach=0.0)
    apart = own.loss(F.cross_entropy)(own(**inputs), targets)
    found = torch.autograd.grad(loss, [*params, *head])
    alone = torch.autograd.grad(apart, list(own.model.encoders.parameters()))
    n = len(params)
    torch.testing.assert_close(flat(found[:n]), flat(alone) + reach * flat(whole[:n]))
    torch.testing.assert_close(found[n:], whole[n:])


@pytest.mark.parametrize("reach", [0.0, 0.3, 1.0])
def test_gradient_curvature_and_trial_points_are_of_one_function(reach: float) -> None:
    """Of the fused head at features that go ``reach`` of the towers' way from those at the beginning of the step."""
    pool = make(Pool, reach=reach)
    inputs, targets = batch(absent=True)
    here = {key: there for key, (_, there) in inputs.items()}
    closure = hesse.closure(pool, pool.loss(F.cross_entropy), (inputs, targets))
    closure()
    begun = {key: f.detach() for key, f in pool.features(**inputs).items()}
    torch.testing.assert_close(pool.split(closure.outputs)[0]["fused"], pool.model(**inputs))  # the towers stand there
    direction = {name: torch.randn_like(p) for name, p in pool.named_parameters()}
    params = {name: p.detach() for name, p in pool.named_parameters()}
    moved = {name: p + 0.1 * direction[name] for name, p in params.items()}
    with torch.no_grad():
        fused, _ = pool.split(closure.objective.outputs(moved))
    other = make(Pool, reach=reach)
    other.load_state_dict({**other.state_dict(), **moved})
    features = other.features(**inputs)
    way = {key: begun[key] + reach * (f - begun[key]) for key, f in features.items()}
    torch.testing.assert_close(fused["fused"], other.model.fuse(way, here))
    torch.testing.assert_close(fused["audio"], other.own(features, here)["audio"])
    exact = jvp(closure.objective, direction)
    torch.testing.assert_close(
        secant(closure.objective, closure.outputs.detach(), direction), exact, rtol=1e-5, atol=1e-6
    )
    slope = sum(float((p.grad * direction[name]).sum()) for name, p in pool.named_parameters())
    change = (
        closure.objective({n: p + 1e-6 * direction[n] for n, p in params.items()}) - closure.objective(params)
    ) / 1e-6
    assert float(change) == pytest.approx(slope, rel=1e-4)


def test_other_rows_and_other_steps_begin_anew() -> None:
    pool = make(Pool, reach=0.3)
    (one, targets), (two, _) = batch(), batch(seed=1)
    loss_fn = pool.loss(F.cross_entropy)
    step = torch.optim.SGD(pool.parameters(), lr=0.5)
    for _ in range(2):  # the second step on the same rows starts where the first has ended
        step.step(hesse.closure(pool, loss_fn, (one, targets)))
        torch.testing.assert_close(pool.split(pool(**one))[0]["fused"], pool.model(**one))
    with torch.no_grad():
        torch.testing.assert_close(pool.split(pool(**two))[0]["fused"], pool.model(**two))


def test_a_regression_is_pooled() -> None:
    torch.manual_seed(0)
    model = Towers(outputs=1)
    pool = Pool(model, 1, model.widths).double()
    inputs, classes = batch(200)
    targets = classes[:, None].double() - 1.5
    optimizer = torch.optim.AdamW(pool.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        pool.loss(F.mse_loss)(pool(**inputs), targets).backward()
        optimizer.step()
    fresh, answers = batch(200, seed=3)
    values = answers[:, None].double() - 1.5
    pool.fit(F.mse_loss, [(fresh, values)])
    parts, _ = pool.split(pool.parts(**fresh))
    whole = float(F.mse_loss(pool.predict(**fresh), values).detach())
    assert whole < min(float(F.mse_loss(o, values).detach()) for o in parts.values()) + 1e-3


def test_many_modalities_share_one_row_of_shares() -> None:
    sizes = {f"m{i}": 2 for i in range(6)}
    pool = make(Pool, sizes)
    inputs, targets = batch(60, sizes)
    pool.fit(F.cross_entropy, [(inputs, targets)])
    assert pool.v.shape == (1, 7, 1)
    pool.eval()
    pool.v.fill_(0.5)
    inputs["m3"] = (inputs["m3"][0], torch.zeros(60, dtype=torch.bool))
    found = pool(**inputs)
    with torch.no_grad():
        pool.heads["m3"].bias.add_(100.0)
    torch.testing.assert_close(pool(**inputs), found)


def test_shares_are_saved_and_copied_with_the_weights() -> None:
    pool = trained()
    pool.fit(F.cross_entropy, [batch(80, seed=5)])
    inputs, _ = batch(seed=2)
    again = make(Pool, seed=3)
    again.load_state_dict(pool.state_dict())
    for other in (again, copy.deepcopy(pool)):
        torch.testing.assert_close(other.eval()(**inputs), pool.predict(**inputs))


def test_rows_without_a_target_and_empty_parts_do_no_harm() -> None:
    pool = trained()
    inputs, targets = batch(80, absent=True, seed=5)
    pool.fit(F.cross_entropy, [(inputs, torch.where(torch.arange(80) < 12, -100, targets))])
    assert bool(pool.v.isfinite().all())
    assert int(pool.alone) == -1
    inputs["audio"] = (inputs["audio"][0], torch.zeros(80, dtype=torch.bool))
    pool.fit(F.cross_entropy, [(inputs, targets)])
    assert pool.v[2].flatten().tolist() == [0.5, 0.0, 0.5]  # nobody has seen it: as before anything was known
    with pytest.raises(ValueError, match="needs validation rows"):
        pool.fit(F.cross_entropy, [])


def test_bad_arguments_are_named() -> None:
    model = Towers()
    with pytest.raises(ValueError, match="between 0 and 1; got 2"):
        Pool(model, K, model.widths, reach=2)
    with pytest.raises(ValueError, match=r"\(3, 2\) wide, which is not the 4 outputs"):
        Pool(model, K, model.widths, targets=(3, 2))
