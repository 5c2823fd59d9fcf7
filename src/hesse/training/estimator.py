"""The trainer as scikit-learn knows its models: ``fit``, ``predict``, ``predict_proba``, ``score``.

A classifier and a regressor, on data frames whose columns are numbers, categories, texts or paths of pictures and
sounds, and on plain arrays of numbers. They can be cloned, searched over, put into pipelines and pickled like any other
estimator, and leave no files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hesse.multimodal import Schema, Table, encode, read_table
from hesse.multimodal.table import unused
from hesse.training.build import build_model
from hesse.training.calibration import probabilities, temperature_of
from hesse.training.evaluate import outputs
from hesse.training.memory import learn
from hesse.training.screen import Screen

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import Tags, check_consistent_length, check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("The estimators need scikit-learn: pip install 'hesse[train]'", name=error.name) from error

__all__ = ["MultimodalClassifier", "MultimodalRegressor"]

OWN = ("columns", "data_root", "random_state", "verbose")  # parameters that are not settings of a run
LARGEST_SEED = 2**31 - 1


class _Multimodal(BaseEstimator):  # type: ignore[misc]
    """What both have in common: reading rows, training, outputs, and a state that can be pickled."""

    def __init__(
        self,
        *,
        optimizer: str = "kfac",
        lr: float | None = None,
        weight_decay: float | None = None,
        epochs: int | None = None,
        seconds: float | None = None,
        batch_size: int | None = None,
        fusion: str = "concat",
        balance: str = "pool",
        class_weights: str | None = None,
        encoders: Mapping[str, str] | None = None,
        trainable: Mapping[str, str | int] | None = None,
        columns: Mapping[str, str] | None = None,
        data_root: str | os.PathLike[str] | None = None,
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.seconds = seconds
        self.batch_size = batch_size
        self.fusion = fusion
        self.balance = balance
        self.class_weights = class_weights
        self.encoders = encoders
        self.trainable = trainable
        self.columns = columns
        self.data_root = data_root
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True  # a missing value
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        if "_model" in state:
            weights = state.pop("_model").state_dict()
            state |= {"_schema": self._schema.to_json(), "_weights": {name: t.numpy() for name, t in weights.items()}}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        weights = state.pop("_weights", None) if (state := dict(state)) else None
        super().__setstate__(state)
        if weights is not None:
            self._schema = Schema.from_json(state["_schema"])
            with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and overwritten at once
                model = build_model(self._schema, self._settings)
            model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
            self._model = _exact(model.eval(), self._schema)

    def _train(self, X: Any, source: Table, y: NDArray[Any], kind: str) -> Self:
        """Train on the rows ``X``, read as ``source``, whose targets ``y`` are classes ("category") or values."""
        check_consistent_length(X, y)
        target = unused("target", source.names)
        whole = Table(source.data.append_column(target, pa.array(y)), source.name, None)
        found = {} if _is_frame(X) else dict.fromkeys(source.names, "number")
        settings = {name: value for name, value in self.get_params(deep=False).items() if name not in OWN}
        settings["seed"] = self._seed()
        learned = learn(
            whole,
            target,
            columns=found | dict(self.columns or {}) | {target: kind},
            root=self._root(),
            settings=settings,
            screen=Screen(quiet=not self.verbose),
        )
        self._columns, self._settings, self._schema = source.names, learned.settings, learned.schema
        self._calibration = learned.calibration
        self._model = _exact(learned.model, learned.schema)
        self.n_epochs_ = learned.epochs
        return self

    def _outputs(self, X: Any) -> Tensor:
        """What the model says of each row, float64 ``[rows, outputs]``."""
        check_is_fitted(self, "n_epochs_")
        source = self._table(X, reset=False)
        source = Table(source.data.rename_columns(self._columns), source.name, None)
        data = encode(self._schema, source, root=self._root(), with_target=False)
        return outputs(self._model, data, torch.arange(len(data))).double()

    def _table(self, X: Any, *, reset: bool) -> Table:
        """The rows as a table: a data frame with its columns, an array with columns x0, x1, ..."""
        if _is_frame(X):
            validate_data(self, X, reset=reset, skip_check_array=True)
            source = read_table(X)
            # pandas gives its index, if that has a name, as one more column.
            return Table(source.data.select(range(X.shape[1])), source.name, None)
        array = validate_data(
            self, X, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan", ensure_min_samples=2 if reset else 1
        )
        return read_table(pa.table({f"x{i}": array[:, i] for i in range(array.shape[1])}))

    def _seed(self) -> int:
        if isinstance(self.random_state, int | np.integer):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(LARGEST_SEED))

    def _root(self) -> Path:
        return Path.cwd() if self.data_root is None else Path(self.data_root)


class MultimodalClassifier(ClassifierMixin, _Multimodal):  # type: ignore[misc]
    """Classes from pictures, sounds, texts, numbers and categories.

    Args:
        optimizer: as in :func:`hesse.train`; "kfac" needs no learning rate.
        lr: learning rate, for those that take one; by default torch's.
        weight_decay: pulls the weights to zero; by default the optimiser's own.
        epochs: how many; by default up to 40, fewer when the validation loss has not improved for 8.
        seconds: most seconds of training.
        batch_size: rows a step; by default as in :func:`hesse.train`.
        fusion, balance, class_weights, encoders, trainable: as in :func:`hesse.train`.
        columns: kinds to use instead of those found, as in :func:`hesse.train`. The columns of an array are called
            x0, x1, ... and are numbers.
        data_root: the folder that paths in cells are relative to and may not leave; by default the working directory.
        random_state: of validation rows, initial weights and order; a number repeats a fit exactly.
        verbose: progress on stderr.

    Attributes:
        classes_: the classes, ascending ``[classes]``.
        n_features_in_, feature_names_in_: the number and, of a data frame, the names of the columns.
        n_epochs_: how many epochs were trained.

    A tenth of the rows is not trained on; it chooses the epoch. Values may be missing (NaN, None).

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True, as_frame=True)
        >>> model = MultimodalClassifier().fit(X[::2], y[::2])
        >>> bool(model.score(X[1::2], y[1::2]) > 0.9), model.predict_proba(X).shape
        (True, (150, 3))
    """

    def fit(self, X: Any, y: ArrayLike) -> Self:
        """Train on rows ``X`` (a data frame, or an array ``[rows, columns]``) and their classes ``y`` ``[rows]``.

        Raises:
            InputError (a ValueError): one class only, a column or file that cannot be read, an argument out of range.
        """
        y = validate_data(self, y=y)
        check_classification_targets(y)
        source = self._table(X, reset=True)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"The rows are all of one class, {self.classes_[0]!r}: there is nothing to tell apart.")
        return self._train(X, source, codes, "category")

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """The calibrated probability of each class, ``[rows, classes]``, in the order of ``classes_``."""
        out = self._outputs(X)
        (target,) = self._schema.targets
        p: NDArray[np.float64] = probabilities(target.task, out, temperature_of(self._calibration, target)).numpy()
        return p

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each row."""
        probability = self.predict_proba(X)
        chosen: NDArray[Any] = self.classes_[probability.argmax(1)]
        return chosen


