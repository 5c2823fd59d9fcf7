"""Kernels that can be differentiated twice, in place of fused ones that cannot.

Some of torch's kernels were written for one backward pass. Fused attention refuses a second one, and so does the fast
path of the transformer layers. ``weight_norm`` on the CPU is worse: its second derivative in the direction v comes out
up to 70 % wrong without a word. Sparse gradients of embeddings cannot be differentiated, and that of a padding row is
dropped although the loss depends on the row. All have plain counterparts, which run here instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

__all__ = ["is_tied", "plain_for"]


def plain_for(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """A context in which ``model`` runs on kernels that can be differentiated twice.

    Looking at every operation costs about two microseconds each, so only models that have ``weight_norm``, sparse
    embeddings or a tied one with a padding row pay for it.
    """
    watched = any(
        isinstance(module, _WeightNorm)
        or getattr(module, "sparse", False)
        or (getattr(module, "padding_idx", None) is not None and is_tied(model, module))
        or any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values())
        for module in model.modules()
    )
    return _plain_operations if watched else _plain_attention


def is_tied(model: nn.Module, module: nn.Module) -> bool:
    """Whether the weight of ``module`` also belongs to another module of ``model``."""
    weight = module._parameters.get("weight")
    return sum(any(p is weight for p in other._parameters.values()) for other in model.modules()) > 1


@contextmanager
def _plain_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _plain_operations() -> Iterator[None]:
    with _plain_attention(), _PlainOperations():
        yield


class _PlainOperations(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        if func is F.embedding:
            return _dense_embedding(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dense_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if padding_idx is not None:  # the row counts as a constant, forward as backward
        rows = torch.arange(len(weight), device=weight.device)[:, None]
        weight = torch.where(rows == padding_idx % len(weight), weight.detach(), weight)
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse=False)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``v * g / |v|``, the norm over all dimensions but ``dim``, or over all if ``dim`` is -1."""
    others = [d for d in range(v.ndim) if d != dim] if dim != -1 else list(range(v.ndim))
    return v * (g / v.square().sum(others, keepdim=True).sqrt())
