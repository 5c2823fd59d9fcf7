"""AdaHessian: its guesses are the Hessian's diagonal on average, and its step is the paper's formula."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.optim.adahessian import AdaHessian
from hesse.optim.line_search import LineSearch
from hesse.optim.sophia import SophiaG, SophiaH
from problems import PROBLEMS, Problem, as_double, mlp, problem
from processes import in_processes
from tolerances import ALGEBRA, ROUNDING, STANDARD_ERRORS

DIAGONAL: dict[str, Callable[..., Any]] = {"AdaHessian": AdaHessian, "SophiaH": SophiaH, "SophiaG": SophiaG}


def closure_of(p: Problem) -> hesse.Closure:
    return hesse.closure(p.model, p.loss_fn, p.batch)


def dense_hessian(p: Problem) -> dict[str, Tensor]:
    """Rows of the Hessian's diagonal blocks, one double backward an element."""
    params = dict(p.model.named_parameters())
    with torch.enable_grad(), hesse.closure(*p).objective.at(params):
        x, y = p.batch
        slopes = torch.autograd.grad(p.loss_fn(p.model(x), y), list(params.values()), create_graph=True)
    found = {}
    for (name, q), g in zip(params.items(), slopes, strict=True):
        rows = [torch.autograd.grad(v, q, retain_graph=True)[0].flatten() for v in g.flatten()]
        found[name] = torch.stack(rows)
    return found


def guesses(p: Problem, number: int, make: Callable[..., Any] = SophiaH) -> dict[str, Tensor]:
    """Guesses [number, *shape] that an optimiser which does not move looks at, one a step."""
    optimizer = make(p.model.parameters(), lr=0.0, betas=(0.0, 0.0), every=1)
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in p.model.named_parameters()}
    for _ in range(number):
        optimizer.step(closure_of(p))
        for name, q in p.model.named_parameters():
            state = optimizer.state[q]
            value = state["hessian"] if "hessian" in state else state["hessian_sq"]
            seen[name].append(value.clone())
    return {name: torch.stack(values) for name, values in seen.items()}


@pytest.mark.parametrize("name", ["mlp, cross-entropy", "free parameter", "attention, fused"])
def test_the_mean_of_the_guesses_is_the_diagonal_of_the_hessian(name: str) -> None:
    p = (
        as_double(problem(name))
        if "attention" not in name
        else Problem(problem(name).model.double(), *problem(name)[1:])
    )
    exact = {n: block.diagonal() for n, block in dense_hessian(p).items()}
    for n, values in guesses(p, 300).items():
        values = values.flatten(1)
        error = (values.mean(0) - exact[n]).abs()
        assert bool((error <= STANDARD_ERRORS * values.std(0) / 300**0.5 + 1e-12).all()), n


def test_a_diagonal_hessian_is_guessed_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    weights = torch.tensor([1.0, 10.0, 0.1, 3.0]).double()
    p = Problem(model, lambda _, t: (weights * (model.weight[0] - t) ** 2).sum(), (torch.zeros(1, 4).double(), 1.0))
    values = guesses(p, 3)["weight"]
    torch.testing.assert_close(values, 2 * weights.expand(3, 1, 4), **ALGEBRA)


