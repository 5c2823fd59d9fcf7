"""How sharp attention is: the entropy of its rows, as a share of what looking at all keys alike would give.

Attention that puts all its weight on one key passes no gradient through the softmax (entropy collapse, Zhai et al.
2023, https://arxiv.org/abs/2303.06296); attention that looks at all keys alike has learned nothing. Seen are
``F.scaled_dot_product_attention``, ``nn.MultiheadAttention`` on whichever path, and a softmax over the last axis of
scores [..., queries, keys]. The first two never show their scores, so those of a few heads and queries are computed
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hesse.health.sensors.functional import Call, Calls
from hesse.health.sensors.protocol import Reading, Section
from hesse.health.sensors.samples import Samples, plain
from hesse.health.stats import Layer

__all__ = ["Attention", "sharpness"]

HEADS = 8  # pairs of a row of the batch and a head that are looked at
QUERIES = 32  # of each
MASKED = 5000.0  # below the row's largest score: masks are written as -1e4, -1e9 or the least number of the dtype


class Attention:
    """Keys: ``entropy`` (1: all keys alike, 0: one key), ``share`` (the largest weight), ``logits`` (largest |score|).

    Means over the queries that see more than one key, and over calls.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, q, k):
        ...         return nn.functional.scaled_dot_product_attention(q, k, k)
        >>> net, k = Net(), torch.eye(4)[None, None]
        >>> calls = Calls(net)
        >>> sensor = Attention(net, [], calls)
        >>> calls.listen()
        >>> _ = net(torch.zeros(1, 1, 3, 4), k), net(1000 * k, k)
        >>> calls.rest()
        >>> {path: {key: round(x.item(), 3) for key, x in keys.items()} for path, keys in sensor.read().items()}
        {'Net.scaled_dot_product_attention': {'entropy': 0.5, 'share': 0.625, 'logits': 250.0}}
    """

    section: ClassVar[Section] = "layers"

    def __init__(self, model: nn.Module, layers: Sequence[Layer], calls: Calls) -> None:
        self.calls = calls
        self._samples = Samples()
        calls.on_functions({"scaled_dot_product_attention"}, self._scaled_dot_product)
        calls.on_functions({"multi_head_attention_forward"}, self._multi_head)
        calls.on_functions({"softmax"}, self._softmax)

    def listen(self) -> None:
        self._samples = Samples()

    def rest(self) -> None:
        """Nothing is left to stop: the hooks belong to ``calls``."""

    def read(self) -> Reading:
        reading: Reading = {path: dict(numbers) for path, numbers in self._samples.read().items()}
        self.listen()
        return reading

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is counted from sample to sample."""

    def _scaled_dot_product(self, call: Call) -> None:
        q, k = plain(call.argument(0, "query")), plain(call.argument(1, "key"))
        if q is None or k is None or q.dim() < 2 or q.dim() != k.dim() or not self._turn(call):
            return
        mask, scale = call.argument(3, "attn_mask"), call.argument(6, "scale")
        lead, (T, S) = q.shape[:-2], (q.shape[-2], k.shape[-2])
        picked, rows = _picked(lead, q.device), _spread(T, QUERIES, q.device)
        shared = [i if n == m else i // (m // n) for i, n, m in zip(picked, k.shape[:-2], lead, strict=True)]
        Q = q.detach()[picked][..., rows, :] if picked else q.detach()[rows]
        K = k.detach()[tuple(shared)] if picked else k.detach()
        scores = Q.float() @ K.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if isinstance(mask, Tensor):
            mask = mask.detach().expand(*lead, T, S)
            mask = mask[picked][..., rows, :] if picked else mask[rows]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
        if call.argument(5, "is_causal", False):
            scores = scores.masked_fill(torch.arange(S, device=q.device) > rows[:, None], -torch.inf)
        self._add(call, scores)

    def _multi_head(self, call: Call) -> None:
        """The scores of a few rows of the batch and heads, from the arguments and projections."""
        q, k, v = (plain(call.argument(i, name)) for i, name in enumerate(("query", "key", "value")))
        heads, bias = call.argument(4, "num_heads"), plain(call.argument(6, "in_proj_bias"))
        given = (call.argument(7, "bias_k"), call.argument(21, "static_k"))
        added = any(x is not None for x in given) or call.argument(9, "add_zero_attn")
        if q is None or k is None or v is None or added or not self._turn(call):
            return
        if q.dim() == 2:
            q, k = q[:, None], k[:, None]
        T, B, E = q.shape
        S, d = k.shape[0], E // heads
        weight = call.argument(5, "in_proj_weight")
        wq, wk = (weight[:E], weight[E : 2 * E]) if weight is not None else (
            call.kwargs["q_proj_weight"], call.kwargs["k_proj_weight"]
        )  # fmt: skip
        (b, h), rows = _picked(torch.Size((B, heads)), q.device), _spread(T, QUERIES, q.device)
        Q = torch.einsum("qpe,pde->pqd", q[rows][:, b].float(), wq.view(heads, d, -1)[h].float())
        K = torch.einsum("kpe,pde->pkd", k[:, b].float(), wk.view(heads, d, -1)[h].float())
        if bias is not None:
            Q = Q + bias[:E].view(heads, 1, d)[h].float()
            K = K + bias[E : 2 * E].view(heads, 1, d)[h].float()
        scores = Q @ K.transpose(1, 2) * d**-0.5
        mask, padding = call.kwargs.get("attn_mask"), call.kwargs.get("key_padding_mask")
        if mask is not None:
            mask = mask.view(B, heads, T, S) if mask.dim() == 3 and mask.shape[0] != 1 else mask.expand(B, heads, T, S)
            scores = _without(scores, mask[b, h][:, rows])
        if padding is not None:
            scores = _without(scores, padding.view(B, 1, S)[b])
        self._add(call, scores)

    def _softmax(self, call: Call) -> None:
        """A softmax is attention when its scores are [..., queries, keys]: square, or with a head's axis in front."""
        x = plain(call.argument(0, "input"))
        dim = call.argument(1, "dim")
        if x is None or dim is None or x.dim() < 3 or dim not in (-1, x.dim() - 1):
            return
        if (x.dim() == 3 and x.shape[1] != x.shape[2]) or x.shape[-1] < 2 or not self._turn(call):
            return
        picked, rows = _picked(x.shape[:-2], x.device), _spread(x.shape[-2], QUERIES, x.device)
        self._add(call, x.detach()[picked][..., rows, :].float())

    def _turn(self, call: Call) -> bool:
        return self._samples.turn("attention", self._key(call))

    def _key(self, call: Call) -> str:
        return self.calls.key("activation", call.path, (call.chain[-1], call.after))

    def _add(self, call: Call, scores: Tensor) -> None:
        for name, value in zip(("entropy", "share", "logits"), sharpness(scores), strict=True):
            self._samples.add(self._key(call), name, value)


def sharpness(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy of attention's rows over the log of their number of keys, the largest weight, the largest |score|.

    Args:
        scores: before the softmax, [..., queries, keys]; masked keys are at -inf or far below all others.

    Returns:
        Three scalars; the first two are means over the rows with more than one key, NaN when there is none.

    Example:
        >>> entropy, share, logits = sharpness(torch.tensor([[2.0, 2.0, -torch.inf], [99.0, 0.0, 0.0]]))
        >>> round(entropy.item(), 3), round(share.item(), 3), logits.item()
        (0.5, 0.75, 99.0)
    """
    top = scores.amax(-1, keepdim=True)
    seen = (scores > top - MASKED) & (scores > -torch.inf)
    count = seen.sum(-1)
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    rows = count > 1
    entropy = torch.special.entr(p).sum(-1) / count.clamp_min(2).log()
    n = rows.sum()
    mean = [torch.where(rows, value, 0.0).sum() / n for value in (entropy, p.amax(-1))]
    return mean[0], mean[1], torch.where(seen, scores, 0.0).abs().amax()


def _without(scores: Tensor, mask: Tensor) -> Tensor:
    """``nn.MultiheadAttention``'s masks: what is true is left out, numbers are added."""
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()


@lru_cache(256)
def _spread(n: int, limit: int, device: torch.device) -> Tensor:
    """At most ``limit`` indices below ``n``, first and last among them."""
    return torch.arange(n, device=device) if n <= limit else torch.linspace(0, n - 1, limit, device=device).long()


@lru_cache(256)
def _picked(shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """A few places in the leading axes, an index tensor an axis: different rows, different heads."""
    n = shape.numel()
    step = max(1, n // HEADS)
    while step > 1 and gcd(step, n) > 1:
        step += 1
    return torch.unravel_index(torch.arange(min(n, HEADS), device=device) * step % n, shape) if shape else ()
