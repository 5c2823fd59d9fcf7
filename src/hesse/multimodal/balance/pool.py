"""hesse's own cure: a loss for every tower that nobody can take away, and a pooled answer that knows whom to trust.

Starvation has two ends. In training the quick tower takes the loss away; with a head and a loss of its own each tower
keeps its gradient, and its curvature too: where the losses are apart the Hessian is block diagonal, a block a tower,
and the step that is right for one does not depend on another. In the answer a head that was trained on all towers at
once does not know how far each may be believed on rows that are not like those of training; a share for each, fitted
on validation rows, does.

With the fused loss alone in the pool this is the plain model, with the modalities' own alone the product of experts,
with one of them the best single modality.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from hesse.multimodal.balance.cure import FUSED, Batch, LossFn, chosen
from hesse.multimodal.balance.heads import Heads
from hesse.multimodal.balance.shares import best_constant, pooled, shares

__all__ = ["Pool"]

MOST = 5  # modalities of which every combination has shares of its own
CHUNKS = 20  # of the rows, whose mean losses say how sure a difference is
PRIOR = 0.5  # of a share, as much as one validation row says
SURE = 1.0  # standard errors by which a pool has to be better than one modality
FEWEST = 2 * CHUNKS  # rows from which on that can be said at all


class Pool(Heads):
    """Heads, and an answer pooled from the fused head and the modalities' own.

        answer = a + sum_k v_k (o_k - a),    v >= 0,

    with o_k the outputs (logits, values) of the fused head and of each modality that is present, and a the best
    constant one. Each combination of up to five modalities has its own v, so a row is answered by those who are there,
    at the trust they have without the others. Where the pool of a combination is no
    better than one of its modalities alone, by a standard error over validation rows (40 or more of them), that
    modality answers alone: :func:`fallback` says so.

    Validation decides by what it sees: if its rows share with those of training what the test's do not (a speaker, a
    camera, a clinic), it trusts what will fail. Split by such groups.

    Args:
        model, outputs, widths: see :class:`Cure`.
        weights: of the losses, as :class:`Heads` takes them.
        targets: how wide the outputs of each target are, if there are several; each has shares of its own.
        reach: how much of the fused loss's gradient goes on into the towers: 1 all, 0 none. The fused head learns at
            any reach. A little lets towers learn what only shows in combination; all of it lets the quick ones, whose
            answer the fused head has come to lean on, pull the others (docs/multimodal.md).

    Call :meth:`fit` on the weights that are to answer (an average of them, if there is one) before they are asked.

    Raises:
        ValueError: ``reach`` is not between 0 and 1, or the targets are not as wide as the outputs; or, in ``fit``,
            there are no rows.
    """

    v: Tensor
    base: Tensor
    alone: Tensor
    verdict: Tensor

    def __init__(
        self,
        model: nn.Module,
        outputs: int,
        widths: Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        targets: Sequence[int] | None = None,
        reach: float = 0.3,
    ) -> None:
        super().__init__(model, outputs, widths, weights)
        if not 0 <= reach <= 1:
            raise ValueError(f"reach is a share of the fused gradient, between 0 and 1; got {reach}.")
        each = tuple(targets or (outputs,))
        if sum(each) != outputs:
            raise ValueError(f"The targets are {each} wide, which is not the {outputs} outputs that the model has.")
        self.reach = reach
        self._rows: Tensor | None = None  # who is present in the batch that ``_began`` is of, which tells batches apart
        self._began: dict[str, Tensor] = {}  # features
        self._target = [t for t, width in enumerate(each) for _ in range(width)]
        self.register_buffer("base", torch.zeros(outputs))
        self.register_buffer("alone", torch.tensor(-1))  # the modality that answers alone when all are present
        self.register_buffer("v", self._prior())
        self.register_buffer("verdict", torch.zeros(3))  # losses of the best alone, of all, error of their difference

    def _prior(self) -> Tensor:
        """Before anything is known: half a vote for each."""
        return torch.full(
            (2 ** len(self.widths) if self._every else 1, 1 + len(self.widths), 1 + max(self._target)), PRIOR
        )

    @property
    def _every(self) -> bool:
        return len(self.widths) <= MOST

    def parts(self, **inputs: tuple[Any, Tensor]) -> Tensor:
        rows = inputs[self.modalities[0]][1]
        if rows is not self._rows:
            self._rows, self._began = rows, {}
        return super().parts(**inputs)

    def flow(self, key: str, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Towards the fused head a tower moves ``reach`` of its way from where it was when gradients were last taken.

        Then gradient, curvature, and the loss at a trial point of the same rows are those of one function.
        """
        if self.reach == 1 or not self.training:
            return feature, feature
        if feature.requires_grad or key not in self._began:
            self._began[key] = feature.detach()
        began = self._began[key]
        return began + self.reach * (feature - began), feature

    def fuse(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """The pooled answer ``[B, outputs]``."""
        here = torch.stack([present[key] for key in self.modalities], dim=1)
        outputs = torch.stack(self._experts(features, present))
        v = self.v[self._combination(here)] if self._every else self.v.expand(here.shape[0], -1, -1)
        v = torch.cat([v[:, :1], v[:, 1:] * here[:, :, None]], dim=1)
        return pooled(outputs, self.base.to(outputs), v[:, :, self._target].to(outputs))

    def _experts(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> list[Tensor]:
        own = self.own(features, present)
        return [self.model.fuse(features, present), *(own[key] for key in self.modalities)]  # type: ignore[operator]

    def _combination(self, here: Tensor) -> Tensor:
        """Which row of the table goes with those who are present, int64 ``[B]``, from bool ``[B, modalities]``."""
        return (here.long() * 2 ** torch.arange(here.shape[1], device=here.device)).sum(1)

    @torch.no_grad()
    def fit(self, loss_fn: LossFn, valid: Iterable[Batch]) -> dict[str, float]:
        """Find the shares on rows that are not trained on; returns them for all modalities together, by name (of
        several targets the mean).

        Args:
            loss_fn: of the answer, a mean over rows, convex in it.
            valid: batches ``(inputs, targets)``.
        """
        features, present, targets = self._gather(valid)
        here = torch.stack([present[key] for key in self.modalities], dim=1)
        found: dict[tuple[int, ...], Tensor] = {}
        count = len(self.widths)
        everyone = tuple(range(count))
        sizes = range(1, count + 1) if self._every else [count]
        outputs = torch.stack(self._experts(features, present))
        self.base.copy_(best_constant(lambda o: loss_fn(o, targets), outputs[0]))
        for size in sizes:
            for members in combinations(everyone, size):
                found[members] = self._of(members, features, here, targets, loss_fn)
        if self._every:
            for members, v in found.items():
                self.v[sum(2**m for m in members)] = v.to(self.v)
            self.v[0] = 0.0  # with nobody there the answer is the constant, or what the model says then
            self.v[0, 0] = float(getattr(self.model, "prior", None) is not None)
        else:
            self.v[0] = found[everyone].to(self.v)
        self.alone.fill_(self._single(found[everyone]))
        mean = found[everyone].mean(1)
        return dict(zip((FUSED, *self.modalities), mean.tolist(), strict=True))

    def _of(
        self,
        members: tuple[int, ...],
        features: Mapping[str, Tensor],
        here: Tensor,
        targets: Any,
        loss_fn: LossFn,
    ) -> Tensor:
        """The shares ``[1 + modalities, T]`` of one combination, from rows that have all its members."""
        voters = [0, *(1 + m for m in members)]
        prior = torch.zeros_like(self.v[0], dtype=torch.float64)
        prior[voters] = PRIOR
        rows = here[:, list(members)].all(1)
        if not bool(rows.any()):
            return prior
        seen = {key: f[rows] for key, f in features.items()}
        only = {
            key: torch.full((int(rows.sum()),), m in members, device=here.device)
            for m, key in enumerate(self.modalities)
        }
        outputs = torch.stack(self._experts(seen, only))[voters].double()
        base, some = self.base.double(), chosen(rows, targets)

        def mean(o: Tensor) -> Tensor:
            return loss_fn(o, some)

        v = torch.zeros_like(prior)
        target = torch.tensor(self._target, device=here.device)
        v[voters] = shares(mean, outputs, base, prior[voters], target)
        if len(members) == 1:
            return v
        singles = []
        for i, m in enumerate(members, start=1):
            w = torch.zeros_like(prior)
            w[1 + m] = shares(mean, outputs[i : i + 1], base, torch.ones_like(prior[:1]), target)[0]
            singles.append(w)
        answers = [pooled(outputs, base, w[voters][:, target]) for w in singles]
        together = pooled(outputs, base, v[voters][:, target])
        best = min(range(len(singles)), key=lambda i: float(mean(answers[i])))
        gain = torch.tensor(
            [
                float(loss_fn(answers[best][part], few)) - float(loss_fn(together[part], few))
                for part in torch.arange(len(together)).chunk(CHUNKS)
                for few in [chosen(part, some)]
            ]
        )
        gain = gain[gain.isfinite()]  # rows may lack the target
        error = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
        self.verdict.copy_(torch.tensor([float(mean(answers[best])), float(mean(together)), error]))
        surely = float(gain.sum()) > SURE * error * len(gain)
        return v if surely or len(together) < FEWEST else singles[best]

    def _gather(self, batches: Iterable[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
        """Features, presence and targets of all rows, in eval mode."""
        was_training = self.training
        self.eval()
        features: list[dict[str, Tensor]] = []
        present: list[dict[str, Tensor]] = []
        targets: list[Any] = []
        for inputs, some in batches:
            features.append(self.features(**inputs))
            present.append({key: inputs[key][1] for key in self.modalities})
            targets.append(some)
        self.train(was_training)
        if not features:
            raise ValueError("Pool.fit needs validation rows to decide by; there is no batch.")
        whole: Any = (
            torch.cat(targets) if isinstance(targets[0], Tensor) else tuple(map(torch.cat, zip(*targets, strict=True)))
        )
        return _joined(features), _joined(present), whole

    @staticmethod
    def _single(v: Tensor) -> int:
        """The modality that answers alone, or -1."""
        used = (v > 0).any(1)
        return int(used[1:].long().argmax()) if not bool(used[0]) and int(used.sum()) == 1 else -1


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