def test_the_steps_are_the_formula_of_the_paper() -> None:
    """Against a plain loop on the same guesses, made by the dense Hessian and the same signs."""
    made, again = as_double(problem("mlp, cross-entropy")), as_double(problem("mlp, cross-entropy"))
    lr, beta1, beta2, eps, decay = 0.1, 0.9, 0.99, 1e-3, 0.01
    optimizer = AdaHessian(made.model.parameters(), lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    look = SophiaH(again.model.parameters(), lr=0.0, betas=(0.0, 0.0), every=1)  # the guesses at the same point
    params = dict(again.model.named_parameters())
    m = {n: torch.zeros_like(q) for n, q in params.items()}
    v = {n: torch.zeros_like(q) for n, q in params.items()}
    for t in range(1, 6):
        optimizer.step(closure_of(made))
        look.step(closure_of(again))
        for n, q in params.items():
            m[n] = beta1 * m[n] + (1 - beta1) * q.grad
            v[n] = beta2 * v[n] + (1 - beta2) * look.state[q]["hessian"] ** 2
            root = (v[n] / (1 - beta2**t)).sqrt()
            q.data = q.data * (1 - lr * decay) - lr * (m[n] / (1 - beta1**t)) / (root + eps)
        for (n, q), other in zip(params.items(), made.model.parameters(), strict=True):
            torch.testing.assert_close(other, q, **ALGEBRA, msg=n)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_guesses_are_averaged_over_the_kernels_of_convolutions_and_nothing_else(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    ndim = int(kind.__name__[-2])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(2, 3, 2)  # type: ignore[call-arg]
            self.scale = nn.Parameter(torch.randn(3, 2, *[2] * ndim))  # shaped as a kernel, and none

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x)).sum() * (self.scale**3).mean()

    p = Problem(Model().double(), lambda outputs, _: outputs**2, (torch.randn(2, 2, *[4] * ndim).double(), None))
    plain, smooth = guesses(p, 1), guesses(p, 1, AdaHessian)
    dims = tuple(range(3, 3 + ndim))
    weight, rest = "layer.weight", ["layer.bias", "scale"]
    mean = plain[weight].mean(dims, keepdim=True).expand_as(plain[weight])
    torch.testing.assert_close(smooth[weight], mean**2, **ALGEBRA)
    for name in rest:
        torch.testing.assert_close(smooth[name], plain[name] ** 2, **ALGEBRA)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", DIAGONAL)
