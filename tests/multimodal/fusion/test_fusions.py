"""What every fusion promises: absent data change nothing, any subset works, two derivatives, known layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hesse
import oracles
from fusion_models import MAKE, OUTPUTS, ROWS, WIDTHS, features, inputs, made, presence
from hesse.curvature import ggn, hessian
from hesse.curvature.uses import coverage, watch_uses
from hesse.multimodal.fusion import FUSIONS, Bottleneck, Concatenate, Gated, Late, LowRank
from hesse.objective.function import objective
from hesse.optim import KFAC
from tolerances import ALGEBRA, ROUNDING

# torch itself warns so when forward mode is first used in a process
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

TARGETS = torch.arange(ROWS) % OUTPUTS
ANSWERING = [name for name in MAKE if name != "late, several answers"]  # whose outputs are classes


def outputs_and_gradients(name: str, x: dict[str, Tensor], here: dict[str, Tensor]) -> list[Tensor]:
    fusion = made(name).fusion
    x = {key: value.requires_grad_() for key, value in x.items()}
    out = fusion(x, here)
    wanted = [*x.values(), *fusion.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), wanted, materialize_grads=True)]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("junk", [1e3, torch.inf, torch.nan])
def test_what_is_absent_influences_neither_result_nor_gradients(name: str, junk: float) -> None:
    here = presence()
    clean = outputs_and_gradients(name, features(), here)
    spoiled = {key: torch.where(here[key][:, None], x, junk) for key, x in features().items()}
    found = outputs_and_gradients(name, spoiled, here)
    for a, b in zip(clean, found, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)
    for x, key in zip(found[1:4], WIDTHS, strict=True):
        assert not x[~here[key]].any()
        assert x[here[key]].any()


@pytest.mark.parametrize("name", MAKE)
def test_a_row_does_not_depend_on_what_its_neighbours_lack(name: str) -> None:
    fusion, here, x = made(name).fusion, presence(), features()
    together = fusion(x, here)
    for row in range(ROWS):
        alone = fusion({key: v[row : row + 1] for key, v in x.items()}, {k: v[row : row + 1] for k, v in here.items()})
        torch.testing.assert_close(alone[0], together[row], **ROUNDING[torch.float64])


@pytest.mark.parametrize("name", MAKE)
def test_rows_with_nothing_are_all_alike_and_rows_with_something_are_not(name: str) -> None:
    fusion, x = made(name).fusion, features()
    nothing = fusion(x, dict.fromkeys(WIDTHS, torch.zeros(ROWS, dtype=torch.bool)))
    assert torch.equal(nothing, nothing[:1].expand_as(nothing))
    everything = fusion(x, dict.fromkeys(WIDTHS, torch.ones(ROWS, dtype=torch.bool)))
    assert not torch.isclose(everything, nothing).all(1).any()


@pytest.mark.parametrize("name", MAKE)
def test_one_modality_is_enough(name: str) -> None:
    torch.manual_seed(0)
    fusion = MAKE[name]({"a": 3})
    out = fusion({"a": torch.randn(2, 3)}, {"a": torch.tensor([True, False])})
    assert out.shape == (2, fusion.width)
    assert out.isfinite().all() and not torch.equal(out[0], out[1])


@pytest.mark.parametrize("name", [name for name in MAKE if name not in ("concat", "gated")])
def test_the_order_of_the_modalities_is_of_no_matter(name: str) -> None:
    """Concatenation and the gates, which read one, have a weight for each place; for the others names are enough."""
    fusion, back = made(name).fusion, MAKE[name](dict(reversed(WIDTHS.items()))).double()
    back.load_state_dict(fusion.state_dict())
    torch.testing.assert_close(back(features(), presence()), fusion(features(), presence()), **ROUNDING[torch.float64])


def test_gates_in_another_order_are_the_same_with_their_columns_in_that_order() -> None:
    fusion = made("gated").fusion
    assert isinstance(fusion, Gated)
    back = Gated(dict(reversed(WIDTHS.items())), width=4).double()
    state = fusion.state_dict()
    for key in WIDTHS:
        a, b, c = state[f"gates.{key}.weight"].split([width + 1 for width in WIDTHS.values()], dim=1)
        state[f"gates.{key}.weight"] = torch.cat([c, b, a], dim=1)
    back.load_state_dict(state)
    torch.testing.assert_close(back(features(), presence()), fusion(features(), presence()), **ROUNDING[torch.float64])


@pytest.mark.parametrize("name", ANSWERING)
def test_gradients_pass_the_check(name: str) -> None:
    report = hesse.check.gradients(hesse.closure(made(name), F.cross_entropy, (inputs(), TARGETS)))
    assert report.ok, report


@pytest.mark.parametrize("name", MAKE)
def test_curvature_is_that_of_the_dense_matrices(name: str) -> None:
    """Gauss-Newton and Hessian products: forward mode, and two passes back through everything."""
    if name in ANSWERING:
        case = made(name), F.cross_entropy, (inputs(), TARGETS)
    else:
        case = made(name), F.mse_loss, (inputs(), torch.randn(ROWS, 6, dtype=torch.float64))
    g = torch.Generator().manual_seed(1)
    o = objective(*case)
    dense = oracles.gauss_newton(o)
    v = torch.randn(len(dense), 2, generator=g, dtype=torch.float64)
    for mode in ("forward", "double-backward"):
        torch.testing.assert_close(ggn(*case, mode=mode) @ v, dense @ v, rtol=1e-9, atol=1e-11)
    differences = oracles.gradient_differences(o, v[:, 0])
    torch.testing.assert_close(hessian(*case) @ v[:, 0], differences, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ANSWERING)
def test_kfac_knows_every_parameter_and_its_steps_go_down(name: str) -> None:
    model, batch = made(name), (inputs(), TARGETS)
    with watch_uses(dict(model.named_parameters())) as uses:
        out = model(**batch[0])
    cover = coverage(uses, dict(model.named_parameters()), out)
    assert not cover.loose
    optimizer = KFAC(model)
    before = F.cross_entropy(out, TARGETS).detach()
    first = float(optimizer.step(hesse.closure(model, F.cross_entropy, batch)))
    assert first == pytest.approx(float(before))
    after = F.cross_entropy(model(**batch[0]), TARGETS)
    assert after < before
    for _ in range(20):
        optimizer.step(hesse.closure(model, F.cross_entropy, batch))
    assert F.cross_entropy(model(**batch[0]), TARGETS) < 0.9 * before


def test_names_are_those_of_the_files() -> None:
    assert FUSIONS == ("concat", "gated", "bottleneck", "tensor", "late")


# -- each against its formula, written out ------------------------------------------------------------------------


def test_gates_of_two_modalities_are_those_of_the_paper() -> None:
    """z and 1 - z: the softmax of two is the logistic function of their difference."""
    torch.manual_seed(0)
    fusion = Gated({"a": 3, "b": 2}, width=4)
    x = {"a": torch.randn(5, 3), "b": torch.randn(5, 2)}
    here = torch.ones(5, dtype=torch.bool)
    flagged = {key: torch.cat([value, torch.ones(5, 1)], 1) for key, value in x.items()}
    both = torch.cat(list(flagged.values()), 1)
    z = torch.sigmoid(fusion.gates["a"](both) - fusion.gates["b"](both))
    h = {key: fusion.values[key](value).tanh() for key, value in flagged.items()}
    expected = z * h["a"] + (1 - z) * h["b"]
    torch.testing.assert_close(fusion(x, {"a": here, "b": here}), expected, **ROUNDING[torch.float32])


def test_gates_are_shared_out_among_those_that_are_present() -> None:
    fusion, x, here = made("gated").fusion, features(), presence()
    assert isinstance(fusion, Gated)
    full = {key: F.pad(torch.where(here[key][:, None], x[key], 0), (0, 1)) for key in WIDTHS}
    for key in WIDTHS:
        full[key][:, -1] = here[key]
    both = torch.cat(list(full.values()), 1)
    expected = torch.zeros(ROWS, 4, dtype=torch.float64)
    for row in range(ROWS):
        scores = {key: fusion.gates[key](both[row]).exp() for key in WIDTHS if here[key][row]}
        for key, score in scores.items():
            gate = score / torch.stack(list(scores.values())).sum(0)
            expected[row] += gate * fusion.values[key](full[key][row]).tanh()
    torch.testing.assert_close(fusion(x, here), expected, **ALGEBRA)


def test_shared_tokens_hear_those_that_are_present_and_stay_where_there_is_none() -> None:
    """A row at a time, with those modalities alone that it has; attention by torch's own."""
    fusion, x, here = made("bottleneck").fusion, features(), presence()
    assert isinstance(fusion, Bottleneck)
    for row in range(ROWS):
        shared = fusion.shared.weight
        own = {
            key: fusion.tokens[key](torch.cat([x[key][row], torch.ones(1)])).view(2, 4)
            for key in WIDTHS
            if here[key][row]
        }
        for layer in fusion.layers:
            heard = []
            for key in own:
                block, tokens = layer[key], torch.cat([own[key], shared])
                q, k, v = block.read(block.norm(tokens)).view(4, 3, 2, 2).permute(1, 2, 0, 3)
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    attended = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(4, 4)
                tokens = tokens + block.write(attended)
                tokens = tokens + block.narrow(F.gelu(block.widen(block.norm_between(tokens))))
                own[key], mine = tokens[:2], tokens[2:]
                heard.append(mine)
            shared = sum(heard[1:], start=heard[0]) / len(heard) if heard else shared
        torch.testing.assert_close(fusion(x, here)[row], fusion.norm(shared).flatten(), **ALGEBRA)


