"""What all cures share: the loss, absent modalities, several kinds of targets, every optimiser, processes, saving."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse
from balanced_models import SIZES, THREE, WIDTHS, Towers, batch, loss_by_rows, make
from hesse.curvature.output import output_curvature, term_gradients
from hesse.multimodal.balance import OGMGE, PMR, GBlend, Heads, MMPareto, Pool

# torch itself warns so when forward mode is first used in a process
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

CURES: dict[str, Any] = {
    "heads": Heads,
    "gblend": GBlend,
    "ogm_ge": OGMGE,
    "mmpareto": MMPareto,
    "pmr": PMR,
    "pool": Pool,
}
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda cure: torch.optim.SGD(cure.parameters(), lr=0.1),
    "adamw": lambda cure: torch.optim.AdamW(cure.parameters(), lr=0.01),
    "lbfgs": lambda cure: torch.optim.LBFGS(cure.parameters(), max_iter=4, line_search_fn="strong_wolfe"),
    "soap": lambda cure: hesse.optim.SOAP(cure.parameters(), lr=0.01),
    "kfac": lambda cure: hesse.optim.KFAC(cure),
    "gauss_newton": lambda cure: hesse.optim.GaussNewton(cure),
}


def begun(cls: Any, **settings: Any) -> Any:
    cure = make(cls, **settings)
    cure.begin_epoch(F.cross_entropy, [batch(absent=True)], [batch(absent=True, seed=1)])
    return cure


@pytest.mark.parametrize("absent", [False, True], ids=["all present", "some absent"])
@pytest.mark.parametrize("sizes", [SIZES, THREE], ids=["two", "three"])
def test_the_loss_is_that_of_the_parts_row_by_row(sizes: dict[str, int], absent: bool) -> None:
    cure = make(Heads, sizes, weights={"fused": 0.5, "audio": 2.0})
    inputs, targets = batch(sizes=sizes, absent=absent)
    features = cure.model.features(**inputs)
    wanted = 0.5 * F.cross_entropy(cure.model(**inputs), targets)
    for key, f in features.items():
        weight = 2.0 if key == "audio" else 1.0
        here = inputs[key][1]
        wanted = wanted + weight * here.double().mean() * loss_by_rows(cure.heads[key](f), targets, here)
    found = cure.loss(F.cross_entropy)(cure(**inputs), targets)
    torch.testing.assert_close(found, wanted)
    params = list(cure.parameters())
    torch.testing.assert_close(torch.autograd.grad(found, params), torch.autograd.grad(wanted, params))


@pytest.mark.parametrize("name", CURES)
def test_what_absent_rows_hold_makes_no_difference(name: str) -> None:
    losses, grads = [], []
    for filling in (0.0, 1e3):
        cure = begun(CURES[name])
        inputs, targets = batch(absent=True)
        inputs = {key: (torch.where(here[:, None], x, filling), here) for key, (x, here) in inputs.items()}
        torch.manual_seed(3)
        loss = cure.loss(F.cross_entropy)(cure(**inputs), targets)
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, list(cure.model.encoders.parameters())))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", CURES)
def test_a_modality_that_nobody_has_is_left_out(name: str) -> None:
    cure = begun(CURES[name])
    inputs, targets = batch()
    inputs["audio"] = (inputs["audio"][0], torch.zeros(len(targets), dtype=torch.bool))
    loss = cure.loss(F.cross_entropy)(cure(**inputs), targets)
    loss.backward()
    assert bool(loss.isfinite())
    for key, p in cure.named_parameters():
        assert p.grad is None or bool(p.grad.isfinite().all()), key
    assert all(p.grad is None or not p.grad.any() for p in cure.model.encoders["audio"].parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CURES)
def test_every_optimiser_trains_with_every_cure(name: str, optimizer: str) -> None:
    settings = {"gamma": 1.0} if name == "mmpareto" else {}
    cure = begun(CURES[name], **settings)
    step = OPTIMIZERS[optimizer](cure)
    inputs, targets = batch(40, absent=True)
    before = float(F.cross_entropy(cure.model(**inputs), targets).detach())
    torch.manual_seed(0)
    for _ in range(15):
        step.step(hesse.closure(cure, cure.loss(F.cross_entropy), (inputs, targets)))
    assert float(F.cross_entropy(cure.model(**inputs), targets).detach()) < 0.98 * before


WEIGHTED = functools.partial(F.cross_entropy, weight=torch.tensor([0.5, 2.0, 1.0, 0.2]).double())


@pytest.mark.parametrize("loss", [F.cross_entropy, WEIGHTED], ids=["plain", "class weights"])
@pytest.mark.parametrize("name", CURES)
def test_curvature_at_the_outputs_is_the_hessian_of_the_loss(name: str, loss: Any) -> None:
    cure = begun(CURES[name])
    inputs, targets = batch(7, absent=True)
    loss_fn = cure.loss(loss)
    made = cure(**inputs)
    loss_fn(made, targets)  # so that what depends on the batch is set
    outputs = made.detach()
    u = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dense = torch.autograd.functional.hessian(lambda o: loss_fn(o, targets), outputs)
    wanted = (dense.flatten(2).flatten(0, 1) @ u.flatten()).view_as(u)
    curvature = output_curvature(loss_fn, outputs, targets)
    torch.testing.assert_close(curvature.product(u), wanted)
    assert not wanted[:, -2:].any()  # that somebody is present is no output
    assert curvature.reduction == "mean"
    leaf = outputs.requires_grad_()
    (slope,) = torch.autograd.grad(loss_fn(leaf, targets), leaf)
    torch.testing.assert_close(term_gradients(loss_fn, outputs, targets, curvature), slope * len(targets))


@pytest.mark.parametrize("name", ["heads", "gblend", "mmpareto"])
def test_a_regression_has_heads_too(name: str) -> None:
    torch.manual_seed(0)
    model = Towers(outputs=1)
    cure = CURES[name](model, 1, model.widths).double()
    inputs, classes = batch(absent=True)
    targets = classes[:, None].double()
    cure.begin_epoch(F.mse_loss, [(inputs, targets)], [(inputs, targets)])
    loss = cure.loss(F.mse_loss)(cure(**inputs), targets)
    own = {key: head(model.features(**inputs)[key]) for key, head in cure.heads.items()}
    w = cure.weights.tolist()
    wanted = w[0] * F.mse_loss(model(**inputs), targets)
    for i, (key, o) in enumerate(own.items()):
        here = inputs[key][1]
        wanted = wanted + w[1 + i] * (o[here] - targets[here]).square().sum() / len(o)
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("name", ["ogm_ge", "pmr"])
def test_what_needs_classes_says_so(name: str) -> None:
    cure = begun(CURES[name])
    inputs, classes = batch()
    with pytest.raises(ValueError, match=r"is for classification .* are torch\.float64 of shape \[12, 1\]\. Use Heads"):
        cure.loss(F.mse_loss)(cure(**inputs), classes[:, None].double())


def test_a_modality_may_have_a_loss_of_its_own_and_targets_may_be_several() -> None:
    cure = make(Heads)
    inputs, targets = batch(absent=True)
    outputs = cure(**inputs)
    parts, present = cure.split(outputs)
    both = (targets, targets.double() / 2)

    def fused(o: torch.Tensor, t: Any) -> torch.Tensor:
        return F.cross_entropy(o, t[0]) + F.mse_loss(o[:, 0], t[1])

    def other(o: torch.Tensor, t: Any) -> torch.Tensor:
        return F.cross_entropy(o, t[0], label_smoothing=0.2)

    here = present["image"], present["audio"]
    wanted = fused(parts["fused"], both)
    shares = [float(there.double().mean()) for there in here]
    wanted = wanted + shares[0] * fused(parts["image"][here[0]], tuple(t[here[0]] for t in both))
    wanted = wanted + shares[1] * other(parts["audio"][here[1]], tuple(t[here[1]] for t in both))
    torch.testing.assert_close(cure.loss(fused, own={"audio": other})(outputs, both), wanted)


@pytest.mark.parametrize("name", CURES)
def test_a_saved_cure_goes_on_as_if_never_stopped(name: str) -> None:
    first = begun(CURES[name])
    step = torch.optim.AdamW(first.parameters(), lr=0.01)
    inputs, targets = batch(absent=True)
    again = None
    for i in range(4):
        if i == 2:
            saved = io.BytesIO()
            torch.save({"cure": first.state_dict(), "step": step.state_dict()}, saved)
            saved.seek(0)
            state = torch.load(saved, weights_only=True)
            again = make(CURES[name], seed=5)
            again.load_state_dict(state["cure"])
            step_again = torch.optim.AdamW(again.parameters(), lr=0.01)
            step_again.load_state_dict(state["step"])
            for cure, s in ((first, step), (again, step_again)):
                torch.manual_seed(7)
                cure.begin_epoch(F.cross_entropy, [batch(absent=True)], [batch(absent=True, seed=1)])
                for _ in range(2):
                    s.step(hesse.closure(cure, cure.loss(F.cross_entropy), (inputs, targets)))
            break
        step.step(hesse.closure(first, first.loss(F.cross_entropy), (inputs, targets)))
    assert again is not None
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CURES)
def test_a_copy_is_a_cure_of_its_own(name: str) -> None:
    cure = begun(CURES[name])
    inputs, targets = batch()
    cure.loss(F.cross_entropy)(cure(**inputs), targets).backward()
    other = copy.deepcopy(cure)
    torch.manual_seed(0)
    other.loss(F.cross_entropy)(other(**inputs), targets).backward()
    for a, b in zip(cure.parameters(), other.parameters(), strict=True):
        assert a is not b


@pytest.mark.parametrize("name", [name for name in CURES if name != "pool"])
def test_nothing_is_changed_where_nothing_is_trained(name: str) -> None:
    """Where a gradient does not come from the loss, the model is the plain one."""
    cure = begun(CURES[name])
    inputs, _ = batch()
    outputs = cure(**inputs)
    direct = torch.autograd.grad(outputs.sum(), list(cure.model.encoders.parameters()))
    features = cure.model.features(**inputs)
    own = cure.own(features, {key: here for key, (_, here) in inputs.items()})
    plain = cure.model(**inputs).sum() + sum(o.sum() for o in own.values())
    torch.testing.assert_close(direct, torch.autograd.grad(plain, list(cure.model.encoders.parameters())))


def test_the_model_is_trained_and_kept_apart_from_the_cure() -> None:
    cure = make(Heads)
    inputs, _ = batch()
    torch.testing.assert_close(cure.predict(**inputs), cure.model(**inputs))
    torch.testing.assert_close(cure.split(cure(**inputs))[0]["fused"], cure.model(**inputs))


def test_bad_arguments_are_named() -> None:
    model = Towers()
    with pytest.raises(ValueError, match="Heads balances two modalities or more; widths names image"):
        Heads(model, 4, {"image": 6})
    with pytest.raises(ValueError, match="got -1 for 'audio'"):
        Heads(model, 4, WIDTHS, weights={"audio": -1})
    with pytest.raises(ValueError, match="for 'smell'"):
        Heads(model, 4, WIDTHS, weights={"smell": 1})
    with pytest.raises(ValueError, match="may not be called 'fused'"):
        Heads(model, 4, {"image": 6, "fused": 4})
    with pytest.raises(ValueError, match="gamma is a positive number"):
        MMPareto(model, 4, WIDTHS, gamma=0)
    with pytest.raises(ValueError, match="alpha is a positive number"):
        OGMGE(model, 4, WIDTHS, alpha=0)
    with pytest.raises(ValueError, match="every is a whole number"):
        GBlend(model, 4, WIDTHS, every=0)
    with pytest.raises(ValueError, match="momentum is at least 0"):
        PMR(model, 4, WIDTHS, momentum=1.0)
    with pytest.raises(ValueError, match="mu is a number of 0 or more"):
        PMR(model, 4, WIDTHS, mu=-1)
    wrong = Heads(model, 4, {"image": 6, "sound": 4}).double()
    inputs, _ = batch()
    with pytest.raises(ValueError, match="was told of the modalities image, sound, and the model's features are"):
        wrong(image=inputs["image"], audio=inputs["audio"], sound=inputs["audio"])


def test_the_plain_model_is_found_when_nothing_has_a_weight() -> None:
    cure = make(Heads, weights={"image": 0, "audio": 0})
    inputs, targets = batch()
    loss = cure.loss(F.cross_entropy)(cure(**inputs), targets)
    torch.testing.assert_close(loss, F.cross_entropy(cure.model(**inputs), targets))


class Prepared(Towers):
    def prepare(self, inputs: Any) -> Any:
        return {key: (2 * x, here) for key, (x, here) in inputs.items()}


def test_preparing_is_the_models_own() -> None:
    inputs, _ = batch()
    assert Heads(Towers(), 4, WIDTHS).prepare(inputs) is inputs
    prepared = Heads(Prepared(), 4, WIDTHS).prepare(inputs)
    torch.testing.assert_close(prepared["image"][0], 2 * inputs["image"][0])


def test_heads_are_modules_of_their_own() -> None:
    cure = Heads(Towers(), 4, WIDTHS)
    assert isinstance(cure.heads, nn.ModuleDict)
    assert {name for name, _ in cure.named_parameters() if name.startswith("heads")} == {
        "heads.image.weight",
        "heads.image.bias",
        "heads.audio.weight",
        "heads.audio.bias",
    }


def test_the_loss_of_a_batch_is_that_of_its_halves() -> None:
    """So two processes, each with a half, take the steps of one."""
    cure = make(Heads)
    inputs, targets = batch(absent=True)

    def loss_of(rows: slice) -> torch.Tensor:
        some = {key: (x[rows], here[rows]) for key, (x, here) in inputs.items()}
        return cure.loss(F.cross_entropy)(cure(**some), targets[rows])

    middle = len(targets) // 2
    halves = (loss_of(slice(0, middle)) + loss_of(slice(middle, None))) / 2
    torch.testing.assert_close(halves, loss_of(slice(None)))