def test_it_trains_every_kind_of_model(kind: str, name: str) -> None:
    p = problem(name)
    torch.manual_seed(0)
    optimizer = DIAGONAL[kind](p.model.parameters(), lr=0.03 if kind == "AdaHessian" else 0.01, every=3)
    losses = [float(optimizer.step(closure_of(p))) for _ in range(30)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("kind", DIAGONAL)
@pytest.mark.parametrize("name", ["convnet, BatchNorm", "text", "weight norm", "transformer, eval"])
def test_a_step_with_curvature_leaves_loss_gradient_and_buffers_as_a_plain_closure_does(kind: str, name: str) -> None:
    p, other = problem(name), problem(name)
    optimizer = DIAGONAL[kind](p.model.parameters(), lr=0.0)
    closure = closure_of(p)
    for q in p.model.parameters():
        q.grad = torch.ones_like(q)  # left over: replaced, not added to
    torch.manual_seed(0)
    loss = optimizer.step(closure)
    random = torch.get_rng_state()
    torch.manual_seed(0)
    expected = closure_of(other)()
    assert torch.equal(random, torch.get_rng_state())
    # Fused kernels on one side and plain ones on the other, where there are such.
    torch.testing.assert_close(loss, expected, **ROUNDING[torch.float32])
    assert loss.ndim == 0
    assert not loss.requires_grad
    for q, r in zip(p.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, r.grad, rtol=1e-4, atol=1e-6)
        assert not q.grad.requires_grad
    for b, c in zip(p.model.buffers(), other.model.buffers(), strict=True):
        torch.testing.assert_close(b, c)
    assert closure.outputs is not None


@pytest.mark.parametrize("kind", DIAGONAL)
def test_a_nan_batch_at_a_look_leaves_running_statistics_as_they_were(kind: str) -> None:
    p = problem("convnet, BatchNorm")
    optimizer, (x, y) = DIAGONAL[kind](p.model.parameters()), p.batch
    before = {name: value.clone() for name, value in p.model.state_dict().items()}
    optimizer.step(hesse.closure(p.model, p.loss_fn, (x * math.nan, y)))
    assert all(torch.equal(value, before[name]) for name, value in p.model.state_dict().items())
    assert optimizer.param_groups[0]["rejections"] == 1
    assert optimizer.param_groups[0]["steps"] == 0


def forward_passes(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("kind", DIAGONAL)
def test_loss_gradient_and_curvature_share_one_forward_pass(kind: str) -> None:
    p = problem("mlp, cross-entropy")
    optimizer = DIAGONAL[kind](p.model.parameters(), every=1)
    optimizer.step(closure_of(p))  # the way to differentiate twice is chosen and verified at the first
    calls = forward_passes(p.model)
    optimizer.step(closure_of(p))
    assert len(calls) == 1


def wrapper(model: nn.Module, optimizer: Any, closure: Callable[[], Any]) -> Any:
    return closure()


@pytest.mark.parametrize("kind", DIAGONAL)
def test_a_wrapped_closure_is_called_and_gives_the_same_step(kind: str) -> None:
    p, other = problem("convnet, BatchNorm"), problem("convnet, BatchNorm")
    one, two = DIAGONAL[kind](p.model.parameters(), every=2), DIAGONAL[kind](other.model.parameters(), every=2)
    for _ in range(4):
        one.step(closure_of(p))
        two.step(functools.partial(wrapper, other.model, two, closure_of(other)))
    for (n, q), r in zip(p.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(q, r, rtol=1e-4, atol=1e-5, msg=n)


@pytest.mark.parametrize("kind", DIAGONAL)
def test_between_looks_any_closure_or_none_will_do_and_at_a_look_the_error_says_what_to_pass(kind: str) -> None:
    p = problem("mlp, cross-entropy")
    x, y = p.batch

    def plain() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(p.model(x), y)
        loss.backward()
        return loss

    optimizer = DIAGONAL[kind](p.model.parameters(), every=3)
    assert optimizer.step() is None  # no gradients: nothing to do
    for round_ in range(2):
        with pytest.raises(TypeError, match=rf"{kind} looks at the curvature.*function.*hesse.closure.*every=3"):
            optimizer.step(plain)
        plain()
        with pytest.raises(TypeError, match="no closure"):
            optimizer.step()
        assert optimizer.param_groups[0]["steps"] == 3 * round_
        optimizer.step(closure_of(p))
        before = p.model[0].weight.detach().clone()
        assert optimizer.step(plain) is not None
        assert not torch.equal(before, p.model[0].weight)
        plain()
        assert optimizer.step() is None


@pytest.mark.parametrize("kind", DIAGONAL)
def test_curvature_is_looked_at_every_so_many_steps(kind: str) -> None:
    p = problem("mlp, cross-entropy")
    optimizer = DIAGONAL[kind](p.model.parameters(), every=4)
    key, seen = "hessian" if kind != "AdaHessian" else "hessian_sq", []
    for _ in range(9):
        optimizer.step(closure_of(p))
        seen.append(optimizer.state[p.model[0].weight][key].clone())
    changed = [i for i in range(1, 9) if not torch.equal(seen[i], seen[i - 1])]
    assert changed == [4, 8]


class Strange(nn.Module):
    """One weight that curves, one that the loss is linear in, one that is frozen, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.curved = nn.Parameter(torch.ones(3))
        self.straight = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.curved**2).sum() + 2.0 * self.straight.sum() + self.frozen.sum()


@pytest.mark.parametrize(("kind", "step"), [("AdaHessian", -0.2), ("SophiaH", -0.1)])
def test_without_curvature_a_parameter_moves_by_its_momentum(kind: str, step: float) -> None:
    model, outside = Strange(), nn.Parameter(torch.ones(3))
    outside.grad = torch.full((3,), 2.0)
    optimizer = DIAGONAL[kind]([*model.parameters(), outside], lr=0.1)
    optimizer.step(hesse.closure(model, lambda outputs, _: outputs, (torch.ones(3), None)))
    for p in (model.straight, outside):  # AdaHessian: lr times the gradient; Sophia: lr itself
        torch.testing.assert_close(p.detach(), torch.full((3,), 1.0 + step))
    assert bool((model.curved < 1).all())
    assert torch.equal(model.frozen, torch.ones(3))
    assert torch.equal(model.unused, torch.ones(3))
    assert model.unused not in optimizer.state


@pytest.mark.parametrize("kind", DIAGONAL)
def test_the_draws_do_not_touch_torchs_generator_and_follow_the_seed(kind: str) -> None:
    states = []
    for seed, noise in ((0, 0), (0, 7), (1, 0)):
        p = problem("mlp, cross-entropy")
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        optimizer = DIAGONAL[kind](p.model.parameters(), seed=seed)
        optimizer.step(closure_of(p))
        assert torch.equal(before, torch.get_rng_state())
        key = "hessian" if kind != "AdaHessian" else "hessian_sq"
        states.append(optimizer.state[p.model[0].weight][key])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("kind", ["AdaHessian", "SophiaH"])
def test_bfloat16_curvature_is_formed_in_float32(kind: str) -> None:
    p, other = problem("mlp, cross-entropy"), problem("mlp, cross-entropy")
    for model in (p.model, other.model):
        for q in model.parameters():
            q.data = q.data.bfloat16().to(q.dtype)
    x, y = p.batch
    x = x.bfloat16().float()
    p.model.bfloat16()
    key = "hessian" if kind != "AdaHessian" else "hessian_sq"
    low, high = DIAGONAL[kind](p.model.parameters()), DIAGONAL[kind](other.model.parameters())
    low.step(hesse.closure(p.model, p.loss_fn, (x.bfloat16(), y)))
    high.step(hesse.closure(other.model, p.loss_fn, (x, y)))
    for q, r in zip(p.model.parameters(), other.model.parameters(), strict=True):
        assert low.state[q][key].dtype == torch.float32
        torch.testing.assert_close(low.state[q][key], high.state[r][key], **ROUNDING[torch.float32])


@pytest.mark.parametrize("kind", ["AdaHessian", "SophiaH"])
def test_an_operation_that_cannot_be_differentiated_twice_is_named(kind: str) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.exp()

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(output)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.layer(x))

    torch.manual_seed(0)
    optimizer = DIAGONAL[kind]((model := Model()).parameters())
    p = Problem(model, F.mse_loss, (torch.randn(8, 3), torch.rand(8, 1)))
    with pytest.raises(hesse.curvature.DerivativeError, match="Once"):
        optimizer.step(closure_of(p))


@pytest.mark.parametrize("kind", DIAGONAL)
@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_a_period_that_is_none_is_named(kind: str, every: Any) -> None:
    with pytest.raises(ValueError, match="Invalid every"):
        DIAGONAL[kind](mlp().parameters(), every=every)
    optimizer = DIAGONAL[kind](mlp().parameters())
    with pytest.raises(ValueError, match="Invalid every"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "every": every})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_are_looked_at_as_they_are_written(backend: str) -> None:
    p, other = problem("mlp, cross-entropy"), problem("mlp, cross-entropy")
    compiled = torch.compile(other.model, backend=backend)
    one, two = AdaHessian(p.model.parameters()), AdaHessian(compiled.parameters())
    for _ in range(3):
        one.step(closure_of(p))
        two.step(hesse.closure(compiled, p.loss_fn, p.batch))
    for q, r in zip(p.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(q, r, **ROUNDING[torch.float32])


def _train_a_part(rank: int, ranks: int, name: str) -> dict[str, Any]:
    """Five steps on every ``ranks``-th example, in a model that others have a copy of if there are others."""
    made = as_double(problem("mlp, squared error"))
    model = nn.parallel.DistributedDataParallel(made.model) if ranks > 1 else made.model
    optimizer = DISTRIBUTED[name](model.parameters())
    x, y = (t[rank::ranks] for t in made.batch)
    for _ in range(5):
        optimizer.step(hesse.closure(model, made.loss_fn, (x, y)))
    return {n: q.detach().clone() for n, q in made.model.named_parameters()}


DISTRIBUTED: dict[str, Callable[..., Any]] = {
    "AdaHessian": lambda params: AdaHessian(params, lr=0.05, every=2),
    "SophiaH": lambda params: SophiaH(params, lr=0.05, every=2),
    "SophiaG": lambda params: SophiaG(params, lr=0.05, every=2),
    "LineSearch": lambda params: LineSearch(torch.optim.SGD(params, lr=10.0)),
}


def _rank(rank: int, ranks: int) -> dict[str, Any]:
    return {name: _train_a_part(rank, ranks, name) for name in DISTRIBUTED}


def test_two_processes_with_half_the_batch_each_train_as_one(tmp_path: Path) -> None:
    one, two = in_processes(_rank, tmp_path)
    for name in DISTRIBUTED:
        alone = _train_a_part(0, 1, name)
        for n, value in one[name].items():
            assert torch.equal(value, two[name][n]), (name, n)
            if name != "SophiaG":  # whose draws are of each process's own examples
                torch.testing.assert_close(value, alone[n], **ALGEBRA, msg=lambda m, name=name, n=n: f"{name} {n} {m}")