def test_low_rank_is_a_linear_layer_on_the_outer_product() -> None:
    fusion = made("tensor").fusion
    assert isinstance(fusion, LowRank)
    x, here = features(), presence()
    full = {
        key: torch.cat(
            [torch.where(here[key][:, None], x[key], 0), here[key].double()[:, None], torch.ones(ROWS, 1)], 1
        )
        for key in WIDTHS
    }
    joined = {key: torch.cat([f.weight, f.bias[:, None]], 1).view(3, 2, -1) for key, f in fusion.factors.items()}
    weight = torch.einsum("r,hri,hrj,hrk->hijk", fusion.mix.weight[0], *joined.values())
    expected = torch.einsum("bi,bj,bk,hijk->bh", *full.values(), weight)
    torch.testing.assert_close(fusion(x, here), expected, **ALGEBRA)


def test_late_is_bayes_rule_for_independent_witnesses() -> None:
    """p(y | x) in proportion to p(y) prod p(y | x_m) / p(y), and of no witness the prior."""
    fusion = made("late").fusion
    assert isinstance(fusion, Late)
    prior = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    fusion.prior.weight.data.copy_(prior.log()[None] + 5)  # a constant is of no matter
    x, here = features(), presence()
    said = {key: head(x[key]).softmax(1) for key, head in fusion.heads.items()}
    for row in range(ROWS):
        posterior = prior.clone()
        for key in WIDTHS:
            if here[key][row]:
                posterior = posterior * said[key][row] / prior
        found = fusion(x, here)[row].softmax(0)
        torch.testing.assert_close(found, posterior / posterior.sum(), **ALGEBRA)


