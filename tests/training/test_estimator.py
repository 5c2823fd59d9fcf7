"""The estimators are scikit-learn's in every respect: its own checks, its tools, and tables of every modality."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris, make_regression
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import hesse
from hesse import InputError, MultimodalClassifier, MultimodalRegressor
from training_tables import TARGET, numbers, pets

FAST = {"epochs": 4}


@parametrize_with_checks([MultimodalClassifier(epochs=4), MultimodalRegressor(epochs=4)])
def test_scikit_learns_own_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame, pd.Series]:
    """A folder, rows of pictures, sounds, texts and columns in it, and their classes."""
    table = pets(tmp_path_factory.mktemp("zoo"), rows=80)
    frame = pd.read_csv(table)
    return table.parent, frame.drop(columns=TARGET), frame[TARGET]


def test_every_modality_and_no_file_is_left(
    zoo: tuple[Path, pd.DataFrame, pd.Series], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, rows, classes = zoo
    before = sorted(root.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = MultimodalClassifier(data_root=root, epochs=6).fit(rows[:60], classes[:60])
    assert model.score(rows[60:], classes[60:]) > 0.6
    assert list(model.classes_) == sorted(set(classes))
    assert list(model.feature_names_in_) == list(rows.columns)
    probability = model.predict_proba(rows)
    assert np.allclose(probability.sum(1), 1)
    assert (model.predict(rows) == model.classes_[probability.argmax(1)]).all()
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own
    assert (again.predict_proba(rows) == probability).all()
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")]  # torch's own folder
    assert sorted(root.rglob("*")) == before and not left


def test_a_frame_of_any_library_gives_the_same_model() -> None:
    columns = numbers()
    y = np.array(columns.pop("species"))
    del columns["age"]
    answers = [MultimodalClassifier(**FAST).fit(frame(columns), y) for frame in (pd.DataFrame, pl.DataFrame, pa.table)]
    first, *others = [model.predict_proba(pa.table(columns)) for model in answers]
    assert all((other == first).all() for other in others)
    assert all(list(model.feature_names_in_) == ["x", "y", "kind"] for model in answers)


def test_an_index_is_no_column() -> None:
    X, y = load_iris(return_X_y=True, as_frame=True)
    plain = MultimodalClassifier(**FAST).fit(X, y)
    named = MultimodalClassifier(**FAST).fit(X.set_index(y.rename("class")), y)
    assert (plain.predict_proba(X) == named.predict_proba(X)).all()


@pytest.mark.parametrize("labels", [("cat", "dog"), (False, True), (7, -3), (0.0, 1.0)], ids=str)
def test_classes_come_back_as_they_were_given(labels: tuple[Any, Any]) -> None:
    X = np.random.default_rng(0).normal(size=(60, 2))
    y = np.array(labels)[(X[:, 0] > 0).astype(int)]
    model = MultimodalClassifier(epochs=8).fit(X, y)
    assert model.classes_.dtype == y.dtype and set(model.predict(X)) == set(labels)
    assert model.score(X, y) > 0.9


def test_missing_values_and_new_categories_are_taken() -> None:
    columns = numbers()
    y = columns.pop("age")
    frame = pd.DataFrame(columns)
    frame.loc[::7, "x"] = np.nan
    frame.loc[::5, "kind"] = None
    model = MultimodalRegressor(epochs=20).fit(frame, y)
    assert model.score(frame, y) > 0.5
    assert np.isfinite(model.predict(frame.assign(kind="never seen"))).all()


def test_values_come_back_in_their_own_units() -> None:
    X, y = make_regression(200, 4, noise=1, random_state=0)
    model = MultimodalRegressor().fit(X[:150], 1e6 + 1e3 * y[:150])
    assert model.score(X[150:], 1e6 + 1e3 * y[150:]) > 0.9


def test_search_pipeline_cross_validation_and_clone() -> None:
    X, y = load_iris(return_X_y=True)
    search = GridSearchCV(MultimodalClassifier(epochs=5), {"optimizer": ["kfac", "adamw"]}, cv=2).fit(X, y)
    assert search.best_params_ == {"optimizer": "kfac"}  # whose steps are worth more
    pipeline = make_pipeline(StandardScaler(), MultimodalClassifier(epochs=5)).fit(X, y)
    assert pipeline.score(X, y) > 0.9
    assert cross_val_score(MultimodalClassifier(epochs=5), X, y, cv=2).min() > 0.8
    assert clone(MultimodalRegressor(lr=0.1, optimizer="sgd")).get_params()["lr"] == 0.1


def test_a_seed_repeats_a_fit_and_none_does_not() -> None:
    X, y = load_iris(return_X_y=True)

    def answer(random_state: Any) -> Any:
        return MultimodalClassifier(random_state=random_state, epochs=1).fit(X, y).predict_proba(X)

    assert (answer(1) == answer(1)).all() and (answer(1) != answer(2)).any()
    assert (answer(np.random.RandomState(0)) == answer(np.random.RandomState(0))).all()
    assert (answer(None) != answer(None)).any()


def test_a_row_gets_the_same_answer_alone_and_among_others() -> None:
    X, y = load_iris(return_X_y=True)
    model = MultimodalClassifier(**FAST).fit(X, y)
    alone = np.concatenate([model.predict_proba(row[None]) for row in X])
    assert np.abs(alone - model.predict_proba(X)).max() < 1e-12


def test_columns_of_an_array_can_be_categories() -> None:
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.integers(6, size=200), rng.normal(size=200)])
    y = X[:, 0] % 2  # no straight line
    assert (
        MultimodalClassifier(columns={"x0": "category"}, epochs=15).fit(X[:150], y[:150]).score(X[150:], y[150:]) > 0.9
    )


@pytest.mark.parametrize("model", [MultimodalClassifier(), MultimodalRegressor()], ids=lambda m: type(m).__name__)
def test_before_fit_there_is_no_answer(model: Any) -> None:
    with pytest.raises(NotFittedError):
        model.predict(np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"optimizer": "newton"}, "no such optimizer"),
        ({"lr": 0.1}, "unused learning rate"),
        ({"epochs": 0}, "bad argument"),
        ({"fusion": "nuclear"}, "no such fusion"),
        ({"columns": {"nowhere": "text"}}, "no such column"),
        ({"optimizer": "sgd", "lr": 1e30}, "diverged"),
    ],
)
def test_what_cannot_be_done_is_said(options: dict[str, Any], kind: str) -> None:
    X, y = make_regression(60, 3, random_state=0)
    with pytest.raises(InputError) as error:
        MultimodalRegressor(**options).fit(X, y)
    assert error.value.finding.kind == kind and error.value.finding.remedy


def test_a_pickle_holds_arrays_and_plain_values_only() -> None:
    X, y = load_iris(return_X_y=True)
    model = MultimodalClassifier(**FAST).fit(X, y)
    state = model.__getstate__()
    assert all(isinstance(weights, np.ndarray) for weights in state["_weights"].values())
    assert "_model" not in state and isinstance(state["_schema"], dict)


def test_the_public_names_are_there() -> None:
    assert {"MultimodalClassifier", "MultimodalRegressor"} <= set(hesse.__all__)
