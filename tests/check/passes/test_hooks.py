"""hesse.check.passes.hooks: a hook is to blame for what is wrong with it and right without it, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_full_backward_hook

from hesse.check import gradients
from hesse.check.passes.hooks import hooks_of, off, rewritten, title


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 1))


def halved(module: nn.Module, grad_in: Any, grad_out: Any) -> Any:
    return tuple(g if g is None else g / 2 for g in grad_in)


def tripled(module: nn.Module, grad_out: Any) -> Any:
    return tuple(3 * g for g in grad_out)


def clamped(grad: Tensor) -> Tensor:
    return grad.clamp(-1e-4, 1e-4)


def cutting(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.detach()


def reversing(module: nn.Module, args: Any, output: Tensor) -> None:
    output.register_hook(torch.neg)


def weakened(module: nn.Module, args: Any, output: Tensor) -> None:
    module.weight.data.mul_(0.9)


def shrunk(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.mul_(0.1)


HOOKS: dict[str, tuple[Callable[[nn.Sequential], Any], str, str]] = {
    "backward": (lambda m: m[3].register_full_backward_hook(halved), "3", "halved"),
    "backward pre": (lambda m: m[2].register_full_backward_pre_hook(tripled), "2", "tripled"),
    "parameter": (lambda m: m[2].weight.register_hook(clamped), "2", "clamped"),
    "forward that cuts": (lambda m: m[1].register_forward_hook(cutting), "1", "cutting"),
    "forward that hooks": (lambda m: m[1].register_forward_hook(reversing), "1", "reversing"),
    "forward that edits": (lambda m: m[2].register_forward_hook(weakened), "2", "weakened"),
    "after accumulation": (lambda m: m[0].weight.register_post_accumulate_grad_hook(shrunk), "0", "shrunk"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_the_hook_that_changes_a_gradient_is_named(name: str) -> None:
    register, where, function = HOOKS[name]
    torch.manual_seed(0)
    hooked = model()
    hooked[3].register_forward_hook(lambda module, args, output: 2 * output)  # deterministic: no fault
    hooked[2].weight.register_hook(lambda grad: None)
    x = torch.randn(9, 6)
    assert gradients(hooked, x).ok
    register(hooked)
    (culprit,) = gradients(hooked, x).culprits
    assert (culprit.kind, culprit.where, culprit.function) == ("hook", where, function), culprit
    assert culprit.file == __file__
    assert culprit.line == globals()[function].__code__.co_firstlineno


def test_a_hook_on_a_tensor_belongs_to_the_forward_that_hangs_it_there() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.register_hook(lambda grad: 2 * grad)
            return x.sin()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            y.register_hook(lambda grad: 2 * grad)
            return y.sin()

    for part in (Inner(), Outer()):
        torch.manual_seed(0)
        (culprit,) = gradients(nn.Sequential(nn.Linear(6, 8), part, nn.Linear(8, 1)), torch.randn(9, 6)).culprits
        assert (culprit.kind, culprit.where, culprit.function) == ("hook", "1", "<lambda>")
        assert culprit.file == __file__ and culprit.line


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_hook_on_all_modules_is_found() -> None:
    handle = register_module_full_backward_hook(lambda m, i, o: halved(m, i, o) if isinstance(m, nn.Tanh) else None)
    try:
        torch.manual_seed(0)
        (culprit,) = gradients(model(), torch.randn(9, 6)).culprits
    finally:
        handle.remove()
    assert (culprit.kind, culprit.where) == ("hook", "1")


def test_an_optimiser_in_the_backward_pass_is_no_fault_and_is_not_stepped() -> None:
    torch.manual_seed(0)
    net = model()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = [p.detach().clone() for p in net.parameters()]
    assert gradients(net, torch.randn(9, 6)).ok
    assert all(torch.equal(p, value) for p, value in zip(net.parameters(), before, strict=True))
    assert not rewritten(net, {name: torch.ones_like(p) for name, p in net.named_parameters()})


def test_torchs_own_hooks_are_how_layers_work() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.Linear(6, 8))
    net = nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 1))
    assert not hooks_of(net)
    assert gradients(net, torch.randn(9, 6)).ok


def test_hooks_are_back_in_their_order_also_after_an_error() -> None:
    net = model()
    for hook in (halved, halved, halved):
        net[1].register_full_backward_hook(hook)
    hooks = hooks_of(net)
    assert [(hook.path, title(hook.function), hook.backward) for hook in hooks] == 3 * [("1", "halved", True)]
    before = list(net[1]._backward_hooks.items())
    with pytest.raises(RuntimeError, match="in the middle"), off(hooks[1:2]):
        assert list(net[1]._backward_hooks) == [before[0][0], before[2][0]]
        raise RuntimeError("in the middle")
    assert list(net[1]._backward_hooks.items()) == before


def test_a_parametrization_is_a_module_like_others() -> None:
    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w + w.detach()

    layer = nn.utils.parametrize.register_parametrization(nn.Linear(8, 8), "weight", Doubled())
    torch.manual_seed(0)
    (culprit,) = gradients(nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 1)), torch.randn(9, 6)).culprits
    assert (culprit.where, culprit.function) == ("1.parametrizations.weight.0", "Tensor.detach")