def test_a_scale_is_a_power_of_what_a_witness_says() -> None:
    fusion = made("late").fusion
    assert isinstance(fusion, Late)
    only = {key: torch.full((ROWS,), key == "b") for key in WIDTHS}
    before = fusion(features(), only)
    fusion.scales["b"].weight.data.fill_(0.5)
    torch.testing.assert_close(fusion(features(), only), before / 2, **ALGEBRA)  # the prior is flat


def test_late_means_are_weighted_by_precision_and_the_prior_has_one() -> None:
    fusion = Late({"a": 1, "b": 1}, [("regression", 1)])
    fusion.prior.weight.data.fill_(0.25)
    for key, mean, precision in (("a", 2.0, 3.0), ("b", -1.0, 4.0)):
        last = fusion.heads[key][2]
        last.weight.data.zero_()
        last.bias.data.copy_(torch.tensor([mean, torch.tensor(precision).expm1().log()]))
    x = {"a": torch.zeros(4, 1), "b": torch.zeros(4, 1)}
    here = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False, True, False])}
    expected = torch.tensor([(0.25 + 6 - 4) / 8, (0.25 + 6) / 4, (0.25 - 4) / 5, 0.25])[:, None]
    torch.testing.assert_close(fusion(x, here), expected)


def test_late_answers_keep_their_order() -> None:
    """Targets of all kinds at once: each column answers like a fusion of that target alone, with the same weights."""
    whole = made("late, several answers").fusion
    assert isinstance(whole, Late)
    column, spread = 0, 0
    for task, width in whole.answers:
        part = Late(WIDTHS, [(task, width)], hidden=3).double()
        places = list(range(column, column + width))
        if task == "regression":
            rows = [*places, whole.width + spread]
            spread += 1
        else:
            rows = places
        state = whole.state_dict()
        for key in WIDTHS:
            for name in ("weight", "bias"):
                state[f"heads.{key}.2.{name}"] = state[f"heads.{key}.2.{name}"][rows]
            if task == "regression":
                del state[f"scales.{key}.weight"]
        state["prior.weight"] = state["prior.weight"][:, places]
        part.load_state_dict(state)
        torch.testing.assert_close(part(features(), presence()), whole(features(), presence())[:, places], **ALGEBRA)
        column += width


def test_concatenation_is_as_it_was() -> None:
    x, here = features(), presence()
    flags = [here[key][:, None].double() for key in WIDTHS]
    expected = torch.cat([*(torch.where(here[key][:, None], x[key], 0) for key in WIDTHS), *flags], 1)
    assert torch.equal(Concatenate(WIDTHS)(x, here), expected)
