"""Late fusion: every modality gives an answer of its own, and Bayes' rule puts the answers together.

If the modalities are independent given the target, ``p(y | x_1 .. x_M)`` is in proportion to ``p(y) prod_m p(y | x_m) /
p(y)``: logarithms of probabilities are added, and the prior, which every answer contains, is counted once. Naive Bayes
is the case of one feature a modality, a product of experts (Hinton, 2002) that of a flat prior. For quantities with
Gaussian experts the same rule is the mean weighted by precisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.multimodal.fusion.masking import kept

__all__ = ["Late"]


class Late(nn.Module):
    """Logits ``prior + sum_m s_m (logits_m - prior)``, and means ``(prior + sum_m c_m mean_m) / (1 + sum_m c_m)``.

    The sums are over the modalities that are present: of a row that has none, what is left is the prior. The scales
    ``s_m`` are trained, one a modality: below one, a modality claims more than it knows, or says again what others say.
    The precisions ``c_m`` are functions of the row, in units of the prior's. Logits are log-probabilities up to a
    constant for each row, which no softmax sees.

    Args:
        widths: the width of each modality's features.
        answers: for each target its task ("classification", "multilabel" or "regression") and its width, in their
            order. Regression takes the mean, all others logits.
        hidden: width of the layer between features and answer.

    Attributes:
        width: of the result, the sum of the answers' widths.

    References:
        Hinton, Training products of experts by minimizing contrastive divergence, Neural Computation 14, 2002.
        Kittler, Hatef, Duin and Matas, On combining classifiers, IEEE PAMI 20, 1998 (the product rule).

    Example:
        Two witnesses, each certain by 3 to 1 where the prior is even, together by 9 to 1:

        >>> fuse = Late({"a": 1, "b": 1}, [("classification", 2)])
        >>> for head in fuse.heads.values():
        ...     _ = nn.init.zeros_(head[2].weight), head[2].bias.data.copy_(torch.tensor([3.0, 1.0]).log())
        >>> here, x = torch.tensor([True]), torch.zeros(1, 1)
        >>> fuse({"a": x, "b": x}, {"a": here, "b": here}).softmax(1)
        tensor([[0.9000, 0.1000]], grad_fn=<SoftmaxBackward0>)
        >>> fuse({"a": x, "b": x}, {"a": here, "b": ~here}).softmax(1)
        tensor([[0.7500, 0.2500]], grad_fn=<SoftmaxBackward0>)
    """

    def __init__(self, widths: Mapping[str, int], answers: Sequence[tuple[str, int]], hidden: int = 64) -> None:
        super().__init__()
        self.modalities: Sequence[str] = tuple(widths)
        self.answers = tuple(answers)
        self.width = sum(width for _, width in self.answers)
        quantities = [torch.full((width,), task == "regression") for task, width in self.answers]
        # Columns of the answer that are means, and the others: plain lists, for a buffer would be saved.
        self._means = torch.cat(quantities).nonzero().flatten().tolist()
        self._logits = [i for i in range(self.width) if i not in self._means]
        self.heads = nn.ModuleDict()
        for key, inside in widths.items():
            first, last = nn.Linear(inside, hidden), nn.Linear(hidden, self.width + len(self._means))
            nn.init.kaiming_normal_(first.weight, nonlinearity="relu")
            nn.init.normal_(last.weight, std=(hidden * len(widths)) ** -0.5)  # the sum of all has unit variance
            nn.init.normal_(first.bias, std=0.01)
            nn.init.zeros_(last.bias)
            self.heads[key] = nn.Sequential(first, nn.ReLU(), last)
        self.prior = nn.Embedding(1, self.width)  # layers that curvature by layers knows, unlike bare parameters
        nn.init.zeros_(self.prior.weight)
        self.scales = nn.ModuleDict({key: nn.Linear(1, 1, bias=False) for key in (widths if self._logits else ())})
        for scale in self.scales.values():
            nn.init.ones_(scale.get_parameter("weight"))

    def forward(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """``features[key]``: ``[B, width]``, ``present[key]``: bool ``[B]``. Returns ``[B, self.width]``."""
        rows = next(iter(features.values())).shape[0]
        prior = self.prior(torch.zeros(rows, dtype=torch.int64, device=self.prior.weight.device))
        logits, total, weights = prior[:, self._logits], prior[:, self._means], torch.ones_like(prior[:, self._means])
        for key in self.modalities:
            there = present[key]
            said = self.heads[key](kept(there, features[key]))
            if self._logits:
                news = said[:, self._logits] - prior[:, self._logits]
                # As one column: a scale is one number for all classes.
                scaled = self.scales[key](news.reshape(-1, 1)).view_as(news)
                logits = logits + kept(there, scaled)
            if self._means:
                precision = kept(there, F.softplus(said[:, self.width :]))
                total, weights = total + precision * said[:, self._means], weights + precision
        if not self._means:
            return logits
        places = torch.tensor([*self._logits, *self._means], device=prior.device).argsort()
        return torch.cat([logits, total / weights], dim=1)[:, places]