class MultimodalRegressor(RegressorMixin, _Multimodal):  # type: ignore[misc]
    """A number from pictures, sounds, texts, numbers and categories; arguments as :class:`MultimodalClassifier`.

    Attributes:
        n_features_in_, feature_names_in_: the number and, of a data frame, the names of the columns.
        n_epochs_: how many epochs were trained.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(200, 3))
        >>> y = 5 + 2 * X[:, 0] - X[:, 1]
        >>> bool(MultimodalRegressor().fit(X[:150], y[:150]).score(X[150:], y[150:]) > 0.95)
        True
    """

    def fit(self, X: Any, y: ArrayLike) -> Self:
        """Train on rows ``X`` (a data frame, or an array ``[rows, columns]``) and their values ``y`` ``[rows]``.

        Raises:
            InputError (a ValueError): all values equal, a column or file that cannot be read, an argument out of range.
        """
        y = validate_data(self, y=y, y_numeric=True)
        return self._train(X, self._table(X, reset=True), np.asarray(y, np.float64), "number")

    def predict(self, X: Any) -> NDArray[np.float64]:
        """The value of each row, ``[rows]``, in the units of the target."""
        out = self._outputs(X)[:, 0]
        (target,) = self._schema.targets
        value: NDArray[np.float64] = (target.mean + target.scale * out).numpy()
        return value


def _is_frame(X: Any) -> bool:
    """Whether rows come with named columns: pandas, polars, pyarrow."""
    return hasattr(X, "__arrow_c_stream__") and hasattr(X, "columns")


def _exact(model: Any, schema: Schema) -> Any:
    """In double precision if only numbers and categories go in: it costs little there, and a row then gets the same
    answer alone and among others, to the last digits.
    """
    return model.double() if set(schema.modalities) == {"columns"} else model
