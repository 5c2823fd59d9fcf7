"""The loop beside a textbook one, and the scores beside scikit-learn's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, r2_score
from torch import Tensor

from hesse.multimodal import FusedModel, encode, make_schema, read_table
from hesse.training.evaluate import evaluate, outputs, score
from hesse.training.feed import deal
from hesse.training.loop import Plan, epochs, start
from hesse.training.optimizers import OPTIMIZERS, make_optimizer
from training_tables import TARGET, numbers, pets


def plan_of(table: object, target: str, root: Path = Path(), epochs: int = 2, batch_size: int = 16) -> Plan:
    source = read_table(table)
    schema, parts = make_schema(source, target, root=root)
    data = encode(schema, source, root=root)
    positions = {name: data.positions(rows) for name, rows in parts.items()}
    return Plan(schema, data, positions, batch_size, seed=0, epochs=epochs, seconds=None, patience=None)


def model_of(plan: Plan) -> FusedModel:
    torch.manual_seed(0)
    return FusedModel(plan.schema.model_settings(), plan.schema.outputs)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad", "adam"])
def test_the_loop_is_the_textbooks(name: str) -> None:
    plan = plan_of(pa.table(numbers()), "species")
    model = model_of(plan)
    state = start(model, make_optimizer(name, model))
    losses: list[float] = []
    assert list(epochs(plan, state, losses.append)) == state.metrics

    plain = model_of(plan)
    optimizer = OPTIMIZERS[name](plain)
    average: list[Tensor] = []
    step = 0
    for epoch in range(2):
        order = torch.randperm(
            len(plan.positions["train"]), generator=torch.Generator().manual_seed(epoch)
        )  # seed 0: 0 * 1000003 + epoch
        total = 0.0
        for some in order.split(16):
            inputs, targets = plan.data.batch(plan.positions["train"][some])
            optimizer.zero_grad()
            loss = F.cross_entropy(plain(**inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(some)
            step += 1
            weight = 1.0 if step == 1 else 4 / (step + 3)
            current = [p.detach().clone() for p in plain.parameters()]
            average = current if step == 1 else [a + weight * (c - a) for a, c in zip(average, current, strict=True)]
        assert state.metrics[epoch]["train_loss"] == pytest.approx(total / len(order), rel=1e-6)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    for p, q in zip(state.average.module.parameters(), average, strict=True):
        torch.testing.assert_close(p, q)
    assert [row["step"] for row in state.steps] == list(range(1, step + 1))


def test_every_epoch_deals_every_row_once_and_never_hides_all(tmp_path: Path) -> None:
    plan = plan_of(pets(tmp_path / "zoo"), TARGET, tmp_path / "zoo")
    orders = []
    shares = []
    for epoch in range(50):
        dealt = deal(plan.positions["train"], len(plan.data.inputs), epoch, plan.batch_size, plan.seed)
        rows = torch.cat([rows for rows, _ in dealt])
        hidden = torch.cat([hidden for _, hidden in dealt])
        assert torch.equal(rows.sort().values, plan.positions["train"].sort().values)
        assert hidden.shape == (len(rows), len(plan.schema.modalities))
        assert not hidden.all(1).any()
        orders.append(rows.tolist())
        shares.append(hidden.float().mean())
    assert len({tuple(order) for order in orders}) == 50
    assert 0.07 < torch.stack(shares).mean() < 0.13
    again = deal(plan.positions["train"], 4, 7, 16, seed=0)
    assert torch.cat([rows for rows, _ in again]).tolist() == orders[7]


def test_one_modality_is_never_hidden() -> None:
    assert not any(hidden.any() for epoch in range(20) for _, hidden in deal(torch.arange(99), 1, epoch, 16, 0))


def test_scores_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    logits, classes = torch.from_numpy(random.normal(size=(50, 4))), torch.from_numpy(random.integers(4, size=50))
    expected = accuracy_score(classes, logits.argmax(1))
    assert score("classification", logits, classes) == pytest.approx(expected)
    truth = torch.from_numpy(random.normal(size=(50, 1)))
    guess = truth + 0.3 * torch.from_numpy(random.normal(size=(50, 1)))
    assert score("regression", guess, truth) == pytest.approx(r2_score(truth, guess))


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_what_is_no_number_has_no_score(task: str) -> None:
    targets = torch.zeros(2, dtype=torch.long) if task == "classification" else torch.tensor([[0.0], [1.0]])
    assert np.isnan(score(task, torch.tensor([[float("nan")], [1.0]]), targets))
    assert np.isnan(score("regression", torch.ones(3, 1), torch.ones(3, 1)))  # nothing to explain


def test_the_evaluation_of_a_model(tmp_path: Path) -> None:
    plan = plan_of(pets(tmp_path / "zoo"), TARGET, tmp_path / "zoo")
    model = model_of(plan)
    record = evaluate(plan.schema, model, plan.data, plan.positions, "valid")
    at = plan.positions["valid"]
    inputs, targets = plan.data.batch(at)
    with torch.no_grad():
        out = model(**inputs)
        hidden = {key: (data, here & (key == "image_写真_png")) for key, (data, here) in inputs.items()}
        alone = model(**hidden)
    assert record["confusion"] == confusion_matrix(targets, out.argmax(1), labels=range(4)).tolist()
    assert record["loss"] == pytest.approx(F.cross_entropy(out, targets).item())
    assert record["modalities"]["image_写真_png"]["alone"] == pytest.approx(accuracy_score(targets, alone.argmax(1)))
    assert model.training  # as it was
    assert torch.equal(outputs(model, plan.data, at), out)
