"""PMR: prototypes by a loop, the paper's ratio for two modalities, entropies in early epochs only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from balanced_models import SIZES, THREE, K, batch, make
from hesse.multimodal.balance import PMR


def test_prototypes_are_class_means_of_those_present() -> None:
    cure = make(PMR)
    batches = [batch(absent=True), batch(9, absent=True, seed=1)]
    cure.begin_epoch(F.cross_entropy, batches, [])
    for key in SIZES:
        for k in range(K):
            found = [
                cure.model.features(**inputs)[key][i]
                for inputs, targets in batches
                for i in range(len(targets))
                if targets[i] == k and inputs[key][1][i]
            ]
            torch.testing.assert_close(cure.prototypes(key)[k], torch.stack(found).mean(0))


def test_prototypes_move_by_their_momentum_and_unseen_classes_have_the_mean() -> None:
    cure = make(PMR, momentum=0.25)
    cure.begin_epoch(F.cross_entropy, [batch()], [])
    first = cure.prototypes("audio").clone()
    inputs, targets = batch(10, seed=3)
    rows = targets != 2
    some = {key: (x[rows], here[rows]) for key, (x, here) in inputs.items()}, targets[rows]
    cure.begin_epoch(F.cross_entropy, [some], [])
    f = cure.model.features(**some[0])["audio"]
    torch.testing.assert_close(cure.prototypes("audio")[2], 0.25 * first[2] + 0.75 * f.mean(0))
    torch.testing.assert_close(cure.prototypes("audio")[1], 0.25 * first[1] + 0.75 * f[some[1] == 1].mean(0))


def by_hand(cure: PMR, inputs: object, targets: torch.Tensor, early: bool) -> torch.Tensor:
    """The paper's loss for two modalities, row by row."""
    features = cure.model.features(**inputs)  # type: ignore[operator, arg-type]
    p, s = {}, {}
    for key, f in features.items():
        logits = torch.stack([torch.stack([-(row - c).norm() for c in cure.prototypes(key)]) for row in f])
        p[key] = logits.softmax(1)
        s[key] = float(torch.stack([p[key][i, t] for i, t in enumerate(targets.tolist())]).sum().detach())
    ratio = s["image"] / s["audio"]
    beta, gamma = min(max(1 / ratio - 1, 0), 1), min(max(ratio - 1, 0), 1)
    loss = F.cross_entropy(cure.model(**inputs), targets)  # type: ignore[arg-type]
    nll = {key: -torch.stack([q[i, t].log() for i, t in enumerate(targets.tolist())]).mean() for key, q in p.items()}
    entropy = {key: -(q * q.log()).sum(1).mean() for key, q in p.items()}
    loss = loss + cure.alpha * (beta * nll["image"] + gamma * nll["audio"])
    if early:
        loss = loss - cure.mu * (gamma * entropy["image"] + beta * entropy["audio"])
    return loss


@pytest.mark.parametrize("early", [0, 1], ids=["late", "early"])
def test_the_loss_is_the_papers(early: int) -> None:
    cure = make(PMR, alpha=0.7, mu=0.3, early=early)
    inputs, targets = batch()
    cure.begin_epoch(F.cross_entropy, [(inputs, targets)], [])
    found = cure.loss(F.cross_entropy)(cure(**inputs), targets)
    wanted = by_hand(cure, inputs, targets, early > 0)
    assert float(cure.weights[1:].sum()) > 0 and float(cure.ahead.sum()) > 0
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    params = list(cure.model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found, params), torch.autograd.grad(wanted, params), rtol=1e-4, atol=1e-6
    )


def test_with_three_modalities_each_is_held_against_the_mean_of_the_others() -> None:
    cure = make(PMR, THREE)
    inputs, targets = batch(sizes=THREE, absent=True)
    cure.begin_epoch(F.cross_entropy, [(inputs, targets)], [])
    parts, present = cure.split(cure(**inputs))
    cure.loss(F.cross_entropy)(cure(**inputs), targets)
    s = []
    for key in THREE:
        right = parts[key].softmax(1)[torch.arange(len(targets)), targets]
        s.append(float(right[present[key]].mean().detach()))
    for m in range(3):
        others = sum(s[:m] + s[m + 1 :]) / 2
        assert float(cure.ahead[m]) == pytest.approx(min(max(s[m] / others - 1, 0), 1), abs=1e-6)
        assert float(cure.weights[1 + m]) == pytest.approx(min(max(others / s[m] - 1, 0), 1), abs=1e-6)


def test_without_prototypes_there_is_nothing_to_go_by() -> None:
    cure = make(PMR)
    inputs, _ = batch()
    with pytest.raises(RuntimeError, match="PMR has no prototypes yet: call begin_epoch"):
        cure(**inputs)
