"""hesse.check.gradients on models as people write them: what they return, share, recompute, keep and draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hesse
from hesse.check import gradients


class Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        return Bad.apply(x) if self.wrong else x.sin()


def around(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), middle, nn.Linear(24, 3))


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Model(nn.Module):
    """Several inputs, keywords, modules in a dict, a dataclass inside and outside, a loss of its own."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 3), "b": nn.Sequential(nn.Linear(8, 3), Sine(wrong))})

    def forward(self, words: Tensor, mask: Tensor, labels: Tensor | None = None) -> Output:
        h = self.pooled({"h": self.words(words), "mask": mask})
        logits = self.heads["a"](h.logits) + self.heads["b"](h.logits)
        return Output(None if labels is None else F.cross_entropy(logits, labels), logits)

    def pooled(self, parts: dict[str, Tensor]) -> Output:
        mask = parts["mask"].unsqueeze(-1)
        return Output(None, (parts["h"] * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("wrong", [False, True])
def test_models_with_keywords_dicts_and_dataclasses(wrong: bool) -> None:
    torch.manual_seed(0)
    words = torch.randint(0, 20, (6, 5))
    inputs = {"words": words, "mask": torch.ones(6, 5), "labels": torch.arange(6) % 3}
    report = gradients(Model(wrong), inputs)
    assert [(c.where, c.function) for c in report.culprits] == ([("heads.b.1", "Bad")] if wrong else [])
    assert any("padding" in note for note in report.notes)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("wrong", [False, True])
def test_checkpoints_hide_nothing(reentrant: bool, wrong: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), Sine(wrong))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.two, self.one(x), use_reentrant=reentrant).square().mean()

    torch.manual_seed(0)
    report = gradients(Net(), torch.randn(9, 6))
    assert [(c.where, c.function) for c in report.culprits] == ([("two.2", "Bad")] if wrong else [])


def test_a_checkpoint_that_draws_other_numbers_is_named_by_who_made_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False, preserve_rng_state=False)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Block(), nn.Linear(8, 1))
    assert {c.where for c in gradients(model, torch.randn(9, 6)).culprits} == {"1"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_compiled_modules_are_judged_as_a_whole() -> None:
    torch.manual_seed(0)
    part = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), backend="eager")
    for wrong in (False, True):
        model = nn.Sequential(nn.Linear(6, 8), part, Sine(wrong), nn.Linear(8, 1))
        assert [c.where for c in gradients(model, torch.randn(9, 6)).culprits] == (["2"] if wrong else [])


def test_lazy_modules_and_models_that_set_themselves_up() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.ready = nn.Parameter(torch.zeros(8)), False

        def forward(self, x: Tensor) -> Tensor:
            if not self.ready:
                self.shift.data.copy_(x.detach().mean(0))
                self.ready = True
            return x - self.shift

    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), Centred(), nn.Tanh(), nn.LazyLinear(1))
    assert gradients(model, torch.randn(9, 6)).ok
    assert model[1].shift.abs().sum() > 0


def test_gradient_penalties_are_judged_through_both_derivatives() -> None:
    class Cubed(torch.autograd.Function):
        """Its backward is right, and has a wrong derivative if ``lost``."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, lost: bool) -> Tensor:
            ctx.save_for_backward(x)
            ctx.lost = lost
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            (x,) = ctx.saved_tensors
            return 3 * grad * (x.detach() if ctx.lost else x) ** 2, None

    class Critic(nn.Module):
        def __init__(self, lost: bool) -> None:
            super().__init__()
            self.net, self.lost = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), lost

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            y = Cubed.apply(self.net(x), self.lost).sum()
            (slope,) = torch.autograd.grad(y, x, create_graph=True)
            return y + (slope.norm(dim=1) - 1).square().mean()

    for lost in (False, True):
        torch.manual_seed(0)
        report = gradients(Critic(lost), torch.randn(9, 6))
        assert [c.function for c in report.culprits] == (["Cubed"] if lost else []), str(report)
        assert all(c.kind == "second_derivative" for c in report.culprits)


def test_a_penalty_on_parameters_that_the_loss_function_computes() -> None:
    class Penalty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor, factor: float) -> Tensor:
            ctx.save_for_backward(w)
            ctx.factor = factor
            return w.square().sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return ctx.factor * grad * ctx.saved_tensors[0], None

    for factor in (2.0, 1.0):
        torch.manual_seed(0)
        model = around(nn.Tanh())

        def loss(y: Tensor, t: Tensor, model: nn.Module = model, factor: float = factor) -> Tensor:
            return F.mse_loss(y, t) + 0.1 * Penalty.apply(model[0].weight, factor) + model[2].weight.abs().mean()

        report = gradients(hesse.closure(model, loss, (torch.randn(8, 6), torch.randn(8, 3))))
        expected = [] if factor == 2 else [("loss_fn()", "Penalty")]
        assert [(c.where, c.function) for c in report.culprits] == expected


def test_parts_are_judged_on_request_behind_a_tiny_scale() -> None:
    class Half(nn.Module):
        """Without a Function, a hook or a stop: a weight that is changed for the backward only."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(24, 24) / 5)

        def forward(self, x: Tensor) -> Tensor:
            y = x @ (2 * self.w)
            return x + 1e-9 * y if y.requires_grad else y

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Sine(True)

        def forward(self, x: Tensor) -> Tensor:
            return x + 1e-8 * self.inner(x)

    torch.manual_seed(0)
    x = torch.randn(16, 6)
    assert gradients(around(Half()), x, parts=True).ok
    for parts in (False, True):  # a custom Function is looked at in any case
        assert [c.where for c in gradients(around(Tiny()), x, parts=parts).culprits] == ["1.inner"]


def test_a_fault_around_a_fault_is_a_fault_of_its_own() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Sine(True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * x.square().mean().detach()

    torch.manual_seed(0)
    report = gradients(nn.Sequential(nn.Linear(6, 8), Around(), nn.Linear(8, 1)), torch.randn(9, 6))
    found = {(c.where, c.function) for c in report.culprits}
    assert found == {("1.inner", "Bad"), ("1", "Tensor.detach")}


def test_the_operation_that_draws_its_own_numbers_is_named() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=self.generator)
            return x + noise

    (culprit,) = gradients(nn.Sequential(nn.Linear(6, 4), Noisy(), nn.Linear(4, 1)), torch.randn(8, 6)).culprits
    assert (culprit.kind, culprit.where, culprit.function) == ("non_deterministic", "1", "randn")
    assert culprit.line == Noisy.forward.__code__.co_firstlineno + 1


def test_a_part_that_cannot_be_run_by_itself_is_said_and_does_no_harm() -> None:
    class Once(nn.Module):
        """Needs what its caller has put there."""

        def __init__(self) -> None:
            super().__init__()
            self.key: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            assert self.key is not None
            return Bad.apply(x) * self.key

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once = Once()

        def forward(self, x: Tensor) -> Tensor:
            self.once.key = torch.ones(())
            y = self.once(x)
            self.once.key = None
            return y

    torch.manual_seed(0)
    report = gradients(nn.Sequential(nn.Linear(6, 8), Caller(), nn.Linear(8, 1)), torch.randn(9, 6))
    assert [(c.where, c.function) for c in report.culprits] == [("1.once", "Bad")]
    assert any("cannot be run by itself" in note for note in report.notes)
